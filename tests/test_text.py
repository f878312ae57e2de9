"""Text from files is one printable line that no terminal, rich, figure or path obeys."""

from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from fewstep.text import clean, count, joined, label, slug, span, styled

HOSTILE = (
    "\x1b[31mred\x1b[0m", "\x1b]8;;http://x\x07link", "a\nb\r\nc", "\x9b2J", "\x00", "\x7f",
    "user\u202egpj.exe", "\u2066isolate\u2069", "zero\u200bwidth", "\ufeffmark", "\u2028line",
    "\udce9 not UTF-8", "\ue000", "[bold]x[/bold]", "[/]", "[link=file:///etc/passwd]x[/link]",
    "$\\frac{a}{b}$", "a_b^c", "$", "\\", "_hidden", "__", "<script>alert(1)</script>", "&amp;",
    '"><img src=x onerror=alert(1)>', "../../x", "/etc/passwd", "CON", "", " ", "." * 5000,
)  # fmt: skip


def printable(text: str) -> bool:
    return all(unicodedata.category(c)[0] != "C" and c not in "\u2028\u2029" for c in text)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_cleaned_text_is_one_printable_line(text):
    assert printable(clean(text))
    assert len(clean(text, 100)) <= 600  # an escape takes at most 6 characters, of a hundred
    assert clean(clean(text)) == clean(text)


@given(st.text())
def test_any_text_is_cleaned_for_good(text):
    found = clean(text)
    assert printable(found.replace("\u200c", "").replace("\u200d", ""))
    found.encode()  # no surrogate is left
    assert clean(found) == found or len(found) > 2000


@pytest.mark.parametrize("text", ["Ж и 東京", "café, naïve", "👩\u200d🚀", "x 5 µm ± 2 %"])
def test_text_of_any_script_stays_as_it_is(text):
    assert clean(text) == text


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_nothing_is_markup_for_rich(text):
    console = Console(file=io.StringIO(), width=3000, color_system=None)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row(styled(text, "bold"))
    console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.rstrip("\n").rstrip() == clean(text).rstrip()


@given(st.text())
def test_a_slug_is_a_part_of_a_path(text):
    found = slug(text)
    assert found.strip("abcdefghijklmnopqrstuvwxyz0123456789-") == ""
    assert 0 < len(found) <= 60


def test_labels_keep_both_ends_and_never_hide():
    ours = [label(f"tuned-fashion-mnist-on-a-very-long-name-s{seed}") for seed in (0, 1)]
    assert ours[0] != ours[1]
    assert max(map(len, ours)) <= 28
    assert label("dpm-solver-2") == "dpm-solver-2"
    assert label("_private") == " _private"


def test_numbers_in_words():
    assert [count(n, "seed") for n in (0, 1, 5000)] == ["0 seeds", "1 seed", "5,000 seeds"]
    assert [joined(list("abc")[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
    assert [span(s) for s in (range(12), (3, 11), (5,))] == ["0 to 11", "3, 11", "5"]
