"""Files that are either whole or not there: written beside their place, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = [
    "alike",
    "alone",
    "file_hash",
    "open_folder",
    "opened",
    "sweep",
    "write_json",
    "write_whole",
]

PARTIAL = ".partial"
OURS = re.compile(rf"\..+\.[a-z0-9_]{{8}}{re.escape(PARTIAL)}")
LOCK, CLAIM = ".lock", ".claim"  # of a folder that one process writes to, or several alike
STALE = 600.0  # seconds; where files cannot be locked, an older temporary has no living writer
TRIES = 3


def write_whole(path: Path | str, data: bytes | Callable[[], Iterable[bytes]]) -> None:
    """Write `data` to `path` so that a crash leaves either the old file or the new one.

    Data that should not be in memory at once are a function that gives them part by part.

    The data go to a temporary beside it, `.{name}.{8 letters}.partial`, which is then renamed. The
    writer holds a lock on it, so `sweep` knows those of killed processes from those of living ones.

    Raises:
        OSError: that names `path`.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in reversed(range(TRIES)):
            try:
                return _write(path, data)
            except FileNotFoundError:  # swept by another process before the lock was there
                if not left:
                    raise
    except OSError as error:  # a full disk names no file, other errors the temporary one
        raise OSError(error.errno, error.strerror, str(path)) from None


def _write(path: Path, data: bytes | Callable[[], Iterable[bytes]]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
    try:
        with os.fdopen(handle, "wb") as file:
            _lock(file.fileno())
            for part in [data] if isinstance(data, bytes) else data():
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _lock(handle: int, shared: bool = False) -> bool | None:
    """Whether this process has the lock now; None where the file system has no locks.

    shared: the lock is one of many, and is waited for
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def sweep(folder: Path | str) -> None:
    """Remove the temporaries that killed processes left in `folder`; nothing else."""
    with contextlib.suppress(OSError):  # a folder that is not there has none
        for other in Path(folder).iterdir():
            if OURS.fullmatch(other.name):
                _sweep_one(other)


def _sweep_one(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("rb") as file:  # another process may sweep as well
        free = _lock(file.fileno())
        if free or (free is None and time.time() - path.stat().st_mtime > STALE):
            path.unlink()


def write_json(path: Path | str, value: Any) -> None:
    """`write_whole` of indented JSON with a final newline."""
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def file_hash(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_folder(folder: Path | str) -> None:
    """Make the folder, find out before any work whether it can be written, and sweep it.

    Raises:
        OSError: that names the folder.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        sweep(folder)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(folder)) from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


@contextlib.contextmanager
def alone(target: Path | str) -> Iterator[None]:
    """Inside, no other process is in this block with this folder, which is there, or this file.

    The lock ends with the process, however that ends. Where the file system has no locks, nothing
    is locked.

    Raises:
        ValueError: another process is there.
    """
    target = Path(target)
    path = target / LOCK if target.is_dir() else target.with_name(f".{target.name}{LOCK}")
    with _held(path, None) as free:
        if not free:
            raise ValueError(
                f"another process is writing to {target}; wait until it has ended, or give another "
                f"{'folder' if target.is_dir() else 'file'}"
            )
        yield


@contextlib.contextmanager
def opened(folder: Path | str) -> Iterator[None]:
    """`open_folder`, and `alone` in it."""
    open_folder(folder)
    with alone(folder):
        yield


@contextlib.contextmanager
def alike(folder: Path | str, identity: str) -> Iterator[None]:
    """Inside, no other process is in this block with this folder and another identity.

    As in `alone`, the lock ends with the process.

    Raises:
        ValueError: another process is there, with another identity.
    """
    with _held(Path(folder) / CLAIM, identity) as free:
        if not free:
            raise ValueError(
                f"another process is sampling into {folder} with other settings; choose another "
                "--out"
            )
        yield


@contextlib.contextmanager
def _held(path: Path, identity: str | None) -> Iterator[bool]:
    """Whether the lock on this file is ours: alone, or with those of the same identity. The file
    is there as long as one holds it, and says whose it is."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        free = _lock(handle)
        if free and identity is not None:
            os.truncate(handle, 0)
            os.pwrite(handle, identity.encode(), 0)
        if free is not None and identity is not None:
            # not atomic after the other: who came in between has written over it, and is read
            _lock(handle, shared=True)
        with contextlib.suppress(FileNotFoundError):
            if free is None or os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        os.close(handle)  # its holder was done and took it away
    try:
        if identity is None:
            yield free is not False
        else:
            yield free is None or _text(handle) == identity
    finally:
        if _lock(handle) is not False:  # the last one here
            path.unlink(missing_ok=True)
        os.close(handle)


def _text(handle: int) -> str:
    return os.pread(handle, os.fstat(handle).st_size, 0).decode()
