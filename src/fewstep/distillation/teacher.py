"""The teacher's step down a sub-path, for a batch of which every sample has its own sub-path.

A solver's plan is drained on each interval of the training grid. All of these have the same
operations and differ in their numbers, so they are one plan whose numbers are tables over the
intervals; a batch takes its rows. The loop then runs it as any other program, with [b] tensors for
coefficients.

For trajectories the teacher walks the whole path from noise. There a plan whose steps look back, as
those of a learned table, is a teacher too, and every accepted state is a level's.

`addim` is a teacher alone, and no solver of the ODE. D is the mean of the clean pictures at x, so a
step of `ddim` loses the variance about it. This one puts it back along eps:

    x_s = D + (s^2 + (1 - s/t)^2 v)^1/2 eps        v = 0.1 / (2 + 1/t^2)

with the length of eps taken for that of noise, so that a step is a row of numbers like any other.

Source: Heek et al. 2024 (multistep consistency models), arXiv:2403.06807.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.grid import make_grid
from fewstep.loop import run
from fewstep.plan import Combine, Eval, Op, Ops, Plan, Prediction, Program, freeze
from fewstep.schedule import Schedule
from fewstep.solver import Solver, get
from fewstep.solving import solve

__all__ = ["Stepper", "Walker", "stepper", "walker"]

ADDIM = "addim"
DEFAULT_POINTS, DEFAULT_GRID, DEFAULT_SUBSTEPS = 10, "time-uniform", 2
Column = Any  # a number that all intervals share, a tuple of columns, or a tensor [intervals]


@dataclass(frozen=True, eq=False)
class Stepper:
    """One step of a solver down any interval of a grid.

    levels: the grid, from sigma_max on
    prediction, depth: as in a plan
    ops: the operations, each an Eval or a Combine whose numbers may be float64 tables [intervals]
    evaluations: of the network, per step
    """

    levels: tuple[float, ...]
    prediction: Prediction
    depth: int
    ops: tuple[Op, ...]
    evaluations: int
    name: str

    @classmethod
    def of(cls, levels: Sequence[float], plans: Sequence[Plan], name: str) -> Stepper:
        """One of the plans of the intervals.

        Raises:
            ValueError: their operations differ in more than numbers.
        """
        for plan in plans[1:]:
            if [_shape(op) for op in plan.ops] != [_shape(op) for op in plans[0].ops]:
                raise ValueError(
                    f"teacher {name} takes other operations on some intervals than on others; "
                    "take one whose steps are alike, such as ddim or heun"
                )
        ops = tuple(
            type(column[0])._make(map(_column, zip(*column, strict=True)))
            for column in zip(*(plan.ops for plan in plans), strict=True)
        )
        head = plans[0].program()
        return cls(tuple(levels), head.prediction, head.depth, ops, head.evaluations, name)

    @property
    def digest(self) -> str:
        """A hash of all its numbers, in hexadecimal."""
        text = repr((self.levels, self.prediction, self.depth))
        text += "".join(repr(_listed(value)) for op in self.ops for value in op)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def program(self, chosen: Tensor) -> Program:
        """For the loop: sample i goes down interval chosen[i], from levels[chosen[i]]; [b]."""
        start = functools.partial(self._start, chosen)
        return Program(
            start, self.prediction, self.depth, self.levels, self.evaluations, name=self.name
        )

    def states(self, denoiser: Denoiser, x_T: Tensor) -> list[Tensor]:
        """The states at all levels, [b, ...] each, from noise x_T on."""
        found = [x_T]
        for n in range(len(self.levels) - 1):
            chosen = torch.full((len(x_T),), n)
            found.append(solve(denoiser, found[-1], self.program(chosen)))
        return found

    def _start(self, chosen: Tensor) -> Ops:
        for op in self.ops:
            yield type(op)._make(_rows(value, chosen) for value in op)


@dataclass(frozen=True, eq=False)
class Walker:
    """A plan that is walked from noise to its end: its steps may look back. What trajectories need
    of a `Stepper`.

    levels: its grid
    evaluations: of the network, over the whole path
    """

    plan: Plan
    name: str

    @property
    def levels(self) -> tuple[float, ...]:
        return self.plan.sigmas

    @property
    def evaluations(self) -> int:
        return self.plan.program().evaluations

    @property
    def digest(self) -> str:
        """A hash of all its numbers, in hexadecimal."""
        return hashlib.sha256(self.plan.to_json().encode()).hexdigest()[:16]

    def states(self, denoiser: Denoiser, x_T: Tensor) -> list[Tensor]:
        """The states at all levels, [b, ...] each, from noise x_T on."""
        return [x_T, *(state.x for state in run(self.plan.program(), denoiser, x_T))]


def walker(teacher: str, **settings: Any) -> Stepper | Walker:
    """The teacher of whole paths: a `stepper`, or a plan or learned solver whose steps look back.

    Args:
        teacher, settings: as `stepper` has them

    Raises:
        ValueError: as of `stepper`.
    """
    if not _is_plan(teacher):
        return stepper(teacher, **settings)
    plan = _read(teacher, **settings)
    if not _looks_back(plan):
        return stepper(teacher, **settings)
    accepted = sum(op.accept for op in plan.ops if isinstance(op, Combine))
    if plan.program().draws or accepted != len(plan.sigmas) - 1:
        raise ValueError(
            f"teacher {teacher} draws noise, or has {accepted} steps on a grid of "
            f"{len(plan.sigmas) - 1} intervals; take a solver of the ODE"
        )
    return Walker(plan, Path(teacher).name)


def stepper(
    teacher: str,
    sigma_max: float,
    sigma_min: float,
    schedule: Schedule | None = None,
    *,
    points: int | None = None,
    grid: str | None = None,
    substeps: int | None = None,
    usual: tuple[int, str] | None = None,
    phases: Sequence[int] = (1,),
) -> Stepper:
    """The teacher's step on a named grid, or that of a plan on its own grid.

    Args:
        teacher: a solver's name, or addim; or a plan in JSON or a learned solver's folder, whose
            steps must not look back beyond their own interval, and which bring their own grid
        points, grid: those of `usual` where left out, else DEFAULT_POINTS and DEFAULT_GRID
        phases: numbers of segments that the grid is to have edges for: where `points` is left out,
            the usual number of sub-paths is raised until they divide it
        substeps: how many steps of the solver one interval takes, on the same kind of grid refined;
            DEFAULT_SUBSTEPS where left out

    Raises:
        ValueError: for a solver that is stochastic, adapts, or whose steps differ in kind.
    """
    if _is_plan(teacher):
        plan = _read(teacher, points=points, grid=grid, substeps=substeps)
        if plan.program().draws or _looks_back(plan):
            raise ValueError(
                f"teacher {teacher} looks back beyond its own interval, or draws noise, so its "
                "steps cannot be taken at random; take a singlestep solver, or method trajectory"
            )
        return _on_own_grid(plan, teacher)
    solver = Solver(ADDIM, _addim, "x0", 1, 1) if teacher == ADDIM else get(teacher)
    if solver.stochastic or solver.adapts:
        raise ValueError(
            f"teacher must be a solver of the ODE that has a plan, {solver.name} has none; "
            "take unipc-2, ddim or heun"
        )
    substeps = DEFAULT_SUBSTEPS if substeps is None else substeps
    if substeps < 1:
        raise ValueError(f"substeps must be at least 1, got {substeps}")
    known = usual or (DEFAULT_POINTS, DEFAULT_GRID)
    if points is None:
        points = -(-(known[0] - 1) // (each := math.lcm(*phases))) * each + 1
    many = substeps * (points - 1) + 1
    fine = make_grid(grid or known[1], many, sigma_max, sigma_min, schedule)
    starts = range(0, len(fine) - 1, substeps)
    plans = [solver.plan(fine[i : i + substeps + 1]) for i in starts]
    return Stepper.of(fine[::substeps], plans, solver.name)


def _addim(sigmas: Sequence[float]) -> Ops:
    """DDIM with the variance put back that a step to the mean loses."""
    for cur, nxt in pairwise(sigmas):
        lost = (1 - nxt / cur) ** 2 * 0.1 / (2 + cur**-2)
        kept = math.sqrt(nxt**2 + lost) / cur
        yield Eval(cur)
        yield Combine((1 - kept,), nxt, a=kept)


def _is_plan(teacher: str) -> bool:
    """Whether it is a file or folder, and no name."""
    named = "/" in teacher or teacher.endswith(".json")
    return named or Path(teacher, "solver.json").is_file()


def _read(teacher: str, **settings: Any) -> Plan:
    """A plan's file, or a learned solver's folder.

    Args:
        settings: those of `stepper`, of which a plan brings its own

    Raises:
        ValueError: it has no plan, or has its own of what is given.
    """
    if any(settings.get(name) is not None for name in ("points", "grid", "substeps")):
        raise ValueError(f"teacher {teacher} has its own grid: leave out points, grid and substeps")
    path = Path(teacher)
    if path.is_dir():
        from fewstep.learned import LearnedSolver

        return LearnedSolver.load(path).plan()
    return Plan.read(path)


def _looks_back(plan: Plan) -> bool:
    """Whether a step uses outputs of the interval before."""
    outputs = 0
    for op in plan.ops:
        if isinstance(op, Eval):
            outputs += 1
        elif len(op.b) > outputs:
            return True
        elif op.accept:
            outputs = 0
    return False


def _on_own_grid(plan: Plan, name: str) -> Stepper:
    """The steps of a plan, one per interval of its grid.

    Raises:
        ValueError: it has another number of steps.
    """
    header = {"prediction": plan.prediction, "depth": plan.depth}
    parts: list[list[Op]] = [[]]
    for op in plan.ops:
        parts[-1].append(op)
        if isinstance(op, Combine) and op.accept:
            parts.append([])
    steps = [part for part in parts if part]
    if len(steps) != len(plan.sigmas) - 1:
        raise ValueError(
            f"teacher {name} takes {len(steps)} steps on a grid of {len(plan.sigmas) - 1} "
            "intervals; it must take one on each"
        )
    plans = [
        freeze(ops, **header, solver=name, sigmas=ends)
        for ops, ends in zip(steps, pairwise(plan.sigmas), strict=True)
    ]
    return Stepper.of(plan.sigmas, plans, name)


def _shape(op: Op) -> tuple[Any, ...]:
    """What must agree between the steps of two intervals."""
    if isinstance(op, Eval):
        return "eval", op.source, op.cond is None, op.features
    return "combine", len(op.b), op.interval, op.accept, bool(op.noise)


def _column(values: tuple[Any, ...]) -> Column:
    """One field over the intervals: itself where all agree, else a table."""
    if isinstance(values[0], tuple):
        return tuple(map(_column, zip(*values, strict=True)))
    if all(value == values[0] for value in values):
        return values[0]
    return torch.tensor(values, dtype=torch.float64)


def _rows(value: Column, chosen: Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(_rows(part, chosen) for part in value)
    return value[chosen] if isinstance(value, Tensor) else value


def _listed(value: Column) -> Any:
    if isinstance(value, tuple):
        return [_listed(part) for part in value]
    return value.tolist() if isinstance(value, Tensor) else value
