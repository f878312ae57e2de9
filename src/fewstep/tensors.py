"""Safetensors files, whose header is checked before anything is allocated.

A file is 8 bytes with the length of its header, the header as JSON, and the data. What the header
declares must be there: names once, shapes that fill their part of the data, parts in the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from fewstep.data.bounds import check_room
from fewstep.files import write_whole
from fewstep.records import LARGEST, parse, shown

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Entry", "load_tensors", "read_header", "read_metadata", "write_tensors"]

BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2}
BYTES |= {"I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8}
DTYPES = {"F32": "float32", "F16": "float16"}  # that files are written in
FETCH = "fetch it again"  # what to do about a file that cannot be read


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return BYTES[self.dtype] * math.prod(self.shape)


def read_header(path: Path | str, advice: str = FETCH) -> dict[str, Entry]:
    """The tensors of a file by name.

    Raises:
        OSError: where the file cannot be read.
        ValueError: that names the file, where it is cut short or declares what it does not hold.
    """
    return _read(path, advice)[0]


def read_metadata(path: Path | str, advice: str = FETCH) -> dict[str, str]:
    """The texts that a file holds beside its tensors. Raises: as `read_header`."""
    return _read(path, advice)[1]


def load_tensors(path: Path | str, advice: str = FETCH) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU, in the dtypes of the file.

    Raises:
        OSError: where the file cannot be read.
        ValueError: as `read_header`, and where the tensors do not fit into free memory.
    """
    import safetensors.torch

    check_room(sum(entry.nbytes for entry in read_header(path, advice).values()), str(path))
    try:
        # in memory of their own: a mapped file may start anywhere, which moves the last bits of
        # sums, and it may be written again
        return {name: t.clone() for name, t in safetensors.torch.load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); {advice}") from None


def write_tensors(
    path: Path | str,
    layout: Mapping[str, Entry],
    values: Callable[[], Iterable[tuple[str, Tensor]]],
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a file one tensor at a time, whole or not at all.

    Args:
        path: of the file
        layout: dtype and shape of each tensor
        values: gives the tensors in the order of the layout; each is cast to its dtype
        texts: what stands beside the tensors, in that order, so that equal files are equal bytes

    Raises:
        OSError: where the file cannot be written.
        ValueError: where a value is not finite in the dtype that it is written in.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": dict(texts)} if texts else {}
    at = 0
    for name, entry in layout.items():
        end = at + entry.nbytes
        shape = list(entry.shape)
        header[name] = {"dtype": entry.dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[bytes]:
        yield len(text).to_bytes(8, "little") + text
        for name, value in values():
            cast = value.detach().cpu().to(getattr(torch, DTYPES[layout[name].dtype])).contiguous()
            if not torch.isfinite(cast).all():
                raise ValueError(f"{name} has numbers that are not finite in {cast.dtype}")
            yield cast.reshape(-1).view(torch.uint8).numpy().data  # type: ignore[misc]

    write_whole(path, parts)


def _read(path: Path | str, advice: str) -> tuple[dict[str, Entry], dict[str, str]]:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, LARGEST):
                raise ValueError(f"it has {size} bytes and declares a header of {length}")
            values = parse(file.read(length), "its header")
        if not isinstance(values, dict):
            raise ValueError("its header must be a table")
        texts = values.pop("__metadata__", {})
        if not isinstance(texts, dict) or not all(isinstance(t, str) for t in texts.values()):
            raise ValueError("its metadata must be a table of texts")
        room = size - 8 - length
        entries = {name: _entry(name, entry, room) for name, entry in values.items()}
        if (total := sum(entry.nbytes for entry in entries.values())) > room:
            raise ValueError(f"it declares {total} bytes of tensors and has {room}")
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); {advice}") from None
    return entries, texts


def _entry(name: str, values: Any, room: int) -> Entry:
    """One tensor.

    Raises:
        ValueError: it is not within the data, or its shape does not fill its part.
    """
    fields = values if isinstance(values, dict) else {}
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    part: Any = fields.get("data_offsets")
    whole = isinstance(shape, list) and isinstance(part, list) and isinstance(dtype, str)
    numbers = [*shape, *part] if whole else [None]
    if dtype not in BYTES or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"the tensor {shown(name)} is declared as {shown(values)}")
    begin, end = part if len(part) == 2 else (0, -1)
    entry = Entry(dtype, tuple(shape))
    if not begin <= end <= room or entry.nbytes != end - begin:
        raise ValueError(
            f"the tensor {shown(name)} of shape {shown(shape)} does not fit its part {part}"
        )
    return entry
