"""The teacher: another solver on a finer grid that has the student's points among its own.

Between two of the student's levels lie `inner` more, by the grid's own formula where it has a name,
uniform in log sigma where it is sigmas. The teacher's evaluations at the student's points are kept
with its states: a student that starts a step there need not repeat them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fewstep.cache import recall
from fewstep.denoiser import Denoiser, Wrapper
from fewstep.grid import check_grid, make_grid
from fewstep.loop import run
from fewstep.plan import Eval, Ops, Program, Seen
from fewstep.schedule import Schedule
from fewstep.solver import get

__all__ = [
    "Frozen",
    "Kept",
    "Path",
    "Recalled",
    "Teacher",
    "check_teacher",
    "fine_grid",
    "whole_grid",
]


@dataclass(frozen=True)
class Path:
    """The teacher's way through the student's points.

    states: at each of the student's levels, the start first
    seen: what the teacher saw of the denoiser at those of these states where it looked
    """

    states: tuple[Tensor, ...]
    seen: tuple[Seen, ...]


@dataclass(frozen=True)
class Teacher:
    """A deterministic solver by name on a fine grid.

    sigmas: the student's levels, each of which is in `fine` to the bit
    features: whether to look at the network's features at the student's levels

    Raises:
        ValueError: for a solver that draws noise or adapts.
    """

    solver: str
    sigmas: tuple[float, ...]
    fine: tuple[float, ...]
    features: bool = False

    def __post_init__(self) -> None:
        check_teacher(self.solver)

    @property
    def evaluations(self) -> int:
        """How many it spends on a path."""
        return get(self.solver).on(self.fine).evaluations

    @torch.no_grad()
    def path(self, denoiser: Denoiser, x_T: Tensor) -> Path:
        seen: list[Seen] = []
        program = get(self.solver).on(self.fine)
        watched = replace(program, start=partial(self._watched, program, seen), adapts=True)
        states = {self.sigmas[0]: x_T}
        for state in run(watched, denoiser, x_T):
            if state.sigma in self.sigmas:
                states[state.sigma] = state.x  # type: ignore[index]
        path = tuple(states[sigma] for sigma in self.sigmas)
        return Path(path, tuple(s for s in seen if any(s.x is x for x in path)))

    def _watched(self, program: Program, seen: list[Seen]) -> Ops:
        """The same operations, the replies at the student's levels noted."""
        ops = program.start()
        reply = None
        while True:
            try:
                op = ops.send(reply)
            except StopIteration:
                return
            mine = isinstance(op, Eval) and op.sigma in self.sigmas
            reply = yield op._replace(features=self.features) if mine else op
            if mine and reply is not None:
                seen.append(reply)


@dataclass(frozen=True)
class Kept:
    """A teacher whose paths are kept in a folder, for other runs on the same network.

    folder: None keeps nothing
    facts: all that a path depends on besides the teacher and the seeds
    """

    teacher: Teacher
    folder: FilePath | None
    facts: dict[str, Any]

    def path(self, denoiser: Denoiser, x_T: Tensor, seeds: Sequence[int]) -> Path:
        """The states of `Teacher.path`, from the folder where they are there. What the teacher saw
        is not kept, and neither is what is not finite."""
        if self.folder is None:
            return self.teacher.path(denoiser, x_T)
        key = {**self.facts, **asdict(self.teacher), "seeds": list(seeds)}
        shape = (len(self.teacher.sigmas) - 1, *x_T.shape)

        def solved() -> Tensor:
            return torch.stack(self.teacher.path(denoiser, x_T).states[1:])

        states = recall(self.folder, key, shape, solved).to(x_T.device)
        return Path((x_T, *states.unbind()), ())


def check_teacher(name: str) -> None:
    """Raise ValueError for a name that is no deterministic solver's."""
    solver = get(name)
    if solver.stochastic or solver.adapts:
        raise ValueError(f"a teacher must be a deterministic solver, {name} is not")


def fine_grid(
    grid: str | None,
    sigmas: Sequence[float],
    inner: int,
    schedule: Schedule | None = None,
) -> tuple[float, ...]:
    """The student's levels, and `inner` more in each interval.

    Args:
        grid: the name by which `sigmas` were made, or None
    """
    each = inner + 1
    if grid is not None:
        points = each * (len(sigmas) - 1) + 1
        fine = list(make_grid(grid, points, sigmas[0], sigmas[-1], schedule))
        fine[::each] = sigmas  # the same but for rounding
        return check_grid(fine)
    inside = [cur * (nxt / cur) ** (k / each) for cur, nxt in pairwise(sigmas) for k in range(each)]
    return check_grid([*inside, sigmas[-1]])


def whole_grid(
    intervals: int,
    sigma_max: float,
    sigma_min: float,
    end: float,
    schedule: Schedule | None = None,
) -> tuple[float, ...]:
    """From end to end in steps of its own, for a solve that is nearly exact.

    Args:
        end: sigma_min, or 0: then the last interval goes from sigma_min to 0, and its D is the end
        schedule: the network's; Karras, or uniform in log sigma where the network has a time of its
            own, for there sigma_max may stand for infinity (flows), and a Karras grid hardly gets
            down
    """
    own = schedule is not None and schedule.own_time
    points = intervals + (end > 0)
    down = make_grid("log-snr" if own else "karras", points, sigma_max, sigma_min)
    return check_grid(down if end > 0 else (*down, 0.0))


@dataclass(frozen=True, eq=False)
class Frozen(Wrapper):
    """A denoiser that gradients pass through and never stay in.

    Where nothing before a call asks for a gradient, none is kept: the call costs what it costs
    without.

    checkpointed: forget what a call computed and compute it again for its gradient, so that memory
        does not grow with the number of calls that a loss spans
    """

    denoiser: Any
    checkpointed: bool = False

    def evaluate(
        self, inner: Callable[..., Any], x: Tensor, sigma: Tensor, *conditions: Any
    ) -> tuple[Tensor, Any]:
        if not (torch.is_grad_enabled() and (x.requires_grad or sigma.requires_grad)):
            with torch.no_grad():
                return inner(x, sigma, *conditions)
        if self.checkpointed:
            again: Any = checkpoint(
                inner, x, sigma, *conditions, use_reentrant=False, preserve_rng_state=False
            )
            return again
        return inner(x, sigma, *conditions)


@dataclass(frozen=True, eq=False)
class Recalled(Wrapper):
    """A denoiser that has been seen already at some states: there, it is not asked again.

    seen: a state is known by being the very tensor, at the level that it was seen at
    """

    denoiser: Any
    seen: tuple[Seen, ...]

    def evaluate(
        self, inner: Callable[..., Any], x: Tensor, sigma: Tensor, *conditions: Any
    ) -> tuple[Tensor, Any]:
        for known in self.seen:
            if known.x is x:
                return known.denoised, known.features
        return inner(x, sigma, *conditions)
