"""PNG files that say how they were made, and contact sheets of them."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from fewstep.files import write_whole

__all__ = ["contact_sheet", "read_metadata", "read_png", "write_png"]

KEY = "fewstep"  # the text chunk that holds the metadata
END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk of every PNG


def write_png(path: Path | str, image: np.ndarray, metadata: dict[str, Any] | None = None) -> None:
    """Write uint8 [h, w, c] (c = 1 or 3), or [h, w], with `metadata` as JSON in a text chunk. The
    bytes depend on these alone."""
    info = PngImagePlugin.PngInfo()
    if metadata is not None:
        info.add_text(KEY, json.dumps(metadata, sort_keys=True))
    buffer = io.BytesIO()
    picture = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
    Image.fromarray(picture).save(buffer, "PNG", pnginfo=info)
    write_whole(path, buffer.getvalue())


def read_metadata(path: Path | str) -> dict[str, Any] | None:
    """The metadata of a picture, None where the file is not ours; reads no pixels.

    Errors: ValueError where it is ours and was cut short.
    """
    try:
        with Image.open(path) as picture:
            found = _metadata(picture)
    except (OSError, SyntaxError, ValueError) as error:
        if _of_the_system(error):
            raise
        return None
    if found is not None and not _ends(path):
        raise ValueError(f"{path} was cut short; remove it")
    return found


def _of_the_system(error: Exception) -> bool:
    """Whether the file could not be read at all: Pillow's own OSErrors, about what is in it, have
    no number."""
    return isinstance(error, OSError) and error.errno is not None


def _ends(path: Path | str) -> bool:
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - len(END)))
        return file.read() == END


def read_png(path: Path | str) -> tuple[np.ndarray, dict[str, Any] | None]:
    """The picture, uint8 [h, w, c], and its metadata, None where it is not ours.

    Errors: ValueError where the file is not a whole picture.
    """
    metadata = read_metadata(path)
    try:
        with Image.open(path) as picture:
            array = np.asarray(picture)
    except (OSError, SyntaxError, ValueError) as error:
        if _of_the_system(error):
            raise
        advice = "; remove it" if metadata else ""
        raise ValueError(f"{path} is not a whole picture ({error}){advice}") from None
    return (array if array.ndim == 3 else array[..., None]), metadata


def _metadata(picture: Image.Image) -> dict[str, Any] | None:
    try:
        found = json.loads(picture.info.get(KEY, "null"))
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def contact_sheet(
    images: Sequence[np.ndarray], columns: int | None = None, gap: int = 2
) -> np.ndarray:
    """All pictures of one size on one, row by row, uint8 [h, w, c]; small ones are enlarged to 64
    pixels or more.

    columns: as square as it goes where left out.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    scale = max(1, math.ceil(64 / images[0].shape[0]))
    tiles = [tile.repeat(scale, axis=0).repeat(scale, axis=1) for tile in images]
    height, width, channels = tiles[0].shape
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, channels)
    sheet = np.full(shape, 40, dtype=np.uint8)
    for i, tile in enumerate(tiles):
        top, left = (
            gap + n * (side + gap)
            for n, side in zip(divmod(i, columns), (height, width), strict=True)
        )
        sheet[top : top + height, left : left + width] = tile
    return sheet
