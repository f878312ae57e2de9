"""The documents and the API reference as one site: no warnings, and no other host."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import fewstep

ROOT = Path(__file__).parent.parent
REFERENCE = sorted(ROOT.glob("docs/reference/*.md"))
MOST_NAMES = 60  # what is promised stays small


def referenced() -> list[str]:
    """Every name of the API reference, in order."""
    return [
        name
        for page in REFERENCE
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder


class Fetched(HTMLParser):
    """What a browser fetches by itself to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.addresses += [values.get("src") or ""]
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.addresses += [values.get("href") or ""]


@pytest.mark.slow
def test_the_site_asks_no_other_host_for_anything(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        parser = Fetched()
        parser.feed(page.read_text(encoding="utf-8"))
        assert parser.addresses
        away = [one for one in parser.addresses if re.match(r"(\w+:)?//", one)]
        assert not away, f"{page.name} fetches {away}"
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?(?:https?:)?//", sheet.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_name_of_the_reference_has_its_place_on_the_site(site):
    pages = "".join(page.read_text() for page in sorted(site.glob("reference/*.html")))
    assert not [name for name in referenced() if f'id="{name}"' not in pages]


@pytest.mark.parametrize("name", referenced())
def test_a_name_of_the_reference_is_there_and_public(name):
    module, _, own = name.rpartition(".")
    found = importlib.import_module(module)
    assert hasattr(found, own)
    assert own in found.__all__
    assert getattr(found, own).__doc__


def test_the_reference_has_all_that_is_promised_and_stays_small():
    names = referenced()
    assert len(set(names)) == len(names) <= MOST_NAMES
    assert set(fewstep.__all__) <= {name.rpartition(".")[2] for name in names}
