"""A plan cut at its evaluations, as a scheduler of diffusers runs it.

Each evaluation is one of the scheduler's timesteps, the stages inside an interval included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from fewstep.plan import Combine, Eval, Op, Ops, Plan, Program

__all__ = ["Stage", "Staged"]


@dataclass(frozen=True)
class Stage:
    """One evaluation of a plan.

    Attributes:
        sigma: the level of the state
        told: the level that the network is told
        rested: whether the state is an accepted one, and no trial
        place: of the evaluation among the plan's operations
    """

    sigma: float
    told: float
    rested: bool
    place: int


def _ops(ops: tuple[Op, ...]) -> Ops:
    """A module's function, so that a scheduler can be pickled in the middle of a run."""
    for op in ops:  # replies are sent, which a tuple does not take
        yield op


@dataclass(frozen=True)
class Staged:
    """A plan cut at its evaluations.

    Attributes:
        start: the level at which it begins
        place: the operation at which it begins
        stages: its evaluations
        end: the level at which it ends
    """

    plan: Plan
    start: float
    place: int
    stages: tuple[Stage, ...]
    end: float

    @classmethod
    def cut(cls, plan: Plan) -> Staged:
        """Raise ValueError for a plan without evaluations, or that needs the data's statistics."""
        stages: list[Stage] = []
        rested, end = True, plan.sigmas[0]
        for place, op in enumerate(plan.ops):
            if isinstance(op, Combine):
                rested, end = op.accept, float(op.sigma)
            elif op.source == "mean":
                raise ValueError(
                    "afs='mean' needs the mean of the network's D, which a scheduler does not "
                    "know; take afs='zero' or 'none'"
                )
            elif op.source == "path":
                raise ValueError(
                    "consistency-pca needs the statistics of a model folder's data, which a "
                    "scheduler does not know; take consistency-kappa"
                )
            elif op.source == "net":
                told = op.sigma if op.cond is None else op.cond
                stages.append(Stage(float(op.sigma), float(told), rested, place))
        if not stages:
            raise ValueError("the plan evaluates no network")
        start, place = plan.sigmas[0], 0
        if all(isinstance(op, Combine) for op in plan.ops[: stages[0].place]):
            # noise on top of noise: the pipeline's start is as good at the higher level
            start, place = stages[0].sigma, stages[0].place
            stages[0] = replace(stages[0], rested=True)
        return cls(plan, start, place, tuple(stages), end)

    @property
    def moves(self) -> bool:
        """Whether the sample at the start is not yet what the network is given first."""
        return self.place < self.stages[0].place or self.stages[0].told != self.start

    @property
    def order(self) -> int:
        """Evaluations of an interval, the most of all, which is what all but the last have."""
        points, count = self.plan.sigmas, len(self.stages)
        if self.plan.program().draws:  # levels with added noise lie above their interval
            return math.ceil(count / (len(points) - 1))
        inside = [sum(low < s.sigma <= high for s in self.stages) for high, low in pairwise(points)]
        return max(1, *inside)

    def begins_at(self, index: int) -> bool:
        """Whether stage `index` needs no outputs of those before it."""
        if not self.stages[index].rested:
            return False
        held = 0
        for op in self.plan.ops[self.stages[index].place :]:
            if isinstance(op, Eval):
                held = min(held + 1, self.plan.depth)
            elif len(op.b) > held:
                return False
        return True

    def program(self, index: int = 0) -> Program:
        """What the loop runs, from stage `index` on; from the start at 0."""
        place = self.stages[index].place if index else self.place
        return replace(self.plan.program(), start=partial(_ops, self.plan.ops[place:]))
