"""Reads each case of a list, and prints what came of it: one line of JSON a case.

The readers may start nothing, reach for no other host, unpickle nothing and write nothing; an audit
hook sees whether they do. Run by `test_data`, in one process for all cases.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fewstep.cli as command
from fewstep.data.archives import read_arrays
from fewstep.data.captions import match_captions, read_captions
from fewstep.data.idx import load_idx_folder, read_idx
from fewstep.data.images import read_metadata, read_picture, read_png
from fewstep.data.sources import open_images
from fewstep.data.training import read_data
from fewstep.evaluate import gather
from fewstep.evaluate.clip import load_clip
from fewstep.evaluate.features import resolve_features
from fewstep.evaluate.statistics import read_statistics
from fewstep.plan import Plan

STARTS = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.")
REACHES = ("socket.connect", "socket.getaddrinfo", "urllib.", "ftplib.", "pickle.find_class")
events: list[str] = []


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    writes = (
        event == "open"
        and arguments[0] not in (1, 2)  # the command's own streams
        and isinstance(arguments[2], int)
        and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )
    if event.startswith(STARTS + REACHES) or writes:
        events.append(f"{event} {arguments[0]!r}")


def every_picture(path: str) -> None:
    for entry in itertools.islice(open_images(path).stream(), 20):
        entry.read()


def folder(path: str) -> None:
    every_picture(str(Path(path).parent))


def training(path: str) -> None:
    card = SimpleNamespace(name="tiny", classes=("a", "b"))
    model: Any = SimpleNamespace(shape=(1, 32, 32), card=card)
    read_data(path, model, 0.5)


def matching(path: str) -> None:
    pictures = Path(path).with_suffix(".png")
    match_captions(read_captions(path), open_images(pictures).names)


def evaluate(path: str) -> None:
    """The whole command, which must end in exit code 2 and one line."""
    sys.argv = ["fewstep", "evaluate", path, "--features", "fashion-b", "--json"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        command.main()
    if said.getvalue():
        raise ValueError(said.getvalue().removesuffix("\n"))


READERS: dict[str, Callable[[str], Any]] = {
    "picture": read_picture,
    "metadata": read_metadata,
    "png": read_png,
    "folder": folder,
    "images": every_picture,
    "training": training,
    "idx": read_idx,
    "idx folder": load_idx_folder,
    "captions": read_captions,
    "matching": matching,
    "arrays": read_arrays,
    "statistics": read_statistics,
    "state": lambda path: gather._read_state(Path(path), "{}"),
    "features": resolve_features,
    "clip": load_clip,
    "plan": Plan.read,
    "evaluate": evaluate,
    "start": lambda path: os.system("true"),
    "write": lambda path: Path(path).write_bytes(b""),
}


def kind(error: Exception) -> str:
    """What a command can show in one line is ValueError or OSError, or descends from them."""
    ours = (one.__name__ for one in (ValueError, OSError) if isinstance(error, one))
    return next(ours, type(error).__name__)


def main() -> None:
    warnings.simplefilter("ignore")
    cases = json.loads(Path(sys.argv[1]).read_text())
    sys.addaudithook(hook)
    for name, reader, path in cases:
        events.clear()
        begun, error = time.perf_counter(), None
        try:
            result = READERS[reader](path)
        except Exception as found:
            error, result = found, None
        print(
            json.dumps(
                {
                    "name": name,
                    "error": None if error is None else kind(error),
                    "message": "" if error is None else str(error),
                    "none": result is None,
                    "events": list(events),
                    "seconds": time.perf_counter() - begun,
                    "mib": peak(),
                }
            ),
            flush=True,
        )


def peak() -> float:
    """MiB. VmHWM, since ru_maxrss begins with the peak of the process that started this one."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    main()
