"""Reading and fitting pictures, PNG files that say how they were made, and contact sheets."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from fewstep.files import write_whole

__all__ = [
    "Unreadable",
    "bounded_open",
    "contact_sheet",
    "decode",
    "fit_picture",
    "read_metadata",
    "read_picture",
    "read_png",
    "write_png",
]

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


class Unreadable(ValueError):
    """A picture that is corrupt, cut short, or not a picture."""


def read_picture(path: Path | str) -> np.ndarray:
    """A picture file of any kind as uint8 [h, w, 1 or 3], turned as its Exif data say.

    Errors: OSError where there is no such file; ValueError where it is not a whole picture, or has
    transparent pixels or more than 8 bits.
    """
    try:
        return decode(Path(path).read_bytes(), upright=True)
    except Unreadable as error:
        raise ValueError(f"{path} cannot be read as a picture ({error})") from None
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None


def fit_picture(
    image: np.ndarray, height: int, width: int, channels: int | None = None
) -> np.ndarray:
    """The largest middle part of a picture with the shape height : width, resized by Pillow's
    bicubic to that size; uint8 [h, w, c] to uint8 [height, width, c].

    channels: 1 or 3, to make it grey or coloured; its own where left out
    """
    tall, wide = image.shape[:2]
    scale = min(tall / height, wide / width)
    rows, columns = round(height * scale), round(width * scale)
    top, left = (tall - rows) // 2, (wide - columns) // 2
    part = image[top : top + rows, left : left + columns]
    if part.shape[:2] == (height, width) and channels in (None, part.shape[2]):
        return part
    picture = Image.fromarray(part[..., 0] if part.shape[2] == 1 else part)
    if channels is not None:
        picture = picture.convert("L" if channels == 1 else "RGB")
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture).reshape(height, width, -1)


def decode(data: bytes, upright: bool = False) -> np.ndarray:
    """The picture in a file's bytes, uint8 [h, w, 1] where it is grey and [h, w, 3] where not.

    upright: turn it as its Exif data say

    Palettes, CMYK and the like become RGB. Errors: Unreadable; ValueError for transparency or more
    than 8 bits, which have no one right way to 8 bits.
    """
    with bounded_open(data) as picture:
        try:
            picture.load()
            if upright:
                ImageOps.exif_transpose(picture, in_place=True)
        except (OSError, SyntaxError, ValueError, zlib.error) as error:
            raise Unreadable(str(error)) from None
        if picture.mode.startswith(("I", "F")):
            raise ValueError(f"has more than 8 bits ({picture.mode}); convert it to 8 bits")
        if picture.mode in ("L", "1"):
            return np.asarray(picture.convert("L"))[..., None]
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            whole = picture.convert("RGBA")
            if whole.getchannel("A").getextrema() != (255, 255):
                raise ValueError("has transparent pixels; flatten it first")
            if picture.mode == "LA":
                return np.asarray(picture.convert("L"))[..., None]
        return np.asarray(picture.convert("RGB"))


@contextlib.contextmanager
def bounded_open(data: bytes) -> Iterator[Image.Image]:
    """Pillow's limit on pixels stays on, and its warning below the limit is an error too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            picture = Image.open(io.BytesIO(data))
        except UnidentifiedImageError:
            raise Unreadable("it is of no format that Pillow knows") from None
        except (
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
            Image.DecompressionBombWarning,
        ) as error:
            raise Unreadable(" ".join(str(error).split())) from None
    with picture:
        yield picture


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
