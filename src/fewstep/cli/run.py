"""From the words of a command line to an exit code."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from cyclopts import CycloptsError
from rich.console import Console

from fewstep.cli import (  # noqa: F401  (each registers its commands)
    compare,
    convert,
    demo,
    distill,
    evaluate,
    geometry,
    levels,
    models,
    plan,
    sample,
    serve,
    status,
    train,
    train_solver,
)
from fewstep.cli.app import app
from fewstep.text import clean, joined

__all__ = ["app", "run"]

MAY_BE_EMPTY = ("--prompt", "--negative")
PLUGINS = "fewstep.solvers"  # the group of entry points that register solvers
SHARED = (
    "compare",
    "distill",
    "evaluate",
    "geometry",
    "sample",
)  # commands that share their work between processes


def run(arguments: Sequence[str]) -> int:
    """Run one command line; what a user can mend is one line, and exit code 2."""
    warnings.showwarning = _one_line
    words, modules, loud = _everywhere(arguments)
    loud = loud or bool(os.environ.get("FEWSTEP_DEBUG"))
    try:
        _refuse_empty(words)
        _refuse_ranks(words)
        if not words or words[0] not in ("--help", "-h", "--version"):
            _import(modules)
        app(
            words,
            exit_on_error=False,
            print_error=False,
            result_action="return_none",
            console=Console(),
        )
        sys.stdout.flush()
    except KeyboardInterrupt as stopped:
        _one_line("stopped; what was finished is kept")
        return getattr(stopped, "code", 130)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:  # the last resort: no error of a library is shown as it is
        if loud:
            traceback.print_exc()
        _one_line(_told(error))
        return 2
    return 0 if words else 2  # without a command there was the help


def _told(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, CycloptsError):
        return f"{_usage(error)} (--help shows what there is)"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    text = str(error).strip()
    if isinstance(error, (ValueError, OSError, ArithmeticError)) and text:
        return text
    if isinstance(error, MemoryError):
        return f"out of memory {text}".strip()
    named = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"{named} (--traceback shows where)"


def _usage(error: CycloptsError) -> str:
    return str(error).strip().rstrip(".")


def _one_line(message: object, *where: object) -> None:
    print(f"fewstep: {clean(message)}", file=sys.stderr)


def _everywhere(arguments: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """The words without the options of every command; modules to import; whether --traceback."""
    words, modules, loud = [], [], False
    rest = iter(arguments)
    for word in rest:
        if word == "--traceback":
            loud = True
        elif word == "--import":
            modules.append(next(rest, ""))
        elif word.startswith("--import="):
            modules.append(word.partition("=")[2])
        else:
            words.append(word)
    return words, modules, loud


def _import(modules: Sequence[str]) -> None:
    """Import what registers solvers: the modules that were named, and installed plugins."""
    for name in modules:
        if not name or not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"--import takes a module's name, like my_solvers, got {name!r}")
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            where = "; it is looked for here and on PYTHONPATH" if error.name == name else ""
            raise ValueError(f"--import {name}: {error}{where}") from error
        except Exception as error:  # whatever a module of one's own may raise
            raise ValueError(f"--import {name}: {type(error).__name__}: {error}") from error
    from importlib.metadata import entry_points  # help does not wait for it

    for plugin in entry_points(group=PLUGINS):
        try:
            loaded = plugin.load()
            if callable(loaded):
                loaded()
        except Exception as error:
            where = f"the installed plugin {plugin.name} ({plugin.value})"
            raise ValueError(f"{where}: {_named(error)}; mend or remove it") from error


def _named(error: Exception) -> str:
    named = isinstance(error, ModuleNotFoundError | ValueError)
    return str(error) if named else f"{type(error).__name__}: {error}"


def _refuse_ranks(words: Sequence[str]) -> None:
    """Under torchrun every process would do all the work, into the same files."""
    count = os.environ.get("WORLD_SIZE", "1")
    asks = {"--help", "-h", "--version"} & set(words)
    if words and words[0] not in SHARED and count.isdecimal() and int(count) > 1 and not asks:
        raise ValueError(
            f"only {joined([f'`fewstep {one}`' for one in SHARED])} share work between processes, "
            f"and WORLD_SIZE is {count}; run `fewstep {words[0]}` without torchrun, on other seeds "
            "in each process"
        )


def _refuse_empty(words: Sequence[str]) -> None:
    """An option with nothing behind it is an unset shell variable, hardly ever what is meant: an
    empty folder, for one, would be the current one."""
    for before, word in zip(("", *words), words, strict=False):
        option = before if word == "" else word.removesuffix("=")
        empty = word == "" or (
            option.startswith("--") and word == f"{option}=" and "=" not in option
        )
        if empty and option not in MAY_BE_EMPTY:
            raise ValueError(f"{option if option.startswith('-') else 'an argument'} is empty")
