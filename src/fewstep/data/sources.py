"""Pictures of a folder, its tars, a .zip, an .npz or an .npy, in the order that all work reads.

A source knows the names of its pictures and streams them one by one, so memory does not grow with
their number. Files are ordered by name (the path inside the folder or archive), arrays by position.
What a source is, is told by its content. Files that are not pictures are left out and counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol, overload

import numpy as np

from fewstep.data.archives import (
    Header,
    array_names,
    member_bytes,
    open_archive,
    open_member,
    read_header,
    whole,
)
from fewstep.data.bounds import MOST_BYTES, read_bytes
from fewstep.data.images import SUFFIXES, Picture, Unreadable, decode, fit_picture, metadata_in
from fewstep.data.tars import tar_members
from fewstep.text import clean

__all__ = [
    "ARRAYS",
    "Entry",
    "Images",
    "array_images",
    "open_images",
    "Positions",
    "picture_shape",
    "told",
]

ARRAYS = ("arr_0", "images")  # names that guided-diffusion and others give to pictures in an .npz
SHEET = "sheet.png"
HEADS = {b"\x93NUMPY": "npy", b"PK\x03\x04": "zip", b"PK\x05\x06": "zip"}  # as a file begins
ENDS = {".npy": "npy", ".npz": "zip", ".zip": "zip"}  # for the message where it begins otherwise

Read = Callable[[], Picture]
BytesOf = Callable[[str], bytes]


@dataclass(frozen=True)
class Entry:
    """One picture: its name, and a function that reads it, or raises Unreadable."""

    name: str
    picture: Read

    def read(self) -> np.ndarray:
        """uint8 [h, w, c], c = 1 or 3."""
        return self.picture().pixels


class Images(Protocol):
    """Where pictures come from.

    name: as the user gave it
    names: of the pictures, in order
    left_out: how many files of each kind are there and are no pictures of the set
    digest: of everything that a change of the pictures would change, without reading them
    """

    @property
    def name(self) -> str: ...
    @property
    def names(self) -> Sequence[str]: ...
    @property
    def left_out(self) -> Mapping[str, int]: ...
    @property
    def digest(self) -> str: ...
    def stream(self, start: int = 0) -> Iterator[Entry]:
        """From picture `start` on, in order."""
        ...


def open_images(path: Path | str, fit: int | None = None, *, upright: bool = True) -> Images:
    """A folder (with folders in it, and links to folders), a .zip, an .npz with uint8 [n, h, w, c]
    under `arr_0` or `images`, or an .npy. Of a folder without pictures, those in its tars.

    Args:
        path: of the pictures
        fit: cut the middle square out of every picture and resize it to so many pixels, by Pillow's
            bicubic: for photographs of all sizes
        upright: turn pictures as their Exif data say; False: take them as they are stored

    Raises:
        ValueError: it has no pictures, or is not a whole file.
        OSError: it is not there.
    """
    path = Path(path)
    if fit is not None and fit < 1:
        raise ValueError(f"fit must be a size in pixels, got {fit}")
    if path.is_dir():
        found: Images = _folder(path, upright)
        if not found.names and found.left_out.get(".tar"):
            found = tar_images(path, upright)
    elif not path.exists():
        raise FileNotFoundError(2, "not there", str(path))
    else:
        found = _file(path, upright)
    if not len(found.names):
        others = f"; it has {_kinds(found)}" if found.left_out else ""
        raise ValueError(f"{clean(path)} has no pictures ({', '.join(SUFFIXES)}){others}")
    return found if fit is None else Fitted(found, fit)


def _file(path: Path, upright: bool) -> Images:
    kind = None
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(6)
        ours = (kind for head, kind in HEADS.items() if start.startswith(head))
        kind = next(ours, None) or ENDS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{clean(path)} is not a folder, .zip, .npz or .npy of pictures")
    if kind == "npy":
        return _npy(path)
    named = path.suffix.lower() if path.suffix.lower() in ENDS else ".zip"
    with open_archive(path, named) as archive:
        inside = array_names(archive)
        member = next((f"{name}.npy" for name in ARRAYS if name in inside), None)
        if member is not None:
            return _npz(path, archive, member)
        if named == ".npz":
            raise ValueError(
                f"{clean(path)} has no pictures under {' or '.join(ARRAYS)}; it has "
                f"{clean(', '.join(inside), 200) or 'nothing'}"
            )
        return _zip(path, archive, upright)


@dataclass(frozen=True, eq=False)
class Files:
    """Picture files of a folder or an archive.

    opened: gives a function from a name to the file's bytes; what it holds open is closed with it
    """

    name: str
    names: tuple[str, ...]
    left_out: Mapping[str, int]
    digest: str
    opened: Callable[[], BytesOf]
    upright: bool = True

    def stream(self, start: int = 0) -> Iterator[Entry]:
        bytes_of = self.opened()
        for name in self.names[start:]:
            yield Entry(name, partial(self._decode, name, bytes_of))

    def _decode(self, name: str, bytes_of: BytesOf) -> Picture:
        where = f"{clean(self.name)}: {clean(name)}"
        try:
            return decode(bytes_of(name), self.upright)
        except Unreadable as error:
            raise Unreadable(f"{where} cannot be read ({error})") from None
        except ValueError as error:
            raise ValueError(f"{where} {error}") from None


class Positions(Sequence[str]):
    """The names of an array's pictures, "0" and so on: an array may have a million."""

    def __init__(self, count: int) -> None:
        self.length = count

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        chosen = range(self.length)[index]
        return tuple(map(str, chosen)) if isinstance(chosen, range) else str(chosen)


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
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def names(self) -> Positions:
        return Positions(self.shape[0])

    def stream(self, start: int = 0) -> Iterator[Entry]:
        with self.opened(start) as take:
            for i in range(start, self.shape[0]):
                data = take(math.prod(self.shape[1:]))
                yield Entry(str(i), partial(self._decode, i, data))

    def _decode(self, i: int, data: bytes) -> Picture:
        if len(data) != math.prod(self.shape[1:]):
            raise Unreadable(f"picture {i} of {self.name} is cut short; fetch the file again")
        return Picture(np.frombuffer(data, np.uint8).reshape(self.shape[1:]))


@dataclass(frozen=True, eq=False)
class InMemory:
    """Pictures of an array in memory."""

    name: str
    images: np.ndarray
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def names(self) -> Positions:
        return Positions(len(self.images))

    @property
    def digest(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.images).tobytes()).hexdigest()

    def stream(self, start: int = 0) -> Iterator[Entry]:
        for i in range(start, len(self.images)):
            yield Entry(str(i), partial(Picture, self.images[i]))


@dataclass(frozen=True, eq=False)
class Fitted:
    """The middle square of each picture, resized to size x size."""

    inner: Images
    size: int

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def names(self) -> Sequence[str]:
        return self.inner.names

    @property
    def left_out(self) -> Mapping[str, int]:
        return self.inner.left_out

    @property
    def digest(self) -> str:
        return _digest(["fit", self.size, self.inner.digest])

    def stream(self, start: int = 0) -> Iterator[Entry]:
        for entry in self.inner.stream(start):
            yield Entry(entry.name, partial(self._fit, entry.picture))

    def _fit(self, read: Read) -> Picture:
        found = read()
        return found._replace(pixels=fit_picture(found.pixels, self.size, self.size))


def picture_shape(images: Images) -> tuple[int, int, int] | None:
    """(h, w, c) of the first picture, None where that cannot be read."""
    try:
        height, width, channels = next(images.stream()).read().shape
    except Unreadable:
        return None
    return height, width, channels


def told(images: Images, more: int = 0) -> list[str]:
    """What to say of files that are there and were not taken whole.

    Args:
        more: pictures that have further frames or pages
    """
    lines = []
    if images.left_out:
        what = f"left out of {clean(images.name)}, as no pictures of the set"
        lines.append(f"{what}: {_kinds(images)}")
    if more:
        lines.append(f"{more} pictures of {clean(images.name)} have more frames: first ones taken")
    return lines


def _kinds(images: Images) -> str:
    kinds = sorted(images.left_out.items())
    some = ", ".join(f"{count} {kind}" for kind, count in kinds[:20])
    return some + (f" and {len(kinds) - 20} more kinds" if len(kinds) > 20 else "")


def array_images(images: np.ndarray, name: str = "array") -> Images:
    """A source of pictures in memory, uint8 [n, h, w, c] with c = 1 or 3, or [n, h, w]."""
    shape = _picture_shape(images.shape, images.dtype, name)
    return InMemory(name, images.reshape(shape))


def _folder(path: Path, upright: bool) -> Files:
    found, left_out = _walk(path)
    names, facts = [], []
    for name in sorted(found):
        if _is_sheet(name, lambda name: read_bytes(path / name)):
            left_out["contact sheet"] += 1
            continue
        names.append(name)
        facts.append([name, found[name].st_size, found[name].st_mtime_ns])

    def bytes_of(name: str) -> bytes:
        try:
            return read_bytes(path / name)
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from None

    return Files(
        str(path), tuple(names), left_out, _set_digest(facts, upright), lambda: bytes_of, upright
    )


def _walk(root: Path) -> tuple[dict[str, os.stat_result], Counter[str]]:
    """The picture files under a folder, by name, and the number of others of each kind.

    Links are followed, after all real folders; each real folder is entered once, so a loop ends.
    """
    found: dict[str, os.stat_result] = {}
    left_out: Counter[str] = Counter()
    folders, links, seen = [""], [], set()
    while folders or links:
        inside = folders.pop() if folders else links.pop()
        facts = os.stat(root / inside)
        if (facts.st_dev, facts.st_ino) in seen:
            left_out["link to a folder that was read already"] += 1
            continue
        seen.add((facts.st_dev, facts.st_ino))
        for entry in sorted(os.scandir(root / inside), key=lambda one: one.name, reverse=True):
            name = f"{inside}/{entry.name}" if inside else entry.name
            try:
                facts = entry.stat()
            except OSError:  # of a link to nowhere, or to itself
                left_out["broken link"] += 1
                continue
            if stat.S_ISDIR(facts.st_mode):
                if not entry.name.startswith("."):
                    (links if entry.is_symlink() else folders).append(name)
            elif kind := _not_a_picture(name):
                left_out[kind] += 1
            elif not stat.S_ISREG(facts.st_mode):
                left_out["pipe or device"] += 1
            else:
                found[name] = facts
    return found, left_out


def _zip(path: Path, archive: zipfile.ZipFile, upright: bool) -> Files:
    members, left_out = {}, Counter[str]()
    for info in archive.infolist():
        if info.is_dir():
            continue
        if kind := _not_a_picture(info.filename):
            left_out[kind] += 1
        elif info.filename in members:
            left_out["second of one name"] += 1
        else:
            members[info.filename] = [info.filename, info.file_size, info.CRC]
    bytes_of = partial(member_bytes, archive)
    sheets = {name for name in members if _is_sheet(name, bytes_of)}
    if sheets:
        left_out["contact sheet"] += len(sheets)
    names = tuple(sorted(members.keys() - sheets))
    digest = _set_digest([members[name] for name in names], upright)

    def opened() -> BytesOf:
        with whole(path, ".zip"):
            return partial(member_bytes, zipfile.ZipFile(path))

    return Files(str(path), names, left_out, digest, opened, upright)


def tar_images(path: Path, upright: bool) -> Files:
    """The pictures in the tars of a folder, by their names inside."""
    found, left_out = {}, Counter[str]()
    for member in (one for tar in sorted(path.rglob("*.tar")) for one in tar_members(tar)):
        kind = _not_a_picture(member.name)
        if kind == ".json":  # what webdataset puts beside a picture
            continue
        if kind or member.name in found:
            left_out[kind or "second of one name"] += 1
        else:
            found[member.name] = member
    names = tuple(sorted(found))
    facts = [[name, found[name].size, found[name].stamp] for name in names]

    def bytes_of(name: str) -> bytes:
        try:
            return found[name].read()
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from None

    return Files(str(path), names, left_out, _set_digest(facts, upright), lambda: bytes_of, upright)


def _npz(path: Path, archive: zipfile.ZipFile, member: str) -> Array:
    info = archive.getinfo(member)
    with open_member(archive, info) as file:
        shape = _header(file, info.file_size, path)

    @contextlib.contextmanager
    def opened(start: int) -> Iterator[Callable[[int], bytes]]:
        with open_archive(path, ".npz") as archive, archive.open(member) as file:
            file.seek(read_header(file, info.file_size).start + start * math.prod(shape[1:]))

            def take(size: int) -> bytes:
                with whole(path, ".npz"):
                    return file.read(size)

            yield take

    return Array(str(path), shape, _digest([shape, info.file_size, info.CRC]), opened)


def _npy(path: Path) -> Array:
    facts = path.stat()
    with whole(path, ".npy"), open(path, "rb") as file:
        shape = _header(file, facts.st_size, path)
        start_of_all = file.tell()

    @contextlib.contextmanager
    def opened(start: int) -> Iterator[Callable[[int], bytes]]:
        with open(path, "rb") as file:
            file.seek(start_of_all + start * math.prod(shape[1:]))
            yield file.read

    return Array(str(path), shape, _digest([shape, facts.st_size, facts.st_mtime_ns]), opened)


def _header(file: IO[bytes], length: int, path: Path) -> tuple[int, ...]:
    """[n, h, w, c] from the head of an .npy."""
    found: Header = read_header(file, length)
    if found.fortran:
        raise ValueError(f"{clean(path)} is in Fortran order; save it with numpy.ascontiguousarray")
    return _picture_shape(found.shape, found.dtype, clean(path))


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


def _not_a_picture(name: str) -> str:
    """What kind of file it is by its name, "" for a picture."""
    path = PurePosixPath(name)
    if any(part.startswith((".", "__MACOSX")) for part in path.parts):
        return "hidden"
    if path.suffix.lower() in SUFFIXES:
        return ""
    return clean(path.suffix.lower(), 20) or "without suffix"


def _is_sheet(name: str, bytes_of: BytesOf) -> bool:
    """Whether it is the contact sheet of a fewstep folder: its metadata has the seeds of many."""
    if PurePosixPath(name).name != SHEET:
        return False
    try:
        return "seeds" in (metadata_in(io.BytesIO(bytes_of(name))) or {})
    except (ValueError, OSError):
        return False


def _set_digest(facts: Any, upright: bool) -> str:
    return _digest(facts if upright else ["as stored", facts])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
