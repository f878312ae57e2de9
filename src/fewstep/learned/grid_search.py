"""A grid found by dynamic programming, and `grid`: a plain solver on it. Nothing is trained.

On a fine grid the teacher's states x_i and its D_i are known, and with them the end of every DDIM
step from one of its levels to another: with rho = s_j / s_i,

    c_ij = | rho x_i + (1 - rho) D_i - x_j |^2           mean over trajectories, no evaluation

The grid of n intervals with the least sum of c_ij is the shortest path of n edges from the first
level to the last, which dynamic programming finds exactly. But an error made at a high level is not
what is left of it at the end: the flow shrinks it, of data of variance v by sqrt(1 + s^2 / v) from
s to 0, and what later steps do to it is the solver's own affair. So the costs are taken times

    (1 + s_j^2 / v)^-q      for some q from 0 (no error shrinks) to 1/2

and among these paths and the named grids, the one is kept on which the solver itself ends nearest
to the teacher.

The costs and the path are the idea of GITS (Chen et al. 2024, arXiv:2405.11326); the weights and
the choice between the paths are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.learned.method import Lesson, Loss, Method, Recipe, Setup, start_recipe
from fewstep.learned.teacher import Teacher
from fewstep.loop import finish, run
from fewstep.plan import Plan, Program
from fewstep.solver import get

__all__ = ["GRID", "SEARCH", "SEARCHED", "GridKind", "OnGrid", "search_grid", "shortest"]

SEARCH = "search"  # the name of a grid that is to be found
SEARCHED = 64  # trajectories
TEACHER, FINE = "deis-3", 60  # its intervals
WEIGHTS = (0.0, 0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5)  # q

Part = tuple[Denoiser, Tensor]  # a denoiser with its conditions bound, and x_T for it


@torch.no_grad()
def search_grid(
    parts: Sequence[Part],
    fine: tuple[float, ...],
    named: Mapping[str, tuple[float, ...]],
    afs: str,
    student: Callable[[tuple[float, ...]], Any],
    space: Callable[[Tensor], Tensor] | None = None,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(the best grid, the best one that has a name).

    Spends an evaluation on each fine level of a trajectory, and the student's on each candidate.

    Args:
        parts: the trajectories' starts, in as many parts as memory asks for
        fine: the levels among which a path is searched
        named: the grids that it has to beat, all of as many intervals, with the ends of `fine`
        afs: the analytic first step, of which the first cost is that
        student: from a grid to the solver that is to run on it
        space: where ends are compared; None: as they are

    Raises:
        ValueError: for more intervals than the fine grid has.
        FloatingPointError: the denoiser is not finite.
    """
    intervals = len(next(iter(named.values()))) - 1
    if intervals >= len(fine):
        raise ValueError(
            f"a grid is searched among {len(fine) - 1} intervals, got {intervals}; take a named "
            "grid"
        )
    costs, spread, targets = _measure(parts, fine, afs)
    seen = 1 + torch.tensor(fine, dtype=torch.float64).square() / spread
    candidates = dict(named)
    for q in WEIGHTS:
        path = shortest(costs * seen**-q, intervals)
        candidates[f"q={q:g}"] = tuple(fine[i] for i in path)

    def error(name: str) -> float:
        method, total = student(candidates[name]), 0.0
        for (denoiser, x_T), target in zip(parts, targets, strict=True):
            x = finish(method.program(), denoiser, x_T)
            gap = x - target if space is None else space(x) - space(target)
            total += gap.double().square().sum().item()
        return total

    errors = {name: error(name) for name in candidates}
    best = min(candidates, key=errors.__getitem__)
    usual = min(named, key=errors.__getitem__)
    return candidates[best], candidates[usual]


def shortest(costs: Tensor, edges: int) -> list[int]:
    """Nodes of the path from the first to the last of n nodes, by so many edges, whose costs
    [n, n] have the least sum. Only edges forward count."""
    forward = torch.ones_like(costs, dtype=torch.bool).triu(1)
    costs = torch.where(forward, costs, torch.inf)
    best, back = costs[0], []
    for _ in range(edges - 1):
        best, came_from = (best[:, None] + costs).min(0)
        back.append(came_from)
    path = [len(costs) - 1]
    for came_from in reversed(back):
        path.append(int(came_from[path[-1]]))
    return [0, *reversed(path)]


def _measure(
    parts: Sequence[Part], fine: tuple[float, ...], afs: str
) -> tuple[Tensor, float, list[Tensor]]:
    """Sums of squares of the DDIM steps from each fine level to each, [n, n], the variance of the
    ends, and the ends."""
    teacher = Teacher(TEACHER, fine, fine)
    costs = torch.zeros(len(fine), len(fine), dtype=torch.float64)
    targets = []
    for denoiser, x_T in parts:
        path = teacher.path(denoiser, x_T)
        if not torch.isfinite(path.states[-1]).all():
            raise FloatingPointError(
                f"the denoiser returned NaN or infinity between sigma {fine[0]:g} and "
                f"{fine[-1]:g}; try dtype float32, or another guidance"
            )
        states = torch.stack(path.states)  # [n, b, ...]
        outputs: list[Any] = [seen.denoised for seen in path.seen]
        if afs != "none":
            first = get("ddim").on(fine[:2], afs)
            outputs[0] = next(run(first, denoiser, x_T)).denoised
        for i, denoised in enumerate(outputs):
            rho = states.new_tensor([s / fine[i] for s in fine[i + 1 :]])
            rho = rho.reshape(-1, *[1] * x_T.ndim)
            gap = rho * states[i] + (1 - rho) * denoised - states[i + 1 :]
            costs[i, i + 1 :] += gap.square().flatten(1).sum(1).double().cpu()
        targets.append(states[-1])
    everything = torch.cat(targets)
    spread = everything.double().var(0, correction=0).mean().item()
    return costs, max(spread, fine[-1] ** 2), targets


@dataclass(frozen=True, eq=False)
class OnGrid:
    """A solver of the registry on a grid of its own."""

    base: str
    sigmas: tuple[float, ...]
    afs: str
    kind: str = "grid"

    def program(self) -> Program:
        return self.plan().program()

    def plan(self) -> Plan:
        plan = get(self.base).plan(self.sigmas, self.afs, grid="searched")
        return replace(plan, solver=f"{self.base} on a searched grid")

    def parameters(self) -> dict[str, Tensor]:
        return {}

    def settings(self) -> dict[str, Any]:
        return {}

    def options(self) -> dict[str, Any]:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def losses(self, lesson: Lesson) -> Iterator[Loss]:
        return iter(())


@dataclass(frozen=True)
class GridKind:
    """The method by name."""

    name: str = "grid"

    def recipe(
        self, base: str | None, nfe: int, afs: str | None, end: str | None, own_time: bool
    ) -> Recipe:
        return start_recipe(self.name, base, nfe, afs, end, own_time, SEARCH)

    def fresh(self, setup: Setup) -> Method:
        assert setup.base is not None  # the recipe names one
        return OnGrid(setup.base, setup.sigmas, setup.afs)

    def read(
        self,
        base: str | None,
        sigmas: tuple[float, ...],
        afs: str,
        settings: dict[str, Any],
        tensors: dict[str, Tensor],
    ) -> Method:
        found = OnGrid(str(base), sigmas, afs)
        found.plan()  # raises for a solver or a first step that there is not
        return found


GRID = GridKind()
