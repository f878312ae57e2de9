"""What commands share while they run: how a stop is told, and how the command itself was called."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fewstep.text import clean

__all__ = ["AsJson", "command_line", "resumable", "tidy"]

AsJson = Annotated[
    bool,
    Parameter(
        name="--json",
        negative="",
        show_default=False,
        help="Print JSON on standard output instead.",
    ),
]


def command_line() -> str:
    """The command as it was typed; bytes that are no UTF-8 are shown as escapes."""
    line = shlex.join(["fewstep", *sys.argv[1:]])
    return line.encode("utf-8", "backslashreplace").decode()


@contextmanager
def tidy(out: Path) -> Iterator[None]:
    """Leave no empty folder behind work that ended before it wrote anything."""
    there = out.exists()
    try:
        yield
    except BaseException:
        if not there and out.is_dir():
            with suppress(OSError):  # it has something in it
                out.rmdir()
        raise


@contextmanager
def resumable(path: Path) -> Iterator[None]:
    """Say, where Ctrl-C or SIGTERM ends the work, that this file or folder holds what was done.

    Ends the command with exit code 130, or 143 for SIGTERM.
    """
    try:
        with tidy(path):
            yield
    except KeyboardInterrupt as stopped:
        inside = path.iterdir() if path.is_dir() else ()
        if path.is_file() or any(not one.name.startswith(".") for one in inside):
            done = f"{path} holds what was done, run the same command again to go on"
        else:
            done = "nothing was saved yet, run the same command again to start again"
        print(f"fewstep: stopped; {clean(done)}", file=sys.stderr)
        sys.exit(getattr(stopped, "code", 130))
