"""The stored sample of Fashion-MNIST as the four idx files of its makers."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

__all__ = ["write_clothes"]

SAMPLE = Path(__file__).parents[1] / "data" / "fashion-256.npz"


def write_idx(path: Path, array: np.ndarray) -> None:
    head = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
    path.write_bytes(head + array.astype(np.uint8).tobytes())


def write_clothes(folder: Path) -> Path:
    """Both splits are the same 256 pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    with np.load(SAMPLE, allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    for split in ("train", "t10k"):
        write_idx(folder / f"{split}-images-idx3-ubyte", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte", labels)
    return folder
