"""PNG files that say how they were made, and contact sheets of them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from fewstep.files import write_whole

__all__ = ["contact_sheet", "read_png", "write_png"]

KEY = "fewstep"  # the text chunk that holds the metadata


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


def read_png(path: Path | str) -> tuple[np.ndarray, dict[str, Any] | None]:
    """The picture, uint8 [h, w, c], and its metadata, None where it is not ours.

    Errors: ValueError where the file is not a whole picture.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            array, text = np.asarray(picture), picture.info.get(KEY)
    except (UnidentifiedImageError, SyntaxError, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise ValueError(f"{path} is not a whole picture ({error}); remove it") from None
    return (array if array.ndim == 3 else array[..., None]), json.loads(text) if text else None


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
