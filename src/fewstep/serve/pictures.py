"""Pictures as files: the formats that clients ask for, masks, and how near two pictures are."""

from __future__ import annotations

import io
import json
import warnings
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from fewstep.data.bounds import reason
from fewstep.data.images import FORMATS as READABLE
from fewstep.data.images import KEY, decode, fit_picture

__all__ = ["FORMATS", "encode", "pixel_error", "read_mask", "read_upload", "to_pixels"]

FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def encode(
    pixels: np.ndarray, kind: str, compression: int, about: dict[str, Any] | None = None
) -> bytes:
    """A picture file.

    Args:
        pixels: uint8 [h, w, c]
        kind: of FORMATS
        compression: 0 to 100, the quality of JPEG and WebP; WebP is lossless at 100
        about: how it was made; in every format's own place for text
    """
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    text = None if about is None else json.dumps(about, sort_keys=True)
    buffer = io.BytesIO()
    if kind == "png":
        info = PngImagePlugin.PngInfo()
        if text is not None:
            info.add_text(KEY, text)
        picture.save(buffer, "PNG", pnginfo=info, compress_level=3)
        return buffer.getvalue()
    exif = Image.Exif()
    if text is not None:
        exif[0x010E] = text.encode("ascii", "backslashreplace").decode()  # ImageDescription
    given = {"exif": exif.tobytes()} if text is not None else {}
    if kind == "jpeg":
        picture.save(buffer, "JPEG", quality=max(1, min(compression, 95)), **given)
    else:
        lossless = compression >= 100
        picture.convert("RGB").save(
            buffer, "WEBP", quality=compression, lossless=lossless, method=2, **given
        )
    return buffer.getvalue()


def read_upload(data: bytes, most_pixels: int) -> np.ndarray:
    """An uploaded picture, uint8 [h, w, 1 or 3]; what is transparent lies on white.

    Raises:
        ValueError: it is not a whole picture, or has too many pixels.
    """
    picture = _opened(data, most_pixels)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        flat = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        flat.alpha_composite(picture)
        return np.asarray(flat.convert("RGB"))
    return decode(data).pixels


def read_mask(data: bytes, height: int, width: int, most_pixels: int) -> np.ndarray:
    """Which pixels may change, bool [h, w]: the transparent ones, as OpenAI has it.

    A mask without transparency is read by its brightness: black may change, as if it were the
    alpha channel.

    Raises:
        ValueError: it is not a whole picture, or has too many pixels.
    """
    picture = _opened(data, most_pixels)
    try:
        if picture.has_transparency_data:
            channel = picture.convert("RGBA").getchannel("A")
        else:
            channel = picture.convert("L")
    except Exception as error:  # see `_opened`
        raise ValueError(f"mask cannot be read as a picture ({reason(error)})") from None
    return fit_picture(np.asarray(channel)[..., None], height, width, 1)[..., 0] < 128


def _opened(data: bytes, most_pixels: int) -> Image.Image:
    """A whole picture whose size was looked at before its pixels were unpacked."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data), formats=READABLE)
            if picture.width * picture.height <= most_pixels:
                picture.load()
    except Exception as error:  # Pillow's parsers raise a dozen kinds on damaged files
        raise ValueError(f"an upload cannot be read as a picture ({reason(error)})") from None
    if picture.width * picture.height > most_pixels:
        size = f"{picture.width}x{picture.height}"
        raise ValueError(f"an upload must have at most {most_pixels} pixels, got {size}")
    return picture


def to_pixels(state: np.ndarray) -> np.ndarray:
    """uint8 [h, w, c] of one picture [c, h, w] in [-1, 1]; NaN is black."""
    scaled = np.nan_to_num((state + 1) * 127.5, nan=0.0, posinf=255.0, neginf=0.0)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8).transpose(1, 2, 0)


def pixel_error(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """How far two pictures are apart, in grey levels: the root mean square, and the most."""
    apart = one.astype(np.float64) - other.astype(np.float64)
    rms, most = float(np.sqrt((apart**2).mean())), float(np.abs(apart).max())
    return {"rms": round(rms, 3), "max": most}
