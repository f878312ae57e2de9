"""The command line. Every command parses, calls the library, and shows; nothing is computed
here."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

import typer

from fewstep.cli import (  # noqa: F401  (each registers its commands)
    compare,
    demo,
    distill,
    evaluate,
    geometry,
    sample,
    train,
    train_solver,
)
from fewstep.cli.app import app

__all__ = ["app", "main"]


# typer may bring its own copy of click, or use the installed one: its errors are found by descent
UsageError: type[Exception] = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)
MAY_BE_EMPTY = ("--prompt", "--negative")


def main() -> NoReturn:
    """Run the command line; what a user can mend is one line and exit code 2."""
    code = 0
    warnings.showwarning = _one_line
    try:
        _refuse_empty(sys.argv[1:])
        # typer itself would end silently on Ctrl-C, and spread a usage error over many lines
        code = app(standalone_mode=False)
        if code == 130:
            print("fewstep: stopped; what was finished is kept", file=sys.stderr)
    except UsageError as error:
        if message := error.format_message():  # type: ignore[attr-defined]
            print(f"fewstep: {message} (--help shows what there is)", file=sys.stderr)
        code = error.exit_code  # type: ignore[attr-defined]
    except typer.Abort:
        print("fewstep: aborted", file=sys.stderr)
        code = 1
    except (ValueError, OSError, ArithmeticError) as error:
        if os.environ.get("FEWSTEP_DEBUG"):
            raise
        message = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {error.strerror}"
        print(f"fewstep: {message}", file=sys.stderr)
        code = 2
    sys.exit(code)


def _one_line(message: object, *where: object) -> None:
    print(f"fewstep: {message}", file=sys.stderr)


def _refuse_empty(arguments: Sequence[str]) -> None:
    """An option with nothing behind it is an unset shell variable, hardly ever what is meant: an
    empty folder, for one, would be the current one."""
    for before, argument in zip(("", *arguments), arguments, strict=False):
        option = before if argument == "" else argument.removesuffix("=")
        empty = argument == "" or (
            option.startswith("--") and argument == f"{option}=" and "=" not in option
        )
        if empty and option not in MAY_BE_EMPTY:
            raise ValueError(f"{option if option.startswith('-') else 'an argument'} is empty")
