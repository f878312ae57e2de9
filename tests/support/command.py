"""The command, run in this process: in a process of its own it costs seconds."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from fewstep.cli import main
from fewstep.cli.run import app

__all__ = ["Ran", "command", "defaults"]


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
