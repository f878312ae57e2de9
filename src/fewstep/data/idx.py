"""Reading pictures and labels in the idx format of MNIST and its kin: raw, .gz or .xz."""

from __future__ import annotations

import gzip
import lzma
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["load_idx_folder", "read_idx", "to_pixels", "to_unit"]

OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open}


def read_idx(path: Path | str) -> np.ndarray:
    """The uint8 array in one idx file.

    Errors: ValueError where the file is cut short or is not an idx file of bytes.
    """
    path = Path(path)
    opener = OPENERS.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            raw = file.read()
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} cannot be decompressed ({error}); fetch it again") from None
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or not 1 <= raw[3] <= 4:
        raise ValueError(f"{path} is not an idx file of bytes (it starts with {raw[:4].hex()})")
    header = 4 + 4 * raw[3]
    shape = tuple(np.frombuffer(raw[4:header], dtype=">u4").tolist())
    if len(raw) != header + math.prod(shape):
        raise ValueError(f"{path} is cut short: {len(raw)} bytes for shape {shape}")
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)


def find_idx(folder: Path, stem: str) -> Path:
    for suffix in OPENERS:
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

    split: "train" or "test" (files named t10k-*, as the data's makers named them).
    """
    folder = Path(folder)
    prefix = {"train": "train", "test": "t10k"}[split]
    images = read_idx(find_idx(folder, f"{prefix}-images-idx3"))
    labels = read_idx(find_idx(folder, f"{prefix}-labels-idx1"))
    if images.ndim != 3 or labels.ndim != 1 or not 0 < len(images) == len(labels):
        raise ValueError(f"{folder}: {images.shape} pictures do not go with {labels.shape} labels")
    spare = (size - images.shape[1], size - images.shape[2])
    if min(spare) < 0:
        raise ValueError(f"pictures of {images.shape[1:]} do not fit in {size}x{size}")
    pad = [(0, 0), *((s // 2, s - s // 2) for s in spare)]
    return torch.from_numpy(np.pad(images, pad))[:, None], torch.from_numpy(labels.astype(np.int64))


def to_unit(images: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_pixels(x: Tensor) -> Tensor:
    """Float [-1, 1] to uint8 [0, 255], rounded to nearest and clipped."""
    return ((x + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
