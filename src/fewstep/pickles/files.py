"""Files of pickles and of torch.save, in whichever form: what is in them, without its numbers.

    pickle      one program, as NVlabs write it; storages nested in it as old files of torch.save
    zip         torch.save since 1.6: the program, and beside it a stored file for each storage
    old         torch.save before: five programs, then the storages one after another

Source: torch.serialization and torch.storage of PyTorch 2, read for the layout alone.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from fewstep.pickles.machine import Budget, Machine, Stream
from fewstep.pickles.meanings import STORAGES, Meanings
from fewstep.pickles.records import DTYPES, Bytes, Name, Record, Storage
from fewstep.pickles.zips import Zip, read_zip
from fewstep.records import shown
from fewstep.text import clean

__all__ = ["Pickled", "is_pickle", "read"]

MOST_BYTES = 1 << 38  # of a file
LEAST_MEMORY = 6 * 2**20  # bytes of records that a small file may have
MOST_DEPTH = 200
MAGIC = 0x1950A86A20F9469CFC6C  # begins an old file of torch.save
VERSION = 1001  # of its protocol
FETCH = "fetch it again"


@dataclass(frozen=True, eq=False)
class Pickled:
    """What a file holds.

    form: pickle, zip or old
    root: plain values, and the records of `fewstep.pickles.records`
    names: the globals that it names
    nbytes: of the file
    """

    path: Path
    form: str
    root: Any
    names: frozenset[Name] = field(repr=False)
    nbytes: int


def is_pickle(start: bytes) -> bool:
    """Whether a file that begins so is one of these, as far as four bytes tell."""
    return start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"


def read(path: Path | str) -> Pickled:
    """Read a file without running anything in it, and without reading its numbers.

    Args:
        path: of a pickle, or of a file of torch.save

    Raises:
        OSError: where the file cannot be read.
        ValueError: that names the file, and the global or the opcode that is no data; or says how
            it is damaged, or that it asks for more memory than its size explains.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise ValueError("it is no regular file")
            if facts.st_size > MOST_BYTES:
                raise ValueError(f"it has {facts.st_size} bytes, more than {MOST_BYTES}")
            start = file.read(4)
            if not is_pickle(start):
                raise ValueError("it is neither a pickle nor a file of torch.save")
            budget = Budget(max(LEAST_MEMORY, facts.st_size // 2))
            reader = _Reader(file, facts.st_size, budget)
            form, root = reader.zipped() if start[:2] == b"PK" else reader.plain()
            _check_depth(root)
            return Pickled(path, form, root, frozenset(reader.names), facts.st_size)
    except ValueError as error:
        raise ValueError(f"{clean(path)} cannot be read ({clean(error, 300)}); {FETCH}") from None


class _Reader:
    """One file that is being read."""

    def __init__(self, file: BinaryIO, size: int, budget: Budget) -> None:
        self.file, self.size, self.budget = file, size, budget
        self.storages: dict[str, Storage] = {}
        self.names: set[Name] = set()

    def stream(self, start: int, end: int) -> Stream:
        return Stream(self.file, start, end, self.budget)

    def plain(self) -> tuple[str, Any]:
        """A bare pickle, or an old file of torch.save."""
        stream = self.stream(0, self.size)
        meanings = Meanings(lambda place: self.nested(place, stream))
        value = Machine(stream, meanings).load()
        if value == MAGIC and type(value) is int:
            return "old", self.old(self.stream(0, self.size))
        self.names |= meanings.names
        return "pickle", value

    def nested(self, place: Bytes, outer: Stream) -> Storage:
        """The storage in bytes that are an old file of torch.save."""
        stream = Stream(self.file, place.start, place.start + place.length, self.budget)
        left = self.budget.memory - 300
        value = _Reader(self.file, self.size, self.budget).old(stream)
        outer.seek(outer.at)
        self.budget.memory = left  # nothing else of it stays
        if not isinstance(value, Storage):
            raise ValueError("bytes in it that should be a storage are none")
        return value

    def old(self, stream: Stream) -> Any:
        """magic, version, system, value and the keys of the storages; then the storages."""
        meanings = Meanings()
        machine = Machine(stream, meanings, self.persistent)
        if machine.load() != MAGIC or machine.load() != VERSION:
            raise ValueError("it is an old file of torch.save of a version that is not known")
        system = machine.load()
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ValueError("it was written on a big-endian machine")
        value, keys = machine.load(), machine.load()
        if not isinstance(keys, list) or set(map(type, keys)) - {str, int}:
            raise ValueError("it lacks the list of its storages")
        for key in keys:
            if (storage := self.storages.get(str(key))) is None or storage.start >= 0:
                raise ValueError(f"it has a storage {shown(key)} that belongs to nothing")
            count = int.from_bytes(stream.read(8), "little")
            # an untyped storage counts bytes here, a typed one its elements
            if count != storage.count:
                raise ValueError(f"a storage has {count} elements and declares {storage.count}")
            storage.start = stream.leave(count * storage.size).start
        if left := [key for key, storage in self.storages.items() if storage.start < 0]:
            raise ValueError(f"it lacks the storage {shown(left[0])}")
        self.names |= meanings.names
        return value

    def zipped(self) -> tuple[str, Any]:
        archive = read_zip(self.file, self.size, self.budget.memory)
        part = archive.find("data.pkl")
        order = archive.parts.get(f"{archive.root}byteorder")
        if order is not None and self.bytes_of(archive, "byteorder", 16) != b"little":
            raise ValueError("it was written on a big-endian machine")
        start, length = archive.place(self.file, part)
        stream = self.stream(start, start + length)
        meanings = Meanings()

        def persistent(identity: Any) -> Any:
            value = self.persistent(identity)
            if isinstance(value, Storage) and value.start < 0:
                place, size = archive.place(self.file, f"{archive.root}data/{identity[2]}")
                if size < value.count * value.size:
                    raise ValueError(f"a storage has {size} bytes and declares {value.count}")
                value.start = place
                stream.seek(stream.at)
            return value

        value = Machine(stream, meanings, persistent).load()
        self.names |= meanings.names
        return "zip", value

    def bytes_of(self, archive: Zip, name: str, most: int) -> bytes:
        start, length = archive.place(self.file, archive.root + name)
        self.file.seek(start)
        return self.file.read(min(length, most))

    def persistent(self, identity: Any) -> Any:
        """The storage of ('storage', type, key, device, elements) and, in old files, a view."""
        if not isinstance(identity, tuple) or len(identity) not in (4, 5, 6):
            raise ValueError("it has a persistent identifier that is no storage")
        if identity[0] == "module" and isinstance(identity[1], Name):
            return identity[1]  # a class with its source, which is not kept
        if len(identity) < 5:
            raise ValueError("it has a persistent identifier that is no storage")
        what, kind, key, _, count, *view = identity
        if what != "storage" or not isinstance(kind, Name) or not isinstance(key, str | int):
            raise ValueError("it has a persistent identifier that is no storage")
        if str(kind) not in STORAGES:
            raise ValueError(f"it has a storage of the type {shown(str(kind))}")
        if type(count) is not int or not 0 <= count * DTYPES[kind.name][1] <= self.size:
            raise ValueError(f"it declares a storage of {shown(count)} elements")
        if view and view[0] is not None:
            raise ValueError("it has a view of a storage, of before torch 0.4")
        found = self.storages.setdefault(str(key), Storage(*DTYPES[kind.name], count))
        if (found.dtype, found.count) != (DTYPES[kind.name][0], count):
            raise ValueError(f"it declares the storage {shown(key)} twice")
        return found


def _check_depth(root: Any) -> None:
    """Errors: ValueError for values nested deeper than any model is. Records that stand in several
    places are looked at once, so circles end."""
    seen: set[int] = set()
    level, depth = [root], 0
    while level:
        if depth > MOST_DEPTH:
            raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict | list | tuple | Record):
                if id(value) in seen:
                    continue
                seen.add(id(value))
                if isinstance(value, Record):
                    inner += [*value.args, value.state, *value.items.values(), *value.entries]
                else:
                    inner += value.values() if isinstance(value, dict) else value
        level, depth = inner, depth + 1
