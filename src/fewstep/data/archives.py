"""Archives and arrays on disk: .zip, .npz, .npy. Nothing is unpacked to disk, nothing is executed,
and nothing is allocated that the file cannot hold."""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from fewstep.data.bounds import MOST_BYTES, check_room, check_unpacked, reason
from fewstep.data.images import Unreadable
from fewstep.text import clean

__all__ = ["Header", "array_names", "member_bytes", "open_archive", "read_arrays", "read_header"]

MOST_ARRAYS = 1 << 33  # bytes that read_arrays takes into memory
PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others cannot be unpacked piece by piece
KINDS = "biufUS"  # of numbers and texts; objects would be pickles
PIECE = 1 << 20


@contextlib.contextmanager
def whole(path: Path | str, kind: str) -> Iterator[None]:
    """Around the reading of an archive: whatever its parser raises is one line that names the file.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read at all.
    """
    try:
        yield
    except Unreadable:
        raise
    except ValueError as error:
        if str(error).startswith(clean(path)):
            raise
        raise ValueError(f"{clean(path)} cannot be read as {kind}: {reason(error)}") from None
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds on damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise
        why = f"is not a whole {kind} ({reason(error)}); fetch it again"
        raise ValueError(f"{clean(path)} {why}") from None


@contextlib.contextmanager
def open_archive(path: Path | str, kind: str = ".zip") -> Iterator[zipfile.ZipFile]:
    """A .zip, or an .npz, which is one. Raises as `whole` does."""
    with whole(path, kind), zipfile.ZipFile(path) as archive:
        yield archive


def array_names(archive: zipfile.ZipFile) -> list[str]:
    """Names of the arrays in an .npz."""
    return [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]


def member_bytes(archive: zipfile.ZipFile, name: str) -> bytes:
    """One file of an archive. Raises Unreadable where it is damaged, encrypted or too large."""
    info = archive.getinfo(name)
    if info.file_size > MOST_BYTES:
        raise Unreadable(f"it unpacks to {info.file_size} bytes, more than {MOST_BYTES}")
    try:
        with open_member(archive, info) as file:
            data = file.read(info.file_size + 1)  # no more than it says it has
    except Exception as error:  # see `whole`
        raise Unreadable(reason(error)) from None
    if len(data) != info.file_size:
        raise Unreadable(f"it unpacks to another size than the {info.file_size} bytes it states")
    return data


def open_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    """Raises ValueError for a compression other than deflate, or a size that it cannot have."""
    if info.compress_type not in PACKED:
        raise ValueError("it is packed by another method than deflate; pack it again")
    if info.flag_bits & 1:
        raise ValueError("it is encrypted; unpack it with its password first")
    check_unpacked(info.file_size, info.compress_size, clean(info.filename))
    return archive.open(info)


@dataclass(frozen=True)
class Header:
    """What an .npy says of its array. start: of the numbers in the file; size: in bytes."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: IO[bytes], length: int) -> Header:
    """The head of an .npy of `length` bytes; the file is left at its first number.

    Raises:
        ValueError: it is no array of numbers or texts, or says that it is longer than it is.
    """
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"it is an array of format {version}, known are 1.0 and 2.0")
    shape, fortran, dtype = readers[version](file)
    found = Header(tuple(int(n) for n in shape), fortran, dtype, file.tell())
    if dtype.kind not in KINDS or dtype.hasobject:
        raise ValueError(f"it has no numbers but {clean(dtype)}")
    if min(found.shape, default=0) < 0 or max(found.shape, default=0) >= 2**62:
        raise ValueError(f"no array has the shape {clean(found.shape, 80)}")
    if found.start + found.size > length:
        raise ValueError(
            f"it is cut short: it should have {found.start + found.size} bytes and has {length}"
        )
    return found


def read_arrays(path: Path | str, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an .npz, or those of `names` that it has, in memory.

    In place of `numpy.load`: it reads no objects, and takes no more memory than the file can hold.

    Raises:
        ValueError: it is damaged, or its arrays are too large.
        OSError: it cannot be read.
    """
    with open_archive(path, ".npz") as archive:
        chosen = [name for name in array_names(archive) if names is None or name in names]
        total = sum(archive.getinfo(f"{name}.npy").file_size for name in chosen)
        if total > MOST_ARRAYS:
            raise ValueError(f"its arrays have {total} bytes, more than {MOST_ARRAYS}")
        check_room(total, "it")
        return {name: _read_array(archive, f"{name}.npy") for name in chosen}


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    info = archive.getinfo(name)
    with open_member(archive, info) as file:
        header = read_header(file, info.file_size)
        flat = np.empty(math.prod(header.shape), header.dtype)
        view = flat.view(np.uint8).data if flat.size else memoryview(b"")
        place = 0
        while place < len(view):
            got = file.readinto(view[place : place + PIECE])  # type: ignore[attr-defined]
            if not got:
                raise EOFError("it is cut short")
            place += got
    return flat.reshape(header.shape, order="F" if header.fortran else "C")
