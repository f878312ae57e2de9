"""Commands that a study runs, its end and the end of its time, and numbers of its options."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType

from fewstep.text import clean

__all__ = ["at_least", "ended", "positive", "run", "stop_after"]

_running: list[subprocess.Popen[bytes]] = []


def run(command: Sequence[str]) -> None:
    """In a process of its own, by this Python.

    Raises:
        SystemExit: with its code, where it fails or is stopped.
    """
    print(f"\n$ {shlex.join(command)}", flush=True)
    with subprocess.Popen([sys.executable, "-m", *command]) as process:
        _running.append(process)
        code = process.wait()
        _running.remove(process)
    if code:
        raise SystemExit(code)


def ended(study: Callable[[], object]) -> int:
    """The exit code of a study; what a user can mend is one line, and 2. FEWSTEP_DEBUG in the
    environment shows where it was raised."""
    try:
        study()
    except (ValueError, OSError) as error:
        if os.environ.get("FEWSTEP_DEBUG"):
            traceback.print_exc()
        text: object = error
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{os.fsdecode(error.filename)}: {error.strerror}"
        print(f"error: {clean(text)}", file=sys.stderr)
        return 2
    return 0


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number, from this one on."""

    def whole(text: str) -> int:
        if not text.isdecimal() or len(text) > 12 or int(text) < least:
            rule = f"must be a whole number, at least {least}"
            raise argparse.ArgumentTypeError(f"{rule}, got {clean(text)!r}")
        return int(text)

    return whole


def positive(text: str) -> float:
    """A number of minutes as an option gives it."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"must be minutes above 0, got {text!r}")
    return value


def stop_after(minutes: float | None) -> None:
    """Stop by Ctrl-C after so many minutes: whatever runs then saves, and the study goes on there.

    Args:
        minutes: None: never.
    """
    if minutes is None:
        return

    def end(number: int, frame: FrameType | None) -> None:
        print(f"\nthe {minutes:g} minutes are over", file=sys.stderr, flush=True)
        if _running:
            _running[-1].send_signal(signal.SIGINT)  # its exit code ends the study
        else:
            signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
