"""The list of what is in a zip, for zips of torch.save: nothing is unpacked.

Parts have to be stored, not compressed, so that no part is larger than its file. The list at the
end of a zip is read under a bound, and each part is held to the file's length.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import BinaryIO

from fewstep.records import shown

__all__ = ["Zip", "read_zip"]

TAIL = 22 + 65_535  # bytes at the end in which the end record lies
END, END64, LOCATOR, ENTRY, LOCAL = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2", b"PK\3\4"
NONE = 0xFFFFFFFF
MOST_PARTS = 200_000


@dataclass(frozen=True)
class Zip:
    """The parts of a zip: where the header of each is, its bytes, whether it is stored.

    root: what stands before every name, "name/"
    """

    size: int
    parts: dict[str, tuple[int, int, bool]] = field(repr=False)
    root: str = ""

    def find(self, name: str) -> str:
        """The full name of a part. Errors: ValueError where there is none."""
        if self.root + name not in self.parts:
            some = ", ".join(shown(part) for part in list(self.parts)[:3])
            raise ValueError(f"it is a zip without weights of torch.save: {some}")
        return self.root + name

    def place(self, file: BinaryIO, name: str) -> tuple[int, int]:
        """Where the bytes of a part start, and how many they are."""
        if name not in self.parts:
            raise ValueError(f"it lacks its part {shown(name)}")
        at, length, stored = self.parts[name]
        if not stored:
            raise ValueError(f"its part {shown(name)} is compressed, as torch.save never does")
        file.seek(at)
        head = file.read(30)
        if len(head) < 30 or head[:4] != LOCAL:
            raise ValueError(f"its part {shown(name)} is damaged")
        begin = at + 30 + sum(struct.unpack("<HH", head[26:30]))
        if begin + length > self.size:
            raise ValueError(f"its part {shown(name)} is cut short")
        return begin, length


def read_zip(file: BinaryIO, size: int, budget: int) -> Zip:
    """The parts of a zip.

    Args:
        file: open for reading
        size: of the file in bytes
        budget: bytes that the list may take

    Raises:
        ValueError: where it is damaged, or its list is too long.
    """
    file.seek(max(0, size - TAIL))
    tail = file.read(TAIL)
    at = tail.rfind(END)
    if at < 0 or len(tail) - at < 22:
        raise ValueError("it is a zip that is cut short")
    count, length, start = struct.unpack("<HLL", tail[at + 10 : at + 20])
    if tail[at - 20 : at - 16] == LOCATOR and at >= 20:
        file.seek(min(struct.unpack("<Q", tail[at - 12 : at - 4])[0], size))
        record = file.read(56)
        if len(record) < 56 or record[:4] != END64:
            raise ValueError("it is a zip whose end is damaged")
        count, length, start = struct.unpack("<QQQ", record[32:56])
    if count > MOST_PARTS or length > budget or start + length > size:
        raise ValueError(f"it is a zip with a list of {count} parts and {length} bytes")
    file.seek(start)
    listing = file.read(length)
    parts: dict[str, tuple[int, int, bool]] = {}
    place = 0
    for _ in range(count):
        head = listing[place : place + 46]
        if len(head) < 46 or head[:4] != ENTRY:
            raise ValueError("it is a zip whose list is damaged")
        name, entry = _entry(listing, place, head)
        budget -= 300 + 2 * len(name)
        if budget < 0 or name in parts or (entry[2] and entry[0] + entry[1] > size):
            raise ValueError(f"it is a zip whose part {shown(name)} is not in it, or is twice")
        parts[name] = entry
        place += 46 + sum(struct.unpack("<HHH", head[28:34]))
    root = next((name[: -len("data.pkl")] for name in parts if _is_program(name)), "")
    return Zip(size, parts, root)


def _is_program(name: str) -> bool:
    return name.rpartition("/")[2] == "data.pkl" and name.count("/") <= 1


def _entry(listing: bytes, place: int, head: bytes) -> tuple[str, tuple[int, int, bool]]:
    """The name of an entry; (where its header is, bytes, whether it is stored)."""
    flags, method = struct.unpack("<HH", head[8:12])
    packed, length = struct.unpack("<LL", head[20:28])
    names, extras = struct.unpack("<HH", head[28:32])
    at = struct.unpack("<L", head[42:46])[0]
    name = listing[place + 46 : place + 46 + names].decode("utf-8", "replace")
    extra = listing[place + 46 + names : place + 46 + names + extras]
    if NONE in (packed, length, at):
        wide = _wide(extra)
        length = wide.pop(0) if length == NONE and wide else length
        packed = wide.pop(0) if packed == NONE and wide else packed
        at = wide.pop(0) if at == NONE and wide else at
    return name, (at, length, method == 0 and packed == length and not flags & 1)


def _wide(extra: bytes) -> list[int]:
    """The numbers of 64 bits of an entry."""
    while len(extra) >= 4:
        kind, length = struct.unpack("<HH", extra[:4])
        if kind == 1:
            whole = extra[4 : 4 + length // 8 * 8]
            return list(struct.unpack(f"<{len(whole) // 8}Q", whole))
        extra = extra[4 + length :]
    return []
