"""Sets of a bounded cache: folders that many processes read, and that make room for others.

A set is claimed as long as a process uses it. What is claimed is not removed, and a claim ends with
its process. Where files cannot be locked, nothing is claimed.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
import time
from pathlib import Path

from fewstep.files import CLAIM, alike

__all__ = ["claimed", "make_room"]

GIB = 2**30
USING, REMOVING = "using", "removing"
WAITS, WAIT = 200, 0.05  # seconds; until a set is removed


def claimed(home: Path) -> contextlib.ExitStack:
    """Until it is closed, or the process has ended, nobody removes the set.

    Raises:
        ValueError: another process removes it, and does not end.
    """
    for _ in range(WAITS):
        held = contextlib.ExitStack()
        try:
            home.mkdir(parents=True, exist_ok=True)
            held.enter_context(alike(home, USING))
            return held
        except FileNotFoundError:  # removed since
            continue
        except OSError:  # where nobody can write, nobody removes; what else it is, encoding says
            return held
        except ValueError:
            time.sleep(WAIT)
    raise ValueError(f"another process removes {home}; start again when it has ended")


def make_room(home: Path, needed: int, cache_gib: float, what: str) -> None:
    """Remove the sets beside this one that were not used for the longest until it fits.

    Args:
        needed: its bytes when it is whole
        cache_gib: the most that all sets may take
        what: is in it

    Raises:
        ValueError: it does not fit alone, beside those in use, or on the disk.
    """
    limit = int(cache_gib * GIB)
    short = f"{what} need {needed / GIB:.2g} GiB on disk, and cache_gib is {cache_gib:g}"
    if needed > limit:
        raise ValueError(f"{short}; raise it, or give fewer")
    others = [one for one in home.parent.iterdir() if one.is_dir() and one != home]
    sets = {one: _size(one) for one in sorted(others, key=_last_use)}
    if needed + sum(sets.values()) > limit:
        gc.collect()  # a training that has ended here may still hold one
    for one in sets:
        if needed + sum(sets.values()) <= limit:
            break
        _remove(one)
        sets[one] = _size(one)
    if needed + (used := sum(sets.values())) > limit:
        raise ValueError(
            f"{short}, of which sets in use have {used / GIB:.2g}; raise it, or wait until the "
            "others have ended"
        )
    free = shutil.disk_usage(home).free + _size(home)
    if needed > free:
        raise ValueError(
            f"{home.parent} needs {needed / GIB:.2f} GiB and has {free / GIB:.2f}; set "
            "FEWSTEP_CACHE to a folder with more room"
        )


def _remove(home: Path) -> None:
    """A set that is in use stays."""
    with contextlib.suppress(ValueError, OSError), alike(home, REMOVING):
        for one in home.iterdir():
            if one.name != CLAIM:
                one.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it has files, or another has taken it up
        home.rmdir()


def _size(folder: Path) -> int:
    """In bytes; 0 where it is not there any more."""
    total = 0
    with contextlib.suppress(FileNotFoundError):
        for one in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                total += one.stat().st_size if one.is_file() else 0
    return total


def _last_use(home: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return home.stat().st_mtime
    return 0.0
