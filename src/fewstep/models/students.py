"""What makes a consistency function of a network: its boundary, around D; and its levels.

    f = skip x + out x0_hat        x in EDM units, f(x) = x at the clean end

A student in K segments is asked for the point of the path at the lower edge b of its own segment,
in place of the end: the jump there from level t is

    J = (b/t) x + (1 - b/t) f      which for b = 0 is f, and for b = t is x

so a step of `ddim` from level to level is what it was trained for, where these are the edges.

Sources: Luo et al. 2023 (LCM), arXiv:2310.04378, for the boundary of discrete-time models; Heek et
al. 2024 (multistep consistency models), arXiv:2403.06807, for segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.denoiser import Condition, Evaluation, Wrapper, per_sample
from fewstep.grid import make_grid
from fewstep.models.card import Card, Choice, Distilled
from fewstep.schedule import Schedule

__all__ = [
    "SAMPLERS",
    "Boundary",
    "CleanEnd",
    "Consistency",
    "a_budget",
    "check_segments",
    "DiscreteEnd",
    "as_lcm",
    "choices",
    "consistency",
    "edges",
    "jump",
    "own_levels",
    "phase_levels",
    "phased",
    "student_levels",
    "x0_hat",
]

BUDGETS = range(1, 9)  # evaluations for which a student's card has levels
SAMPLERS = ("consistency", "consistency-ode", "consistency-kappa", "consistency-pca")
CHORD = "ddim"  # the solver that consistency-ode is
NEAR = 1e-6  # levels this near are one
LCM_POINTS = 51  # of the published ones' training: 50 steps of 20 times


def x0_hat(x_gamma: Tensor, denoised: Tensor, ratio: Tensor) -> Tensor:
    """The clean picture that D at x_gamma stands for; [b] ratio of its level to the told one.

    eps divides by the level that the network is told, sigma_t, and not by that of x_gamma. At ratio
    = 1 it is D to the bit.
    """
    r = per_sample(ratio, x_gamma)
    return (1 - r) * x_gamma + r * denoised


def consistency(
    x: Tensor, denoised: Tensor, ratio: Tensor, scalings: tuple[Tensor, Tensor]
) -> Tensor:
    """f = skip x + out x0_hat, [b, ...]; everything else [b]."""
    skip, out = (per_sample(scale, x) for scale in scalings)
    return skip * x + out * x0_hat(x, denoised, ratio)


def jump(x: Tensor, estimate: Tensor, ratio: Tensor) -> Tensor:
    """J, from x at level t to the edge at ratio t; [b, ...], ratio [b]."""
    r = per_sample(ratio, x)
    return r * x + (1 - r) * estimate


class Boundary(Protocol):
    """The role: (skip, out) of f = skip x + out x0_hat, with x in EDM units, so that f(x) = x at
    the clean end.

    sigma: [b], float64 in training
    """

    def __call__(self, sigma: Tensor, /) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class CleanEnd:
    """f = x0_hat, and f = x at sigma_min or below: for networks in continuous time."""

    sigma_min: float

    def __call__(self, sigma: Tensor, /) -> tuple[Tensor, Tensor]:
        skip = (sigma <= self.sigma_min * (1 + 1e-6)).to(sigma)  # levels that went through float32
        return skip, 1 - skip


@dataclass(frozen=True)
class DiscreteEnd:
    """The published boundary of discrete-time models, in which f = x at t = 0:

        skip = alpha_t d^2 / ((k t)^2 + d^2)      out = k t / sqrt((k t)^2 + d^2)

    d, k: `data` and `scaling`, with the published values
    """

    schedule: Schedule
    data: float = 0.5
    scaling: float = 10.0

    def __call__(self, sigma: Tensor, /) -> tuple[Tensor, Tensor]:
        t = self.scaling * self.schedule.t(sigma)
        total = t.square() + self.data**2
        return self.schedule.alpha(sigma) * self.data**2 / total, t / total.sqrt()


@dataclass(frozen=True, eq=False)
class Consistency(Wrapper):
    """A trained student's f at gamma = 1, as a denoiser; inside a counter, outside guidance."""

    denoiser: Any
    boundary: Boundary

    def evaluate(
        self, inner: Evaluation, x: Tensor, sigma: Tensor, *conditions: Condition
    ) -> tuple[Tensor, Any]:
        denoised, features = inner(x, sigma, *conditions)
        ratio = torch.ones_like(sigma)
        return consistency(x, denoised, ratio, self.boundary(sigma)), features


def student_levels(levels: Sequence[float], nfe: int) -> tuple[float, ...]:
    """The grid on which a student spends `nfe` evaluations: levels that it was trained on, spread
    evenly from the first, then 0.

    Level i of the evaluations is number floor(i (N - 1) / nfe) of the N of its training grid; the
    last of these was never the start of a sub-path.

    Raises:
        ValueError: there are too few.
    """
    starts = len(levels) - 1
    if not 1 <= nfe <= starts:
        raise ValueError(f"a student on {starts} sub-paths takes 1 to {starts} nfe, got {nfe}")
    return (*(levels[i * starts // nfe] for i in range(nfe)), 0.0)


def edges(points: int, phases: int) -> tuple[int, ...]:
    """Where each of so many segments ends: numbers on a training grid of `points` levels.

    Raises:
        ValueError: there are fewer sub-paths than segments.
    """
    if not 1 <= phases <= points - 1:
        raise ValueError(f"phases must be from 1 to the {points - 1} sub-paths, got {phases}")
    return tuple(k * (points - 1) // phases for k in range(1, phases + 1))


def phase_levels(levels: Sequence[float], nfe: int, phases: int) -> tuple[float, ...]:
    """The grid on which a student in `phases` segments spends `nfe` evaluations: the edges, and
    inside the segments, the last ones first, levels of the training grid; then 0.

    Raises:
        ValueError: there are fewer evaluations than segments, or too few levels in one.
    """
    if nfe < phases:
        raise ValueError(f"{phases} segments take at least {phases} nfe, got {nfe}")
    starts = (0, *edges(len(levels), phases))
    taken: list[float] = []
    for k in range(phases):
        low, count = starts[k], starts[k + 1] - starts[k]
        spent = nfe // phases + (k >= phases - nfe % phases)
        if spent > count:
            raise ValueError(f"a segment of {count} sub-paths takes up to {count} nfe, got {spent}")
        taken += [levels[low + i * count // spent] for i in range(spent)]
    return (*taken, 0.0)


def phased(model: Any, nfe: int) -> Any:
    """The model, told the number of segments for a budget, where it is told any."""
    phases = model.card.phases(nfe)
    return model if phases is None else replace(model, phases=phases)


def choices(levels: Sequence[float], sampler: str, phases: Sequence[int] = ()) -> dict[str, Choice]:
    """The best known way to spend each budget, of a student; of one in segments by the most of them
    that the budget allows."""
    if not phases or tuple(phases) == (1,):
        grids = {n: student_levels(levels, n) for n in BUDGETS if n < len(levels)}
        return {str(nfe): Choice(sampler, grid) for nfe, grid in grids.items()}
    found: dict[str, Choice] = {}
    for nfe in BUDGETS:
        for k in sorted((k for k in phases if k <= nfe), reverse=True):
            with suppress(ValueError):
                grid = phase_levels(levels, nfe, k)
                told = k if len(phases) > 1 else None
                found[str(nfe)] = Choice(sampler, grid, phases=told)
                break
    return found


def check_segments(card: Card, nfe: int, solver: str, grid: Sequence[float]) -> None:
    """Raise ValueError for what a student in segments cannot do: another solver than the step to
    the edge, or a step beyond it.

    Args:
        solver: its name; nfe: from which follows in how many segments
        grid: the levels that it goes through, 0 at the end
    """
    known = card.distilled
    if known is None or not card.in_segments:
        return
    told = card.phases(nfe) or known.phases[0]
    marks = [known.levels[i] for i in edges(len(known.levels), told)[:-1]]
    for t, s in pairwise(grid):
        edge = max((mark for mark in marks if mark < t * (1 - NEAR)), default=0.0)
        if s < edge * (1 - NEAR):
            raise ValueError(
                f"{card.name} in {told} segments goes from sigma {t:g} to the edge {edge:g}, and "
                f"not to {s:g} beyond it; leave the grid out"
            )
    if solver != CHORD:
        raise ValueError(
            f"{card.name} goes its path in segments, from edge to edge, which is sampler "
            f"consistency-ode; got {solver}"
        )


def a_budget(card: Card) -> int:
    """Evaluations to try a student with: 4, or the fewest above that it has levels for."""
    have = sorted(map(int, card.auto))
    return next((n for n in have if n >= 4), have[-1])


def own_levels(card: Card, nfe: int) -> Sequence[float]:
    """The levels on which a student spends a budget by its card, whatever the solver.

    Raises:
        ValueError: the card has none for it.
    """
    choice = card.auto.get(str(nfe))
    if choice is None or choice.grid is None:
        have = ", ".join(card.auto) or "none"
        raise ValueError(
            f"{card.name} is distilled and has levels for {have} evaluations, not for {nfe}; "
            "take one of these, or give a grid"
        )
    return choice.grid


def as_lcm(card: Card, schedule: Schedule) -> Card:
    """The card of a published latent consistency model, which was trained on 50 levels."""
    levels = make_grid("trailing", LCM_POINTS, schedule.sigma_max, schedule.sigma_min, schedule)
    known = Distilled("lcm", levels, "unknown", "", "discrete", gamma_input="none")
    return replace(card, auto=choices(levels, "consistency"), distilled=known)
