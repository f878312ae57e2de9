"""Ctrl-C between two steps, so that what is saved on the way out is whole."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["between_steps"]


@contextlib.contextmanager
def between_steps() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back, and say so; the yielded function says whether there was one, and the caller
    then saves its work and raises KeyboardInterrupt.

    A second Ctrl-C is not held back. Where Python delivers no signals (outside the main thread),
    or the program has a handler of its own, nothing changes and the function returns False.
    """
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            raise KeyboardInterrupt
        held.append(number)
        with contextlib.suppress(OSError):  # no print: it could be what was interrupted
            os.write(2, b"\nfewstep: stopping after this step; Ctrl-C again stops at once\n")

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: bool(held)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
