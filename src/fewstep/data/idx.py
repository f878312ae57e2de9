"""Reading pictures and labels in the idx format of MNIST and its kin: raw, gzip or xz."""

from __future__ import annotations

import gzip
import lzma
import math
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from fewstep.data.bounds import check_room, check_unpacked, reason
from fewstep.text import clean

__all__ = ["load_idx_folder", "read_idx", "to_pixels", "to_unit"]

SUFFIXES = ("", ".gz", ".xz")
PACKED = {b"\x1f\x8b": gzip.open, b"\xfd7": lzma.open}  # by a file's first two bytes


def read_idx(path: Path | str) -> np.ndarray:
    """The uint8 array in one idx file, packed or not; its size is checked before it is read.

    Raises:
        ValueError: it is cut short, is not an idx file of bytes, or is larger than it can be.
        OSError: it cannot be read.
    """
    path = Path(path)
    with open(path, "rb") as file:
        opener = PACKED.get(file.read(2), open)
    try:
        with opener(path, "rb") as stream:
            return _read(stream, path)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, MemoryError) as error:
        name = clean(path)
        raise ValueError(
            f"{name} cannot be decompressed ({reason(error)}); fetch it again"
        ) from None


def _read(stream: IO[bytes], path: Path) -> np.ndarray:
    name, head = clean(path), stream.read(4)
    if len(head) < 4 or head[:3] != b"\x00\x00\x08" or not 1 <= head[3] <= 4:
        raise ValueError(f"{name} is not an idx file of bytes (it starts with {head.hex()})")
    sizes = stream.read(4 * head[3])
    if len(sizes) < 4 * head[3]:
        raise ValueError(f"{name} is cut short in its header")
    shape = tuple(np.frombuffer(sizes, dtype=">u4").tolist())
    size = math.prod(shape)
    if not size:
        raise ValueError(f"{name} is empty: it has the shape {shape}")
    check_unpacked(size, path.stat().st_size, name)
    check_room(2 * size, name)
    data = stream.read(size + 1)
    if len(data) != size:
        more = "more" if len(data) > size else len(data)
        raise ValueError(f"{name} is cut short: shape {shape} takes {size} bytes, it has {more}")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def find_idx(folder: Path, stem: str) -> Path:
    for suffix in SUFFIXES:
        if (path := folder / f"{stem}-ubyte{suffix}").is_file():
            return path
    raise FileNotFoundError(
        f"{folder} has no {stem}-ubyte (raw, .gz or .xz); "
        "give the folder that holds the four idx files"
    )


def load_idx_folder(
    folder: Path | str, split: str = "train", size: int = 32
) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [n, 1, size, size], zero-padded to the middle, and labels int64 [n].

    Args:
        split: "train" or "test" (files named t10k-*, as the data's makers named them).
    """
    folder = Path(folder)
    prefix = {"train": "train", "test": "t10k"}[split]
    images = read_idx(find_idx(folder, f"{prefix}-images-idx3"))
    labels = read_idx(find_idx(folder, f"{prefix}-labels-idx1"))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(f"{folder}: {images.shape} pictures do not go with {labels.shape} labels")
    spare = (size - images.shape[1], size - images.shape[2])
    if min(spare) < 0:
        raise ValueError(f"pictures of {images.shape[1:]} do not fit in {size}x{size}")
    check_room(len(images) * size * size, str(folder))
    pad = [(0, 0), *((s // 2, s - s // 2) for s in spare)]
    return torch.from_numpy(np.pad(images, pad))[:, None], torch.from_numpy(labels.astype(np.int64))


def to_unit(images: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_pixels(x: Tensor) -> Tensor:
    """Float [-1, 1] to uint8 [0, 255], rounded to nearest and clipped."""
    return ((x + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
