"""Standard output and error that cannot fail, and SIGTERM as Ctrl-C.

A command may have worked for hours when it prints. A closed pipe, a closed descriptor or an
encoding without the right letters must not make a failure of that.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["Terminated", "open_streams", "stop_on_sigterm"]


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""

    code = 128 + signal.SIGTERM


class Lasting(io.FileIO):
    """A descriptor that goes on as the null device once nobody reads it."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:  # a closed pipe, a full disk
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return len(data)


def open_streams() -> None:
    """Replace the streams that Python opened by lasting ones; letters that the encoding lacks are
    replaced."""
    for wanted in (0, 1, 2):  # a library would otherwise open its files there
        try:
            os.fstat(wanted)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor: this one
    for number, name in ((1, "stdout"), (2, "stderr")):
        old, first = getattr(sys, name), getattr(sys, f"__{name}__")
        if old is not first:  # a test, or a notebook, reads it
            continue
        encoding = getattr(old, "encoding", None) or "utf-8"
        new = io.TextIOWrapper(
            io.BufferedWriter(Lasting(number, "w", closefd=False)),
            encoding=encoding,
            errors="replace",
            line_buffering=number == 2 or os.isatty(number),
        )
        if old is not None:
            old.flush()
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM, where Python delivers signals and nobody else handles it."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    stop.gives_way = True  # type: ignore[attr-defined]  # to a training, which saves first
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
