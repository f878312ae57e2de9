"""What runs in a worker: the work is opened once, then does item after item.

A worker says what went wrong in words, and whether the item is to be tried again. So nothing that
it raises has to travel, and a worker without fewstep, or with another version, can say so too.
"""

from __future__ import annotations

import errno
import os
import platform
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from fewstep.provenance import VERSION
from fewstep.text import clean

__all__ = [
    "AGAIN",
    "STOP",
    "Outcome",
    "Place",
    "Runner",
    "Work",
    "device_at",
    "kind_of",
    "versions",
]

STOP, AGAIN, BROKEN = "stop", "again", "broken"
# of a disk or a folder: they stay as they are until somebody mends them
LASTING = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.ENOTDIR}


@dataclass(frozen=True)
class Place:
    """Where a worker runs: its number on its machine, and whether the GPU that it may use is the
    only one that it sees."""

    number: int = 0
    own_gpu: bool = False


class Work(Protocol):
    """What workers do; it travels to them once, pickled, so it names a model and holds none."""

    def open(self, place: Place) -> Callable[[Any], Any]:
        """Load what is needed. The function that it returns does one item."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What became of an item.

    value: what the work returned
    error: what went wrong, in one line; "" where nothing did
    kind: "stop": it would go wrong again; "again": it may not; "broken": nor may it in another
        process, for a fault of the device leaves this one useless
    host, worker: who did it
    """

    value: Any = None
    error: str = ""
    kind: str = ""
    host: str = ""
    worker: int = 0


def versions() -> dict[str, str]:
    """What has to be the same on all machines, for the pictures to be the same."""
    import torch

    return {"fewstep": VERSION, "torch": torch.__version__.partition("+")[0]}


def device_at(device: str, place: Place) -> str:
    """The device of a worker: where any GPU will do, each worker has the next one."""
    if device != "cuda" or place.own_gpu:
        return device
    import torch

    return f"cuda:{place.number % max(1, torch.cuda.device_count())}"


class Runner:
    """The work in a worker.

    Args:
        work: gives the work, when it is first needed
        wanted: the versions that it must have
        place: where it runs
    """

    def __init__(self, work: Callable[[], Work], wanted: dict[str, str], place: Place) -> None:
        self.work, self.wanted, self.place = work, wanted, place
        self.do: Callable[[Any], Any] | None = None

    def begin(self) -> Outcome:
        """Open the work, where it is not open yet."""
        return self._told(lambda: self._opened() and None)

    def __call__(self, item: Any) -> Outcome:
        return self._told(lambda: self._opened()(item))

    def _opened(self) -> Callable[[Any], Any]:
        if self.do is None:
            check_versions(self.wanted, versions())
            self.do = self.work().open(self.place)
        assert self.do is not None
        return self.do

    def _told(self, act: Callable[[], Any]) -> Outcome:
        who: dict[str, Any] = {"host": socket.gethostname(), "worker": os.getpid()}
        try:
            return Outcome(act(), **who)
        except Exception as error:  # whatever it is, it is told in one line
            return Outcome(None, told(error), kind_of(error), **who)


def check_versions(wanted: dict[str, str], found: dict[str, str]) -> None:
    """Raises ValueError where a worker has another version."""
    for name, version in wanted.items():
        if found.get(name) != version:
            raise ValueError(
                f"the worker on {platform.node()} has {name} {found.get(name)}, and the run was "
                f"started with {version}; install the same on all machines"
            )


def told(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return clean(f"{os.fsdecode(error.filename)}: {error.strerror}")
    text = clean(str(error).strip().splitlines()[0] if str(error).strip() else "")
    plain = isinstance(error, ValueError | OSError | ArithmeticError) and text
    return text if plain else f"{type(error).__name__}: {text}"


def kind_of(error: Exception) -> str:
    """Whether what raised it is to be tried again, as of `Outcome`."""
    if isinstance(error, OSError):
        return STOP if error.errno in LASTING else AGAIN
    return STOP if isinstance(error, ValueError | ArithmeticError | TypeError) else BROKEN
