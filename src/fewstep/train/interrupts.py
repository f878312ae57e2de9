"""Ctrl-C and SIGTERM between two steps, so that what is saved on the way out is whole.

Slurm and Kubernetes end a job by SIGTERM, then wait for some seconds before SIGKILL.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["Stopped", "between_steps"]

# the signals that are held back, each where Python or the system would act on it
HELD = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Stopped(KeyboardInterrupt):
    """A training ended early, by a signal, after its state was saved.

    code: the exit code that says so, 128 and the number of the signal
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


@contextlib.contextmanager
def between_steps() -> Iterator[Callable[[], int]]:
    """Hold Ctrl-C and SIGTERM back, and say so.

    The yielded function returns the number of the signal that came, or 0. The caller then saves its
    work and raises `Stopped`. A second Ctrl-C or SIGTERM is not held back. Where Python delivers no
    signals (outside the main thread), or the program has handlers of its own, nothing changes; one
    with an attribute `gives_way`, as the command's, is set aside meanwhile.
    """
    came: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if came:
            raise Stopped(number)
        came.append(number)
        with contextlib.suppress(OSError):  # no print: it could be what was interrupted
            os.write(2, b"\nfewstep: stopping after this step; again, and it stops at once\n")

    before = {}
    if threading.current_thread() is threading.main_thread():
        there = {n: signal.getsignal(n) for n in HELD}
        before = {
            n: one for n, one in there.items() if one is HELD[n] or getattr(one, "gives_way", False)
        }
    for number in before:
        signal.signal(number, hold)
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)
