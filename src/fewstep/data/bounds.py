"""What a file may ask for. Sizes that it declares are checked against its own length, a bound and
the free memory before anything is allocated."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fewstep.text import clean

__all__ = [
    "MOST_BYTES",
    "check_room",
    "check_unpacked",
    "free_memory",
    "read_bytes",
    "reason",
]

MOST_BYTES = 1 << 28  # of one picture or text
MOST_RATIO = 200  # unpacked to packed; pictures reach 10, labels 100
SMALL = 1 << 26  # bytes; less may unpack from however few
MEMORY = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def read_bytes(path: Path | str, most: int = MOST_BYTES) -> bytes:
    """The bytes of a file, which may be a pipe.

    Raises:
        ValueError: it has more than `most` bytes.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        facts = os.fstat(file.fileno())
        if stat.S_ISREG(facts.st_mode) and facts.st_size > most:
            raise ValueError(f"{clean(path)} has {facts.st_size} bytes, more than {most}")
        parts, size = [], 0
        while size <= most and (part := file.read(min(1 << 22, most + 1 - size))):
            parts.append(part)
            size += len(part)
    if size > most:
        raise ValueError(f"{clean(path)} has more than {most} bytes")
    return b"".join(parts)


def reason(error: BaseException) -> str:
    """What an error says, on one line of at most 200 characters."""
    return clean(" ".join(str(error).split()), 200) or type(error).__name__


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control group."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for most, used in MEMORY:
        if (limit := _text(most).strip()).isdecimal() and (now := _text(used).strip()).isdecimal():
            free = min(free, int(limit) - int(now))
    return max(free, 0)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def check_room(size: int, what: str) -> None:
    """Raises ValueError where `size` bytes are more than nine tenths of the free memory."""
    if size > SMALL and size > 0.9 * (free := free_memory()):
        raise ValueError(f"{what} needs {size} bytes of memory, and {free} are free")


def check_unpacked(size: int, packed: int, what: str) -> None:
    """Raises ValueError where `size` bytes are far more than `packed` bytes can honestly hold."""
    if size > SMALL and size > MOST_RATIO * packed:
        raise ValueError(
            f"{what} unpacks from {packed} to {size} bytes, more than {MOST_RATIO} times as many"
        )
