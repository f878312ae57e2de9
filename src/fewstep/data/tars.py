"""Members of tar files, as bytes: nothing is unpacked to disk, and no name becomes a path."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fewstep.data.archives import whole
from fewstep.data.bounds import MOST_BYTES
from fewstep.text import clean

__all__ = ["Member", "tar_members"]


@dataclass(frozen=True)
class Member:
    """A file in a tar.

    tar: where; start, size: of its bytes there
    stamp: of the tar, which changes when it is written again
    """

    name: str
    tar: Path
    start: int
    size: int
    stamp: int

    def read(self) -> bytes:
        """Raises OSError where the tar is shorter now."""
        with open(self.tar, "rb") as file:
            file.seek(self.start)
            data = file.read(self.size)
        if len(data) != self.size:
            raise OSError(None, "cut short", str(self.tar))
        return data


def tar_members(path: Path) -> Iterator[Member]:
    """The files in a tar that is not compressed; links and devices are none.

    Raises:
        ValueError: that names the tar, where it is damaged or a member is too large.
    """
    stamp = path.stat().st_mtime_ns
    with whole(path, ".tar"), tarfile.open(path, "r:") as tar:
        for one in tar:
            if not one.isreg() or one.issparse():
                continue
            if one.size > MOST_BYTES:
                raise ValueError(f"{clean(path)} has a member of {one.size} bytes")
            yield Member(one.name, path, one.offset_data, one.size, stamp)
