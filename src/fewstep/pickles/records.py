"""What the reader makes of a pickle: plain values, and records that can do nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

__all__ = ["DTYPES", "Array", "Bytes", "Name", "Record", "Skipped", "Storage", "Tensor"]

# torch's storages: the dtype, and the bytes of one element
DTYPES: dict[str, tuple[str, int]] = {
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "DoubleStorage": ("float64", 8),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
    "ComplexFloatStorage": ("complex64", 8),
    "ComplexDoubleStorage": ("complex128", 16),
    "UntypedStorage": ("uint8", 1),
}


@dataclass(frozen=True, slots=True)
class Name:
    """A class or a function that a pickle names. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Record:
    """What an object of a foreign class would hold.

    kind: the full name of its class, or the class's name alone for a persistent object of NVlabs
    persistent: whether it is one of those
    args: what its class would be called with
    state: what it would be given after that
    items, entries: as far as it is a mapping or a list
    """

    kind: str
    persistent: bool = False
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    entries: list[Any] = field(default_factory=list)

    def get(self, name: str) -> Any:
        """One value of its state, None where there is none."""
        return self.state.get(name) if isinstance(self.state, dict) else None


@dataclass(frozen=True, eq=False, slots=True)
class Bytes:
    """Bytes that were left in the file: where they start, and how many."""

    start: int
    length: int


@dataclass(frozen=True, eq=False, slots=True)
class Skipped:
    """Text too long for any setting, such as the source of a module; it was not read."""

    length: int


@dataclass(frozen=True, eq=False, slots=True)
class Array:
    """An array of numpy, of which only the kind is known."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(eq=False, slots=True)
class Storage:
    """The numbers of tensors, left in the file.

    dtype: torch's name of it; `size` is of one element in bytes
    count: elements
    start: where they begin in the file; -1 until that is known
    """

    dtype: str
    size: int
    count: int
    start: int = -1


@dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """A tensor whose numbers are still in the file. Where it was on a GPU, that is forgotten."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.storage.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.storage.size
