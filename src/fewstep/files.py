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
from pathlib import Path
from typing import Any

__all__ = [
    "cache_folder",
    "check_writable",
    "file_hash",
    "sweep",
    "sweep_stale",
    "write_json",
    "write_whole",
]

PARTIAL = ".partial"
STALE = 600.0  # seconds; a living temporary is there for the time that one write takes


def write_whole(path: Path | str, data: bytes) -> None:
    """Write `data` to `path` so that a crash leaves either the old file or the new one, never a
    part.

    A process killed in the middle leaves its temporary, `.{name}.{8 letters}.partial`; see `sweep`.
    Errors: OSError that names `path`.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL
        )
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:  # a full disk names no file, other errors the temporary one
        raise OSError(error.errno, error.strerror, str(path)) from None


def sweep(path: Path | str) -> None:
    """Remove the temporaries that killed processes left beside `path`; only for the one process
    that writes it."""
    path = Path(path)
    ours = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}{re.escape(PARTIAL)}")
    for other in path.parent.iterdir():
        if ours.fullmatch(other.name):
            other.unlink(missing_ok=True)


def sweep_stale(folder: Path | str, suffix: str) -> None:
    """Remove the temporaries of files named *suffix in `folder` that no living process can still be
    writing, because they are ten minutes old."""
    ours = re.compile(rf"\..+{re.escape(suffix)}\.[a-z0-9_]{{8}}{re.escape(PARTIAL)}")
    for other in Path(folder).iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process may sweep as well
            if ours.fullmatch(other.name) and time.time() - other.stat().st_mtime > STALE:
                other.unlink()


def write_json(path: Path | str, value: Any) -> None:
    """`write_whole` of indented JSON with a final newline."""
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def file_hash(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(folder: Path | str) -> None:
    """Make the folder, and find out before any work whether it can be written.

    Errors: OSError that names the folder.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(folder)) from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


def cache_folder() -> Path:
    """Where what is slow to make again is kept: $FEWSTEP_CACHE, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FEWSTEP_CACHE") or Path(base) / "fewstep")
