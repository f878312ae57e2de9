"""Names from files are text on every page, figure and table, whatever is in them."""

from __future__ import annotations

import copy
import io
import json
import unicodedata
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fewstep.report.comparison import comparison_page, curves_file
from fewstep.report.evaluation import evaluation_notes, evaluation_table
from fewstep.report.terminal import comparison_table
from fewstep.text import styled

ROOT = Path(__file__).parent.parent.parent
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "$\\frac{a}{b}$",
    "[bold]x[/]",
    "\x1b[31mred\x1b[0m",
    "{{ 7 * 7 }}{% raw %}",
    "user\u202egpj.exe",
    "\udce9 no UTF-8",
]


class Seen(HTMLParser):
    """The tags of a page and their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def record(name: str) -> dict[str, Any]:
    """A small comparison in which everything that is named is called so."""
    whole = json.loads((ROOT / "results" / "fashion-mnist.json").read_text("utf-8"))
    found = copy.deepcopy(whole)
    found["rows"] = [row for row in whole["rows"] if row["nfe"] in (3, 5)][:6]
    for i, row in enumerate(found["rows"]):
        row["sampler"] = row["solver"] = f"{name}{i}"
    found["model"]["name"] = found["condition"]["label"] = name
    found["condition"]["prompt"] = name
    found["sources"][0]["command"] = name
    found["left_out"] = {f"{name}@3": name}
    return found


def printed(*parts: Any) -> str:
    console = Console(file=io.StringIO(), width=300, color_system=None)
    for part in parts:
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined]


def plain(text: str) -> bool:
    """Whether no terminal obeys it."""
    return all(unicodedata.category(c)[0] != "C" for c in text.replace("\n", ""))


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_comparison_is_text(name: str) -> None:
    found = record(name)
    strips = {
        f"{row['sampler']}@{row['nfe']}": np.zeros((2, 8, 8, 1), np.uint8) for row in found["rows"]
    }
    page = comparison_page(found, strips, plots=False).decode()
    usual = Seen(comparison_page(record("name"), {}, plots=False).decode())
    seen = Seen(page)
    assert "script" not in seen.tags
    assert not [one for one in seen.attributes if one.startswith("on")]
    assert seen.tags - usual.tags <= {"img", "figure", "figcaption", "section", "div", "span", "b"}
    assert ("{{ 7 * 7 }}" in page) == (name == "{{ 7 * 7 }}{% raw %}")
    assert plain(printed(comparison_table(found)))


def test_a_figure_is_text() -> None:
    for name in HOSTILE:
        xml.etree.ElementTree.fromstring(curves_file(record(name)))


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_measurement_is_text(name: str) -> None:
    row = {"metric": name, "value": 1.5, "error": 0.1, "count": 20, "reference_count": 60}
    found = {
        "metrics": [row],
        "protocol": {"name": name},
        "reference": {"name": name},
        "extractor": {"name": name},
        "clip": name,
        "warnings": [name],
    }
    shown = printed(evaluation_table(found), *map(styled, evaluation_notes(found)))
    assert plain(shown)
    assert "[bold]x[/]" in shown or name != "[bold]x[/]"
