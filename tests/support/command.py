"""The command, run in this process: in a process of its own it costs seconds."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import os
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.cli import main
from fewstep.cli.run import app
from fewstep.data.images import write_png

__all__ = [
    "Ran",
    "command",
    "defaults",
    "fewstep",
    "hashes",
    "in_process",
    "some_idx",
    "some_pictures",
]


@dataclass(frozen=True)
class Ran:
    """What a command has printed, and its exit code."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def command(*arguments: Any, env: dict[str, str] | None = None) -> Ran:
    """Run `fewstep` with these arguments."""
    out, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fewstep", *map(str, arguments)])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", error)
        for name, value in {"COLUMNS": "120", **(env or {})}.items():
            patch.setitem(os.environ, name, value)
        code: Any = 0
        with contextlib.suppress(SystemExit):
            try:
                main()
            except SystemExit as ended:
                code = ended.code or 0
                raise
    return Ran(code, out.getvalue(), error.getvalue())


def defaults(*names: str) -> dict[str, Any]:
    """The default of each option of a command that has one, by its name in Python."""
    found: Any = app
    for name in names:
        found = found[name]
    signature = inspect.signature(found.default_command)
    return {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}


def in_process(*arguments: Any) -> int:
    """The exit code of `fewstep`; what it prints goes where the test's own output goes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fewstep", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return ended.value.code or 0  # type: ignore[return-value]


def fewstep(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run it in a process of its own, which costs seconds."""
    return subprocess.run(
        [sys.executable, "-m", "fewstep", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        timeout=120,
        **options,
    )


def hashes(folder: Path) -> dict[str, str]:
    """The hash of each file, by its name."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def some_pictures(folder: Path, count: int = 20) -> Path:
    """A folder of grey pictures as the built-in network makes them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        picture = rng.integers(0, 256, (32, 32, 1), dtype=np.uint8)
        write_png(folder / f"{i:03d}.png", picture)
    return folder


def some_idx(folder: Path, count: int = 12) -> Path:
    """The four idx files of a small data set."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("train", "t10k"):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for kind, values in (("images", images), ("labels", np.arange(count, dtype=np.uint8) % 3)):
            shape = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
            path = folder / f"{name}-{kind}-idx{values.ndim}-ubyte"
            path.write_bytes(shape + values.tobytes())
    return folder
