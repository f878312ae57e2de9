"""Pictures to be measured: a folder, a .zip, an .npz or an .npy, in one fixed order.

A source knows the names of its pictures and streams them one by one, so memory does not grow with
their number. Files are ordered by name (the whole path inside the folder or archive, "/" between
parts), arrays by position. Decompression is bounded: by Pillow's limit on pixels, and by MOST_BYTES
for each picture of an archive.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

import numpy as np

from fewstep.data.images import Unreadable, bounded_open, decode, fit_picture

__all__ = [
    "MOST_BYTES",
    "Entry",
    "Images",
    "array_images",
    "open_images",
    "picture_shape",
]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
ARRAYS = ("arr_0", "images")  # names that guided-diffusion and others give to pictures in an .npz
SHEET = "sheet.png"
MOST_BYTES = 1 << 28  # of one member of an archive, unpacked

Read = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Entry:
    """One picture: its name, and a function that reads it as uint8 [h, w, c], c = 1 or 3, or raises
    Unreadable."""

    name: str
    read: Read


class Images(Protocol):
    """Where pictures come from.

    name: as the user gave it
    names: of the pictures, in order
    left_out: files that are there and are no pictures of the set: contact sheets
    digest: of everything that a change of the pictures would change, without reading them
    """

    @property
    def name(self) -> str: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def left_out(self) -> tuple[str, ...]: ...
    @property
    def digest(self) -> str: ...
    def stream(self, start: int = 0) -> Iterator[Entry]:
        """From picture `start` on, in order; each is read before the next is asked for."""
        ...


def open_images(path: Path | str, fit: int | None = None) -> Images:
    """A folder (with folders in it), a .zip, an .npz with uint8 [n, h, w, c] under `arr_0` or
    `images`, or an .npy.

    fit: cut the middle square out of every picture and resize it to so many pixels, by Pillow's
        bicubic: for photographs of all sizes
    Errors: OSError where it is not there; ValueError where it has no pictures.
    """
    path = Path(path)
    if fit is not None and fit < 1:
        raise ValueError(f"fit must be a size in pixels, got {fit}")
    if path.is_dir():
        found: Images = _folder(path)
    elif not path.exists():
        raise FileNotFoundError(2, "not there", str(path))
    elif path.suffix == ".npy":
        found = _npy(path)
    elif path.suffix == ".npz":
        found = _npz(path)
    elif zipfile.is_zipfile(path):
        found = _zip(path)
    else:
        raise ValueError(f"{path} is not a folder, .zip, .npz or .npy of pictures")
    if not found.names:
        raise ValueError(f"{path} has no pictures ({', '.join(SUFFIXES)})")
    return found if fit is None else Fitted(found, fit)


@dataclass(frozen=True, eq=False)
class Files:
    """Picture files of a folder or an archive.

    opened: a context that gives a function from a name to the file's bytes
    """

    name: str
    names: tuple[str, ...]
    left_out: tuple[str, ...]
    digest: str
    opened: Callable[[], contextlib.AbstractContextManager[Callable[[str], bytes]]]

    def stream(self, start: int = 0) -> Iterator[Entry]:
        with self.opened() as bytes_of:
            for name in self.names[start:]:
                yield Entry(name, partial(_read_entry, self.name, name, bytes_of))


@dataclass(frozen=True, eq=False)
class Array:
    """Pictures of one uint8 array on disk, read one by one.

    opened: a context that gives a function from the first index to the pictures' bytes in order
    shape: [n, h, w, c]
    """

    name: str
    shape: tuple[int, ...]
    digest: str
    opened: Callable[[int], contextlib.AbstractContextManager[Callable[[int], bytes]]]
    left_out: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.shape[0])))

    def stream(self, start: int = 0) -> Iterator[Entry]:
        with self.opened(start) as take:
            for i in range(start, self.shape[0]):
                data = take(math.prod(self.shape[1:]))
                yield Entry(str(i), partial(self._decode, i, data))

    def _decode(self, i: int, data: bytes) -> np.ndarray:
        if len(data) != math.prod(self.shape[1:]):
            raise Unreadable(f"picture {i} of {self.name} is cut short; fetch the file again")
        return np.frombuffer(data, np.uint8).reshape(self.shape[1:])


@dataclass(frozen=True, eq=False)
class InMemory:
    """Pictures of an array in memory."""

    name: str
    images: np.ndarray
    left_out: tuple[str, ...] = ()
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(map(str, range(len(self.images)))))

    @property
    def digest(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.images).tobytes()).hexdigest()

    def stream(self, start: int = 0) -> Iterator[Entry]:
        for i in range(start, len(self.images)):
            yield Entry(str(i), partial(self.images.__getitem__, i))


@dataclass(frozen=True, eq=False)
class Fitted:
    """The middle square of each picture, resized to size x size."""

    inner: Images
    size: int

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def names(self) -> tuple[str, ...]:
        return self.inner.names

    @property
    def left_out(self) -> tuple[str, ...]:
        return self.inner.left_out

    @property
    def digest(self) -> str:
        return _digest(["fit", self.size, self.inner.digest])

    def stream(self, start: int = 0) -> Iterator[Entry]:
        for entry in self.inner.stream(start):
            yield Entry(entry.name, partial(self._fit, entry.read))

    def _fit(self, read: Read) -> np.ndarray:
        return fit_picture(read(), self.size, self.size)


def picture_shape(images: Images) -> tuple[int, int, int] | None:
    """(h, w, c) of the first picture, None where that cannot be read."""
    try:
        height, width, channels = next(images.stream()).read().shape
    except Unreadable:
        return None
    return height, width, channels


def array_images(images: np.ndarray, name: str = "array") -> Images:
    """A source of pictures in memory, uint8 [n, h, w, c] with c = 1 or 3, or [n, h, w]."""
    shape = _picture_shape(images.shape, images.dtype, name)
    return InMemory(name, images.reshape(shape))


def _folder(path: Path) -> Files:
    inside, left_out, facts = [], [], []
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        where = Path(folder).relative_to(path)
        inside += [(where / name).as_posix() for name in files if _is_picture(name)]
    names = []
    for name in sorted(inside):
        if _is_sheet(name, lambda name=name: (path / name).read_bytes()):
            left_out.append(name)
            continue
        names.append(name)
        stat = (path / name).stat()
        facts.append([name, stat.st_size, stat.st_mtime_ns])

    @contextlib.contextmanager
    def opened() -> Iterator[Callable[[str], bytes]]:
        yield lambda name: (path / name).read_bytes()

    return Files(str(path), tuple(names), tuple(left_out), _digest(facts), opened)


def _zip(path: Path) -> Files:
    @contextlib.contextmanager
    def opened() -> Iterator[Callable[[str], bytes]]:
        with zipfile.ZipFile(path) as archive:
            yield partial(_member, archive)

    try:
        with zipfile.ZipFile(path) as archive:
            members = {
                info.filename: [info.filename, info.file_size, info.CRC]
                for info in archive.infolist()
                if not info.is_dir() and _is_picture(info.filename)
            }
            inside = sorted(members)
            left_out = tuple(n for n in inside if _is_sheet(n, partial(_member, archive, n)))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a whole .zip ({error}); fetch it again") from None
    names = tuple(name for name in inside if name not in set(left_out))
    return Files(str(path), names, left_out, _digest([members[n] for n in names]), opened)


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    size = archive.getinfo(name).file_size
    if size > MOST_BYTES:
        raise Unreadable(f"it unpacks to {size} bytes, more than {MOST_BYTES}")
    try:
        with archive.open(name) as file:
            data = file.read(size + 1)  # no more than it says it has
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise Unreadable(str(error)) from None
    if len(data) != size:
        raise Unreadable(f"it unpacks to another size than the {size} bytes that it states")
    return data


def _npz(path: Path) -> Array:
    @contextlib.contextmanager
    def opened(start: int) -> Iterator[Callable[[int], bytes]]:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            shape = _array_header(file, str(path))
            file.seek(file.tell() + start * math.prod(shape[1:]))

            def take(size: int) -> bytes:
                try:
                    return file.read(size)
                except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                    raise ValueError(
                        f"{path} cannot be unpacked ({error}); fetch it again"
                    ) from None

            yield take

    try:
        with zipfile.ZipFile(path) as archive:
            inside = [name.removesuffix(".npy") for name in archive.namelist()]
            chosen = [name for name in ARRAYS if name in inside][:1]
            if not chosen:
                raise ValueError(
                    f"{path} has no pictures under {' or '.join(ARRAYS)}; it has "
                    f"{', '.join(inside) or 'nothing'}"
                )
            member = f"{chosen[0]}.npy"
            info = archive.getinfo(member)
            with archive.open(member) as file:
                shape = _array_header(file, str(path))
                _check_length(file.tell() + math.prod(shape), info.file_size, str(path))
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is not a whole .npz ({error}); fetch it again") from None
    return Array(str(path), shape, _digest([shape, info.file_size, info.CRC]), opened)


def _npy(path: Path) -> Array:
    @contextlib.contextmanager
    def opened(start: int) -> Iterator[Callable[[int], bytes]]:
        with open(path, "rb") as file:
            shape = _array_header(file, str(path))
            file.seek(start * math.prod(shape[1:]), os.SEEK_CUR)
            yield file.read

    with open(path, "rb") as file:
        shape = _array_header(file, str(path))
        stat = path.stat()
        _check_length(file.tell() + math.prod(shape), stat.st_size, str(path))
    return Array(str(path), shape, _digest([shape, stat.st_size, stat.st_mtime_ns]), opened)


def _array_header(file: IO[bytes], name: str) -> tuple[int, ...]:
    """[n, h, w, c] from the head of an .npy; the file is left at its first byte of pixels."""
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(file)
    except (ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{name} is not a whole array ({error}); fetch it again") from None
    if fortran:
        raise ValueError(f"{name} is in Fortran order; save it with numpy.ascontiguousarray")
    return _picture_shape(shape, dtype, name)


def _check_length(needed: int, size: int, name: str) -> None:
    if needed > size:
        raise ValueError(f"{name} is cut short: it should have {needed} bytes and has {size}")


def _picture_shape(shape: tuple[int, ...], dtype: Any, name: str) -> tuple[int, ...]:
    if len(shape) == 3:
        shape = (*shape, 1)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
        raise ValueError(
            f"{name} must hold pictures uint8 [n, h, w, 1 or 3] in [0, 255], "
            f"got {dtype} of shape {tuple(shape)}"
        )
    if math.prod(shape[1:]) > MOST_BYTES:
        raise ValueError(f"{name} has pictures of {math.prod(shape[1:])} bytes, over {MOST_BYTES}")
    return tuple(int(n) for n in shape)


def _is_picture(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


def _is_sheet(name: str, read: Callable[[], bytes]) -> bool:
    """Whether it is the contact sheet of a fewstep folder: its metadata has the seeds of many."""
    if PurePosixPath(name).name != SHEET:
        return False
    try:
        with bounded_open(read()) as picture:
            return "seeds" in json.loads(picture.info.get("fewstep", "{}"))
    except (Unreadable, ValueError, TypeError):
        return False


def _read_entry(source: str, name: str, bytes_of: Callable[[str], bytes]) -> np.ndarray:
    try:
        return decode(bytes_of(name))
    except Unreadable as error:
        raise Unreadable(f"{source}: {name} cannot be read ({error})") from None
    except ValueError as error:
        raise ValueError(f"{source}: {name} {error}") from None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
