"""Pictures: opening them in one way, fitting them, and PNG files that say how they were made.

Every picture is opened by `decode` or `read_metadata`, by its content and never by its name, and in
the formats of FORMATS alone: other plugins of Pillow start programs or reach for other files.
"""

from __future__ import annotations

import io
import json
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from fewstep.data.bounds import read_bytes, reason
from fewstep.files import write_whole
from fewstep.text import clean

__all__ = [
    "FORMATS",
    "SUFFIXES",
    "Picture",
    "Unreadable",
    "contact_sheet",
    "decode",
    "fit_picture",
    "metadata_in",
    "png_bytes",
    "read_metadata",
    "read_picture",
    "read_png",
    "write_png",
]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff"),
    *(".gif", ".ppm", ".pgm", ".pbm", ".pnm"),
)
MOST_PIXELS = 1 << 26  # of one picture: 8192 x 8192
STRIP = 1 << 22  # pixels that are converted at a time
ORIENTATION = 0x0112  # Exif's tag; 1 is upright
KEY = "fewstep"  # the text chunk that holds the metadata
END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk of every PNG


class Unreadable(ValueError):
    """A picture that is corrupt, cut short, or not a picture."""


class Picture(NamedTuple):
    """A picture as it is read.

    pixels: uint8 [h, w, c], c = 1 or 3
    turned: whether it was turned, as its Exif data say
    askew: whether its Exif data say to turn it, and it was not
    more: whether the file has more than this first frame or page
    """

    pixels: np.ndarray
    turned: bool = False
    askew: bool = False
    more: bool = False


def write_png(path: Path | str, image: np.ndarray, metadata: dict[str, Any] | None = None) -> None:
    """Write uint8 [h, w, c] (c = 1 or 3), or [h, w], with `metadata` as JSON in a text chunk."""
    write_whole(path, png_bytes(image, metadata))


def png_bytes(image: np.ndarray, metadata: dict[str, Any] | None = None) -> bytes:
    """The file that `write_png` writes. The bytes depend on the arguments alone."""
    info = PngImagePlugin.PngInfo()
    if metadata is not None:
        info.add_text(KEY, json.dumps(metadata, sort_keys=True))
    buffer = io.BytesIO()
    picture = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
    Image.fromarray(picture).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_metadata(path: Path | str) -> dict[str, Any] | None:
    """The metadata of a picture, None where the file is not ours; reads no pixels.

    Raises:
        ValueError: it is ours and was cut short.
        OSError: it cannot be read.
    """
    if not Path(path).is_file() and Path(path).exists():  # a folder, or a pipe that would wait
        return None
    with open(path, "rb") as file:
        found = metadata_in(file)
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - len(END)))
        if found is not None and file.read() != END:
            raise ValueError(f"{clean(path)} was cut short; remove it")
    return found


def metadata_in(file: IO[bytes]) -> dict[str, Any] | None:
    """The metadata of an open picture, None where it has none of ours."""
    try:
        with _open(file) as picture:
            found = json.loads(picture.info.get(KEY, "null"))
    except (ValueError, TypeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_png(path: Path | str) -> tuple[np.ndarray, dict[str, Any] | None]:
    """The picture, uint8 [h, w, c], and its metadata, None where it is not ours.

    Raises:
        ValueError: the file is not a whole picture.
        OSError: it cannot be read.
    """
    metadata, data = read_metadata(path), read_bytes(path)
    try:
        return decode(data).pixels, metadata
    except ValueError as error:
        advice = "; remove it" if metadata else ""
        raise ValueError(f"{clean(path)} is not a whole picture ({error}){advice}") from None


def read_picture(path: Path | str) -> np.ndarray:
    """A picture file as uint8 [h, w, 1 or 3], turned as its Exif data say.

    Raises:
        ValueError: it is not a whole picture, or `decode` does not take it.
        OSError: there is no such file.
    """
    data = read_bytes(path)
    try:
        return decode(data).pixels
    except Unreadable as error:
        raise ValueError(f"{clean(path)} cannot be read as a picture ({error})") from None
    except ValueError as error:
        raise ValueError(f"{clean(path)} {error}") from None


def decode(data: bytes, upright: bool = True) -> Picture:
    """The picture in a file's bytes; of several frames or pages, the first.

    Palettes, CMYK and the like become RGB; what is grey stays grey.

    Args:
        data: the whole file, in one of FORMATS
        upright: turn it as its Exif data say (Pillow turns TIFF in any case)

    Raises:
        Unreadable: it is damaged, of another format, or has more than MOST_PIXELS.
        ValueError: it has transparent pixels or more than 8 bits a channel, which have no one
            right way to 8 bits.
    """
    with _open(io.BytesIO(data)) as picture:
        deep = _has_more_than_8_bits(picture)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                picture.load()
                lies = _orientation(picture) != 1
                more = bool(getattr(picture, "is_animated", False))
                if upright and lies:
                    ImageOps.exif_transpose(picture, in_place=True)
        except Exception as error:  # Pillow's parsers raise a dozen kinds on damaged files
            raise Unreadable(reason(error)) from None
        if deep or picture.mode.startswith(("I", "F")):
            raise ValueError(f"has more than 8 bits ({picture.mode}); convert it to 8 bits")
        return Picture(_pixels(picture), lies and upright, lies and not upright, more)


def _open(file: IO[bytes]) -> Image.Image:
    """Raises Unreadable where it is in none of FORMATS, or has too many pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise Unreadable(f"it is of no format among {', '.join(FORMATS)}") from None
    except Exception as error:  # see `decode`
        raise Unreadable(reason(error)) from None
    if picture.width * picture.height > MOST_PIXELS:
        size = f"{picture.width}x{picture.height}"
        raise Unreadable(f"it has {size} pixels, more than {MOST_PIXELS}")
    return picture


def _has_more_than_8_bits(picture: Image.Image) -> bool:
    """Of a picture that is not loaded yet: Pillow drops the low byte of colours without a word."""
    if picture.format == "BMP":  # its BGR;16 has 5 or 6 bits a channel
        return False
    for tile in getattr(picture, "tile", ()):
        args = tile.args if isinstance(tile.args, tuple | list) else (tile.args,)
        if ";16" in str(args[0]):
            return True
        if picture.format == "PPM" and isinstance(args[-1], int) and args[-1] > 255:
            return True
    tags = getattr(picture, "tag_v2", {})  # of TIFF; 258 is BitsPerSample
    return max(tags.get(258, (8,)), default=8) > 8 if picture.format == "TIFF" else False


def _orientation(picture: Image.Image) -> int:
    """Of a loaded picture, 1 to 8."""
    try:
        found = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged Exif data say nothing
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _pixels(picture: Image.Image) -> np.ndarray:
    """uint8 [h, w, 1 or 3] of a loaded picture, a few rows at a time."""
    if picture.mode in ("La", "RGBa"):
        picture = picture.convert(picture.mode.upper())
    mode = "L" if picture.mode in ("1", "L", "LA") else "RGB"
    see_through = picture.has_transparency_data
    if see_through and picture.mode in ("1", "L") and picture.format == "PNG":
        # Pillow does not scale tRNS of fewer than 8 bits, so whether a pixel has it is not known
        raise ValueError("has a transparent grey level (tRNS); flatten it first")
    width, height = picture.size
    out = np.empty((height, width, len(mode)), np.uint8)
    rows = max(1, STRIP // max(width, 1))
    for top in range(0, height, rows):
        strip = picture.crop((0, top, width, min(top + rows, height))) if rows < height else picture
        if see_through and strip.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            raise ValueError("has transparent pixels; flatten it first")
        try:
            plain = strip if strip.mode == mode else strip.convert(mode)
        except ValueError:
            raise ValueError(f"has colours of {strip.mode}; convert it to RGB") from None
        out[top : top + rows] = np.asarray(plain).reshape(-1, width, len(mode))
    return out


def fit_picture(
    image: np.ndarray, height: int, width: int, channels: int | None = None
) -> np.ndarray:
    """The largest middle part of a picture with the shape height : width, resized by Pillow's
    bicubic to that size; uint8 [h, w, c] to uint8 [height, width, c].

    Args:
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


def contact_sheet(
    images: Sequence[np.ndarray], columns: int | None = None, gap: int = 2
) -> np.ndarray:
    """All pictures of one size on one, row by row, uint8 [h, w, c]; small ones are enlarged to 64
    pixels or more.

    Args:
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
