"""Where shards are kept: a folder, or a URL that fsspec knows (s3://, gs://, memory://).

Files are whole or not there. In a folder they are renamed into place; an object store shows an
object when all of it has arrived.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fewstep.data.bounds import read_bytes, reason
from fewstep.extras import needs
from fewstep.files import alike, open_folder, sweep, write_whole
from fewstep.text import clean

__all__ = ["Store", "is_url", "open_store"]

MOST = 1 << 33  # bytes of a file that is read at once
PART = 1 << 22  # bytes of a part of one
URL = re.compile(r"[a-z][a-z0-9+.-]*://\S")
FOLDERS = ("", "shards", "manifest")


class Store(Protocol):
    """Files by name; a name has "/" between its parts.

    place: as the user gave it
    near: whether files are on this machine, so that reading all of them is cheap
    """

    @property
    def place(self) -> str: ...
    @property
    def near(self) -> bool: ...
    def prepare(self) -> None:
        """Make it, and find out before any work whether it can be written. Raises OSError."""
        ...

    def tidy(self) -> None:
        """Remove what killed writers left."""
        ...

    def shared(self, identity: str) -> AbstractContextManager[None]:
        """Inside, nobody else is inside with another identity, where this store has locks.

        Raises:
            ValueError: somebody is.
        """
        ...

    def read(self, name: str) -> bytes | None:
        """None where it is not there. Raises OSError."""
        ...

    def parts(self, name: str) -> Iterator[bytes]:
        """The same, part by part: a shard may be larger than memory. Raises OSError."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Whole or not at all. Raises OSError."""
        ...

    def append(self, name: str, text: str) -> bool:
        """Add lines to a file, at once; False where this store cannot. Raises OSError."""
        ...

    def has(self, name: str) -> bool:
        """Whether it is there."""
        ...

    def sizes(self, folder: str) -> Mapping[str, int]:
        """Bytes of the files right inside a folder, by their whole name."""
        ...

    def folders(self) -> list[str]:
        """Names of the folders right inside."""
        ...


def is_url(place: str | Path) -> bool:
    return bool(URL.match(str(place)))


def open_store(place: str | Path) -> Store:
    """A folder, or what a URL names; nothing is made or asked yet.

    Raises:
        ValueError: fsspec knows no such URL, or misses a library for it.
    """
    if not is_url(place):
        return Folder(str(place))
    with needs("fsspec", f"{place!s}"):
        import fsspec
    scheme = str(place).partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(str(place), **_OPTIONS.get(scheme, {}))
    except ImportError as error:
        extra = {"gs": "gs", "gcs": "gs", "s3": "s3"}.get(scheme, "fsspec")
        with needs(extra, str(place)):
            raise ImportError(str(error)) from None
        raise
    except ValueError as error:
        raise ValueError(
            f"{clean(place)}: {reason(error)}; give a folder, or s3:// or gs://"
        ) from None
    if "file" in system.protocol:
        return Folder(path)
    return Bucket(str(place), system, path.rstrip("/"))


_OPTIONS: dict[str, dict[str, Any]] = {"s3": {"use_listings_cache": False}}


@dataclass(frozen=True)
class Folder:
    """A folder of this machine, or one that machines share."""

    place: str
    near: bool = True

    @property
    def root(self) -> Path:
        return Path(self.place)

    def prepare(self) -> None:
        for name in ("", "manifest"):
            open_folder(self.root / name)
        self.tidy()

    def tidy(self) -> None:
        for name in FOLDERS:
            sweep(self.root / name)

    def shared(self, identity: str) -> AbstractContextManager[None]:
        return alike(self.root, identity)

    def read(self, name: str) -> bytes | None:
        try:
            return read_bytes(self.root / name, MOST)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def parts(self, name: str) -> Iterator[bytes]:
        with open(self.root / name, "rb") as file:
            while part := file.read(PART):
                yield part

    def write(self, name: str, data: bytes) -> None:
        write_whole(self.root / name, data)

    def append(self, name: str, text: str) -> bool:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:  # a full disk names no file
            raise OSError(error.errno, error.strerror, str(path)) from None
        return True

    def has(self, name: str) -> bool:
        return (self.root / name).exists()

    def sizes(self, folder: str) -> dict[str, int]:
        try:
            with os.scandir(self.root / folder) as found:
                ahead = f"{folder}/" if folder else ""
                return {f"{ahead}{one.name}": one.stat().st_size for one in found if one.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def folders(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return sorted(one.name for one in os.scandir(self.root) if one.is_dir())


@dataclass(frozen=True)
class Bucket:
    """A part of an object store."""

    place: str
    system: Any = field(repr=False)
    path: str = ""
    near: bool = False

    def prepare(self) -> None:
        name = f"{self.path}/.fewstep-{os.getpid()}"
        with self._told():
            self.system.makedirs(self.path, exist_ok=True)
            self.system.pipe_file(name, b"")
            self.system.rm_file(name)

    def tidy(self) -> None:
        """Nothing: an object that did not arrive whole is not there."""

    def shared(self, identity: str) -> AbstractContextManager[None]:
        return nullcontext()

    def read(self, name: str) -> bytes | None:
        try:
            with self._told(name):
                return self.system.cat_file(f"{self.path}/{name}")
        except FileNotFoundError:
            return None

    def parts(self, name: str) -> Iterator[bytes]:
        with self._told(name), self.system.open(f"{self.path}/{name}", "rb") as file:
            while part := file.read(PART):
                yield part

    def write(self, name: str, data: bytes) -> None:
        with self._told(name):
            self.system.pipe_file(f"{self.path}/{name}", data)

    def append(self, name: str, text: str) -> bool:
        return False

    def has(self, name: str) -> bool:
        with self._told(name):
            return bool(self.system.exists(f"{self.path}/{name}"))

    def sizes(self, folder: str) -> dict[str, int]:
        return {
            f"{folder}/{_name(one)}" if folder else _name(one): int(one["size"] or 0)
            for one in self._list(folder)
            if one["type"] == "file"
        }

    def folders(self) -> list[str]:
        return sorted(_name(one) for one in self._list("") if one["type"] == "directory")

    def _list(self, folder: str) -> list[dict[str, Any]]:
        try:
            with self._told(folder):
                return self.system.ls(f"{self.path}/{folder}".rstrip("/"), detail=True)
        except FileNotFoundError:
            return []

    @contextmanager
    def _told(self, name: str = "") -> Iterator[None]:
        """What goes wrong inside is an OSError that names the place."""
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:  # of botocore, aiohttp, google: they have no class in common
            raise OSError(None, reason(error), f"{self.place}/{name}".rstrip("/")) from error


def _name(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rpartition("/")[2]
