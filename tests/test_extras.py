"""A library that is not there is one line that says how to install it."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest

from fewstep.evaluate.clip import load_clip
from fewstep.extras import MissingExtra, needs
from tests.support.command import command


@pytest.fixture(params=["diffusers", "transformers"])
def absent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A library that cannot be imported."""
    for name in list(sys.modules):
        if name.split(".")[0] == request.param or name.startswith("fewstep.integrations."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, request.param, None)
    return request.param


def check(text: str, extra: str, what: str) -> None:
    assert "\n" not in text
    assert what in text
    assert f"pip install -e '.[{extra}]', or make setup" in text


def test_a_pipeline_says_so(absent: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = command("sample", "someone/something", "--out", tmp_path / "out")
    assert ran.exit_code == 2
    check(ran.stderr.rstrip("\n"), "diffusers", "there is no folder 'someone/something'")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["diffusers", "pipeline"])
def test_the_modules_for_diffusers_say_so(module: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for name in list(sys.modules):
        if name.startswith(("diffusers.", "fewstep.integrations.")):
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError) as caught:
        importlib.import_module(f"fewstep.integrations.{module}")
    check(str(caught.value), "diffusers", "fewstep.integrations.")


def test_the_clip_score_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra) as caught:
        load_clip(tmp_path)
    check(str(caught.value), "evaluate", "the CLIP score")


def test_every_extra_that_is_named_is_there() -> None:
    root = Path(__file__).parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    texts = [path.read_text("utf-8") for path in (root / "src").rglob("*.py")]
    named = {extra for text in texts for extra in re.findall(r'needs\("(\w+)"', text)}
    assert named
    assert named <= set(project["optional-dependencies"])
    assert not [text for text in texts if "pip install 'fewstep" in text]


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError), needs("evaluate", "this"):
        raise KeyError
