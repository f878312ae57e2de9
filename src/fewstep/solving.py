"""From what a caller names to what the loop runs: name, folder, Plan or Solver -> Program.

Programs of named solvers and of folders are kept, so that a second call finds its own in
microseconds. A folder is read again when one of its files has changed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from fewstep.arguments import number
from fewstep.denoiser import Denoiser
from fewstep.grid import check_grid, make_grid
from fewstep.loop import State, finish, run
from fewstep.plan import Program
from fewstep.sampling.settings import Settings
from fewstep.solver import Solver, end_at, get, intervals_for

__all__ = [
    "DEFAULT_GRID",
    "DEFAULT_NFE",
    "DEFAULT_RANGE",
    "Runnable",
    "find",
    "is_folder",
    "iterate",
    "resolve",
    "solve",
]

DEFAULT_RANGE = (0.002, 80.0)  # EDM's
DEFAULT_GRID = "karras"
DEFAULT_NFE = 5
MOST_KEPT = 512  # programs
FOLDER_FILES = ("solver.json", "[0-9]*/solver.json")  # of learned solvers


class Runnable(Protocol):
    """What can stand for a solver besides a name and a Solver: a Plan, a learned solver, ..."""

    def program(self) -> Program: ...


def find(solver: str | Path, nfe: int | None = None) -> Solver | Runnable:
    """A solver by name, or a learned one by its folder.

    Args:
        solver: a name, a folder, or a folder that has one for each budget under its number
        nfe: the budget, for the last of these

    Raises:
        ValueError: there is none.
    """
    found = _read(solver, nfe)
    return found[0] if isinstance(found, tuple) else found


def _read(solver: str | Path, nfe: int | None) -> Solver | tuple[Runnable, Program]:
    """The same, with the program of a learned solver."""
    text = os.fspath(solver)
    if "/" not in text and not (os.path.isdir(text) and is_folder(text)):
        try:
            return get(text)
        except ValueError:
            if not os.path.isdir(text):
                raise
    budget = DEFAULT_NFE if nfe is None else nfe
    stamps = tuple(_stamp(Path(text, sub)) for sub in ("", str(budget)))
    return _learned(os.path.abspath(text), text, budget, stamps)


def _stamp(folder: Path) -> tuple[Any, ...]:
    """What changes when the files of a learned solver are written anew."""
    stamps = []
    for name in ("solver.json", "predictor.safetensors"):
        try:
            stat = os.stat(folder / name)
            stamps.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
        except OSError:
            stamps.append(None)
    return tuple(stamps)


@functools.lru_cache(maxsize=64)
def _learned(place: str, text: str, nfe: int, stamps: Any) -> tuple[Runnable, Program]:
    from fewstep.learned.solver import LearnedSolver  # most calls have no use for it

    found = LearnedSolver.load(Path(text), nfe)
    return found, found.program()


def is_folder(solver: str | Path) -> bool:
    """Whether it is a folder of learned solvers."""
    return any(any(Path(solver).glob(pattern)) for pattern in FOLDER_FILES)


def resolve(
    settings: Settings,
    denoiser: Denoiser | None = None,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Program:
    """What the loop will run.

    Args:
        settings: the solver and how it runs; a head start is where a named grid begins
        denoiser: gives the ends of a named grid and the network's own time, where it has them
        sigma_min, sigma_max: ends of a named grid in place of the denoiser's

    Raises:
        ValueError: unknown names, impossible budgets, and settings beside a solver that has its
            own.
    """
    solver, nfe, grid = settings.solver, settings.nfe, settings.grid
    afs, end = settings.afs or "none", settings.end or "sigma_min"
    named, program = isinstance(solver, str | Path), None
    if named:
        found = _read(solver, nfe)
        solver, program = found if isinstance(found, tuple) else (found, None)
    if not isinstance(solver, Solver):
        if not hasattr(solver, "program"):
            raise ValueError(
                "solver must be a name, a Solver, a Plan, or have a method program(), "
                f"got {solver!r:.80}"
            )
        taken = {
            "grid": grid is not None,
            "afs": afs != "none",
            "final": settings.final,
            "end": end != "sigma_min",
            "sigma_min": sigma_min is not None,
            "sigma_max": sigma_max is not None,
        }
        return _own(program or solver.program(), nfe, [name for name in taken if taken[name]])
    high = settings.head_start if sigma_max is None else sigma_max
    if grid is not None and not isinstance(grid, str):
        if sigma_min is not None or sigma_max is not None or end != "sigma_min":
            raise ValueError("sigmas have their own ends: leave out end, sigma_min and sigma_max")
        return solver.on(check_grid(grid), afs, settings.final)
    low = _end(denoiser, "sigma_min", sigma_min, DEFAULT_RANGE[0])
    high = _end(denoiser, "sigma_max", high, DEFAULT_RANGE[1])
    schedule = getattr(denoiser, "schedule", None)
    key = (solver.name, nfe, grid, afs, settings.final, end, low, high, id(schedule))
    kept = _PLANNED.get(key)
    # the same objects: a name may be given to another solver, an id to another schedule
    if kept is not None and kept[0] is solver and kept[1] is schedule:
        return kept[2]
    points = 1 + intervals_for(
        solver, DEFAULT_NFE if nfe is None else nfe, afs, settings.final, end
    )
    name = DEFAULT_GRID if grid is None else grid
    sigmas = end_at(make_grid(name, points, high, low, schedule), end)
    made = solver.on(sigmas, afs, settings.final)
    if named:  # a solver that was passed as an object may hold anything
        if len(_PLANNED) >= MOST_KEPT:
            _PLANNED.clear()
        _PLANNED[key] = (solver, schedule, made)
    return made


_PLANNED: dict[tuple[Any, ...], tuple[Solver, Any, Program]] = {}


def _own(program: Program, nfe: int | None, extra: list[str]) -> Program:
    """A program that has its own grid. Raises ValueError where the caller gave one too."""
    if extra:
        raise ValueError(
            "a plan, or a learned solver, has its own grid, first step and end: leave out "
            + ", ".join(extra)
        )
    if program.learned_on is not None and nfe not in (None, program.evaluations):
        raise ValueError(
            f"{program.name} was trained for nfe={program.evaluations}, got nfe={nfe}; "
            "leave nfe out, or train one for that budget"
        )
    return program


def _end(denoiser: Denoiser | None, name: str, given: float | None, default: float) -> float:
    """An end of the range: the caller's, else the denoiser's own, else the default."""
    if given is not None:
        return number(name, given, finite=False)
    own = getattr(denoiser, name, None)
    return default if own is None else own


def solve(
    denoiser: Denoiser,
    x_T: Tensor,
    solver: str | Solver | Runnable = "dpmpp-2m",
    nfe: int | None = None,
    *,
    grid: str | Sequence[float] | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    seeds: Sequence[int] | None = None,
    afs: str = "none",
    final: bool = False,
    end: str = "sigma_min",
) -> Tensor:
    """Solve the probability-flow ODE (or the SDE) from x_T with exactly `nfe` evaluations of the
    denoiser.

    Args:
        denoiser: any callable D(x [b, ...], sigma [b]) -> [b, ...], the expected clean picture
        x_T: the start, [b, ...]: noise of standard deviation sigma_max, or a picture plus such
            noise, to start in the middle
        solver: a name, with options if need be ("ddim-eta:eta=0.5"), a Solver, a Plan, or anything
            else with a method `program()`; or the folder of a learned solver, or one that has such
            a folder for each budget (runs/tuned with 3, 5, 7 in it)
        nfe: the budget, 5 unless given, or a learned solver's own. It is ignored beside sigmas or a
            plan, from which it follows.
        grid: "karras" (the default), "log-snr", "time-uniform", "discrete" or "trailing"; or
            strictly decreasing sigmas
        sigma_min, sigma_max: the denoiser's own where left out, else 0.002 and 80
        seeds: one integer per picture, needed by stochastic solvers
        afs: analytic first step, at no evaluation: "none", "zero" as published, or "mean", which
            needs `denoiser.far_mean` and a start at the denoiser's sigma_max
        final: spend the last evaluation at the grid's end and return its D
        end: where a named grid ends: "sigma_min", or "zero", its last point moved to 0, which costs
            nothing: there solvers that work on D take a step of order 1, as public
            implementations do

    Returns:
        x at the grid's end (at sigma_min, or at 0 with `final` or `end`), [b, ...], float32, or
        float64 where x_T is. Runs in the caller's grad mode.

    Raises:
        ValueError: unknown names, impossible budgets, stochastic solvers without seeds, and a
            denoiser that returns another shape, or no tensor. NaN and infinity are not checked.
    """
    settings = Settings(solver, nfe, grid, afs, final, end)  # type: ignore[arg-type]
    program = resolve(settings, denoiser, sigma_min=sigma_min, sigma_max=sigma_max)
    return finish(program, denoiser, x_T, seeds)


def iterate(
    denoiser: Denoiser,
    x_T: Tensor,
    solver: str | Solver | Runnable = "dpmpp-2m",
    nfe: int | None = None,
    *,
    grid: str | Sequence[float] | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    seeds: Sequence[int] | None = None,
    afs: str = "none",
    final: bool = False,
    end: str = "sigma_min",
) -> Generator[State, State | None, None]:
    """`solve`, one accepted state at a time.

    That serves previews, progress, projections (in-painting), restarts and detaching. Close the
    generator to cancel.

    Args:
        denoiser, x_T, solver, nfe, grid, seeds: as in `solve`
        sigma_min, sigma_max, afs, final, end: as in `solve`

    Yields:
        A `State` after each accepted step; it goes on from the State that is sent back, or from its
        own. The tensors of a yielded State are never written to again.

    Raises:
        ValueError: as in `solve`.
    """
    settings = Settings(solver, nfe, grid, afs, final, end)  # type: ignore[arg-type]
    program = resolve(settings, denoiser, sigma_min=sigma_min, sigma_max=sigma_max)
    return run(program, denoiser, x_T, seeds)
