"""Pages that need nothing else: jinja2 templates, one style sheet, figures and pictures inside.

Every value that a template shows goes through `fewstep.text.clean` and is then escaped, so a name
from a file is text and nothing more.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from fewstep.text import clean

__all__ = ["Cell", "Group", "Line", "Sheet", "Strip", "data_url", "render", "shown_pictures"]

LARGE = 128  # pixels; the sides of pictures in a strip at most
SMALL = 72  # pictures below are enlarged by a whole factor, to at most this
SHOWN, FEW = 16, 8  # pictures in a strip, and large ones


@dataclass(frozen=True)
class Cell:
    """A number in a table.

    Args:
        text: the number; small: what stands below it; best: whether it leads
        bar: length in per cent of the cell, or None
    """

    text: str
    small: str = ""
    best: bool = False
    bar: float | None = None


@dataclass(frozen=True)
class Line:
    """A row of a table: its name, what stands below the name, its cells."""

    name: str
    about: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Group:
    """Rows of a table, or blocks of strips, under one heading, which may be empty."""

    title: str
    rows: Sequence[Line] = ()
    blocks: Sequence[Sequence[Strip]] = ()


@dataclass(frozen=True)
class Strip:
    """Pictures of one sampler: its name, a note, a warning, the address and number of pictures."""

    name: str
    about: str
    url: str
    count: int
    off: str = ""


@dataclass(frozen=True)
class Sheet:
    """Strips beside the exact solution; sizes in CSS pixels, of one picture."""

    exact: str
    width: int
    height: int
    groups: Sequence[Group]
    seeds: Sequence[int] = field(default=())


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("fewstep.report"),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else _text(value),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _text(value: Any) -> str:
    """Text as it is shown; the addresses of our own pictures are long and as we made them."""
    return value if isinstance(value, _Address) else clean(value)


class _Address(str):
    """A data URL that was made here."""


def render(template: str, **values: Any) -> bytes:
    """A page as a file, UTF-8.

    Args:
        template: the name of a file in templates/
        values: what it shows
    """
    style = Markup(_environment().get_template("style.css").render())
    return _environment().get_template(template).render(style=style, **values).strip().encode()


def data_url(data: bytes, kind: str) -> str:
    """An address that holds the file itself; kind: png or svg+xml."""
    return _Address(f"data:image/{kind};base64,{base64.b64encode(data).decode()}")


def shown_pictures(pictures: np.ndarray) -> tuple[str, int, int, int]:
    """As many pictures as a strip has, side by side in one PNG.

    Args:
        pictures: uint8 [n, h, w, c]

    Returns:
        (address, number of pictures, width and height of one in CSS pixels). Large ones are made
        smaller, small ones are shown larger by a whole factor.
    """
    high, wide = pictures.shape[1:3]
    few = pictures[: SHOWN if max(high, wide) <= LARGE // 2 else FEW]
    if max(high, wide) > LARGE:
        share = LARGE / max(high, wide)
        size = max(1, round(wide * share)), max(1, round(high * share))
        few = np.stack(
            [np.asarray(_image(one).resize(size, Image.Resampling.LANCZOS)) for one in few]
        )
        few = few.reshape(len(few), size[1], size[0], -1)
    n, high, wide, channels = few.shape
    buffer = io.BytesIO()
    strip = few.transpose(1, 0, 2, 3).reshape(high, n * wide, channels)
    _image(strip).save(buffer, "PNG", optimize=True)
    factor = max(1, SMALL // max(high, wide))
    return data_url(buffer.getvalue(), "png"), n, factor * wide, factor * high


def _image(picture: np.ndarray) -> Image.Image:
    """Pillow's picture of uint8 [h, w, c], c = 1 or 3."""
    return Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
