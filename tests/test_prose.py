"""The documents are written in short, plain sentences."""

from __future__ import annotations

import re
import statistics
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Generated, or a list of single lines, or a table of contents: they have few sentences.
LISTS = {"results.md", "CHANGELOG.md", "contributing.md", "changelog.md"}
PAGES = [
    path
    for path in sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")])
    if path.name not in LISTS
]

SOURCES = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("src/**/*.j2")])
MEDIAN, LONGEST = 17, 45  # words of a sentence: the median of a page stays below, none is longer

# Idioms that a reader may not know, each with what to write instead. Words match whole.
ODD = {
    "not to be had": "not available",
    "leads away from": "negative prompt",
    "stays the caller's": "is not checked",
    "speaks up": "raises",
    "speak up": "raise",
    "dealt out": "the first to the first, the second to the second",
    "not asked for goes": "the least recently used is dropped",
    "at its best self": "at its best setting",
    "goes its way": "runs",
    "will not do": "is not enough",
    "has no say": "is ignored",
    "at hand": "available",
    "of no use": "does not work",
    "no accident": "expected",
    "to be impressed by": "to look at",
    "apples with pears": "different things",
    "no way round": "always",
    "may serve": "can be used",
    "needs a word on": "depends on",
    "makes up for": "corrects",
    "whatever may surprise": "what is unusual",
    "has a word for": "names",
    "in its stead": "instead",
    "to its own devices": "alone",
    "come what may": "always",
    "by the way": "also",
    "as the case may be": "",
    "whence": "from which",
    "whereby": "by which",
    "thereof": "of it",
    "in good time": "early",
    "once and for all": "once",
}


def sentences(text: str) -> list[str]:
    """The sentences of a Markdown text, without code, tables, headings and marks.

    A piece of inline code and a link count as they are read; a list item or a cell of a table that
    has no full stop is no sentence of its own unless it has four words or more.
    """
    text = re.sub(r"^( *)```.*?^\1```", "\n", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->", "\n", text, flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]+`", "CODE", text)
    lines = [
        "" if re.match(r"#|\||    |:::", line) else re.sub(r"^\s*([-*]|\d+\.) ", "\n", line)
        for line in text.splitlines()
    ]
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
    found = []
    for paragraph in paragraphs:
        flat = " ".join(paragraph.replace("*", "").split())
        flat = re.sub(r"\b(e\.g|i\.e|et al|vs|cf)\.", r"\1", flat)
        found += re.split(r"(?<=[.!?:])\)? +(?=[A-Z(\[0-9`])", flat)
    return [one for one in found if len(one.split()) >= 4]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sentences_are_short(path):
    found = sentences(path.read_text(encoding="utf-8"))
    counts = [len(one.split()) for one in found]
    assert not counts or statistics.median(counts) < MEDIAN
    assert not [one for one in found if len(one.split()) > LONGEST]


def odd_phrases(text: str) -> dict[str, str]:
    """Idioms in a text, over the ends of lines, of comments and of strings, and what they mean."""
    joined = re.sub(r'"\s*\n\s*[fr]?"|\n\s*#', " ", text)
    flat = " ".join(joined.split()).lower()
    return {odd: plain for odd, plain in ODD.items() if re.search(rf"\b{re.escape(odd)}\b", flat)}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_there_are_no_odd_phrases(path):
    found = odd_phrases(path.read_text(encoding="utf-8"))
    assert not found, f"write instead: {found}"


def test_the_code_has_no_odd_phrases():
    """In docstrings, comments, messages and templates."""
    assert SOURCES
    texts = {path.name: odd_phrases(path.read_text(encoding="utf-8")) for path in SOURCES}
    found = {name: odd for name, odd in texts.items() if odd}
    assert not found, f"write instead: {found}"


@pytest.mark.parametrize(
    "text",
    ["speaks\n    # up", 'raise ValueError(\n    "it speaks "\n    f"up"\n)', "It speaks\nup"],
)
def test_odd_phrases_are_found_over_the_ends_of_lines(text):
    assert list(odd_phrases(text)) == ["speaks up"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_list_begins_after_an_empty_line(path):
    """Else the site shows it as running text, though other readers of Markdown see a list."""
    text = re.sub(r"^( *)```.*?^\1```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    item = re.compile(r"([-*]|\d+\.) ")
    lines = text.splitlines()
    starts = [
        line
        for before, line in pairwise(lines)
        if item.match(line) and before.strip() and not item.match(before) and before[0] != " "
    ]
    assert not starts


def test_sentences_are_counted_as_they_are_read():
    text = """# A heading that is not counted at all

One sentence with five words. Another one, with `some code` in it: and more.

| a table | is not counted |
|---|---|

- An item without a stop
- see [a link with words](page.md#anchor)

```sh
code is not counted
```

    nor is an indented block
"""
    assert sentences(text) == [
        "One sentence with five words.",
        "Another one, with CODE in it: and more.",
        "An item without a stop",
        "see a link with words",
    ]
