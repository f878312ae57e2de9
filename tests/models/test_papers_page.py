"""The commands of docs/papers-networks.md run, on small files in place of the published ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fewstep.cli.run import run
from tests.support.edm_files import write_edm

PAGE = Path(__file__).parents[2] / "docs" / "papers-networks.md"
FEW = ["--trajectories", "2", "--batch", "2", "--validation-seeds", "2"]


def commands() -> list[list[str]]:
    """The commands of the page, in their order."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = (line for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [shlex.split(line) for line in lines]


def small(words: list[str]) -> list[str]:
    """The same with few pictures, on this machine."""
    given = " ".join(words[1:]).replace("0-49999", "0-1").replace(" --batch 512 --device cuda", "")
    return [*given.split(), *(FEW if words[1] == "train" else [])]


def test_the_page_has_every_step() -> None:
    assert [words[1] for words in commands()] == [
        *("models", "convert", "train", "train", "train", "convert", "sample", "evaluate")
    ]
    assert all(words[0] == "fewstep" for words in commands())


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_edm(tmp_path / "edm-cifar10-32x32-uncond-vp.pkl")
    for words in commands():
        # what an author's training wrote, and the statistics of a data set, are not at hand
        if words[1] != "evaluate" and "network-snapshot" not in words[2]:
            assert run(small(words)) == 0, words
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 3
