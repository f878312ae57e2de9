"""The disk cache: results that are slow to make again, each known by all that it depends on.

A file is one float32 array. Its name is a hash of its key, so another model, label or solver never
meets it, and nothing of a key becomes part of a path. Each is written whole, so an interrupted run
goes on where it stopped. A file that cannot be read is made again. A cache that cannot be written
is done without, and says so once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fewstep.files import sweep, write_whole

__all__ = ["cache_folder", "recall"]

VERSION = 1  # rises when the same key stands for other numbers


def cache_folder() -> Path:
    """$FEWSTEP_CACHE, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FEWSTEP_CACHE") or Path(base) / "fewstep")


def recall(
    folder: Path,
    key: Mapping[str, Any],
    shape: Sequence[int],
    make: Callable[[], Tensor],
) -> Tensor:
    """An array from the cache, or made now and kept where it is finite.

    Args:
        folder: of this kind of results, inside `cache_folder()` as a rule.
        key: all that the array depends on, JSON-ready.
        shape: of the array; a file of another shape is not taken.
        make: makes the array; its result goes to float32 on the CPU.

    Returns:
        float32, on the CPU.
    """
    text = json.dumps({"version": VERSION, **key}, sort_keys=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    found = _read(path)
    if found is not None and found.shape == torch.Size(shape) and found.dtype == torch.float32:
        return found
    made = make().detach().to("cpu", torch.float32).contiguous()
    if torch.isfinite(made).all():
        try:
            write_whole(path, safetensors.torch.save({"values": made}))
            sweep(folder)
        except OSError as error:
            _warn(f"nothing is kept in {folder}: {error.strerror or error}")
    return made


def _read(path: Path) -> Tensor | None:
    """None where it is not there, or not whole."""
    try:
        return safetensors.torch.load_file(path)["values"]
    except (OSError, KeyError, SafetensorError):
        return None


@functools.cache
def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)
