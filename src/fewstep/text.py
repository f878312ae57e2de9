"""Text that may come from a file, made safe for the place where it is shown.

The name of a model, a solver, a class or a picture is whatever its author wrote. `clean` leaves one
line of printable text; `styled`, `label` and `slug` are for rich, matplotlib and file names. The
templates of pages pass every value through `clean` and then escape it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["clean", "count", "joined", "label", "slug", "span", "styled"]

MOST = 2000  # characters of one text; a message is a line, not a page
JOINERS = "\u200c\u200d"  # within words of several scripts, and harmless


def clean(value: Any, most: int = MOST) -> str:
    """One line of printable text.

    White space becomes a space. Other control characters are shown as escapes: `\\x1b`.

    Args:
        value: anything; its `str`
        most: characters at most; longer text is cut, and ends in an ellipsis
    """
    text = str(value)
    text = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(_seen(one) for one in text)


def _seen(one: str) -> str:
    if one in "\t\n\r\u0085\u2028\u2029":
        return " "
    # controls, formats (bidi overrides, zero widths), surrogates, private and unassigned ones
    if one not in JOINERS and unicodedata.category(one)[0] == "C":
        return one.encode("unicode_escape").decode("ascii")
    return one


def styled(value: Any, style: str = "") -> Text:
    """The cleaned text for rich, in which nothing is markup.

    Args:
        value: anything
        style: of rich, for the whole text
    """
    from rich.text import Text

    return Text(clean(value), style)


def label(value: Any, most: int = 28) -> str:
    """The cleaned text for matplotlib, cut in its middle where it is long.

    Names of runs differ at their ends, so both are kept. Mathematics is off where figures are drawn
    (`text.parse_math`); a leading underscore would hide a line from the legend.
    """
    text = clean(value)
    if len(text) > most:
        ahead = (2 * most) // 3
        text = f"{text[:ahead]}…{text[ahead + 1 - most :]}"
    return f" {text}" if text.startswith("_") else text


def slug(value: Any, most: int = 60) -> str:
    """A part of a path: lower-case letters, digits and hyphens; "unnamed" where none is left."""
    return re.sub(r"[^a-z0-9]+", "-", str(value).lower()[:1000]).strip("-")[:most] or "unnamed"


def count(number: int, noun: str) -> str:
    """A number with its noun: "1 seed", "5,000 seeds"."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def joined(words: Sequence[Any]) -> str:
    """ "a", "a and b", or "a, b and c"."""
    *most, last = map(str, words)
    return f"{', '.join(most)} and {last}" if most else last


def span(numbers: Sequence[int]) -> str:
    """Whole numbers: "0 to 11" where they run on, else each with commas between."""
    first, last = numbers[0], numbers[-1]
    if len(numbers) > 2 and list(numbers) == list(range(first, last + 1)):
        return f"{first} to {last}"
    return ", ".join(map(str, numbers))
