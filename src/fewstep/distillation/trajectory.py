"""One step of distilling trajectories: the student's own steps, from noise, beside the teacher's.

    x_k+1 = J(x_k; b_k)       the student's step from edge to edge of its segments
    goal    the f that lands on the teacher's state at the next edge, from the same noise

Each step is trained by itself, from where the student has come with the steps before: between
steps no gradient passes. Or, end to end, the loss is at the end of the path alone, and its gradient
passes through all steps; where that is in features, the distance of the batch's means is added.

No data are needed. For each number of segments the student goes the whole path, the teacher once
for all of them.

Sources: Zhou et al. 2024 (simple and fast distillation), arXiv:2409.19681, for the steps; the loss
at the end is that of `fewstep.learned.tuned`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.denoiser import Condition
from fewstep.distillation.losses import Draw, Levels, Metric, guided, told_of
from fewstep.distillation.metric import InFeatures
from fewstep.distillation.recipe import Recipe
from fewstep.distillation.subject import Subject
from fewstep.distillation.teacher import Stepper, Walker
from fewstep.models.students import consistency, edges, jump

__all__ = ["trajectory_losses"]


def trajectory_losses(
    subject: Subject,
    step: Stepper | Walker,
    levels: Levels,
    drawn: Draw,
    condition: Condition,
    recipe: Recipe,
    metric: Metric,
) -> Iterator[Tensor]:
    """Losses, [b] each, which sum to that of each picture; gradients to subject.student. One graph
    is alive at a time.

    Args:
        condition: of the pictures, b rows, dropped ones replaced; as in `subpath_losses`
    """
    device = next(subject.student.parameters()).device
    x_T = subject.noise * drawn.eps.to(device)
    with torch.no_grad():
        states = step.states(guided(subject, condition, drawn.guidance, recipe), x_T)
    for which, count in enumerate(recipe.segments):
        some = drawn._replace(phases=torch.full_like(drawn.phases, which))
        walk = _Walk(subject, levels, some, condition, recipe)
        marks, x = (0, *edges(len(states), count)), x_T
        for start, end in pairwise(marks):
            estimate, ratio = walk.step(x, start)
            after = jump(x, estimate, ratio)
            if not recipe.end_to_end:
                goal = (states[end] - ratio[0].to(x) * x) / (1 - ratio[0].to(x))
                weight = 1 - float(ratio[0]) if recipe.phase_weight == "edge" else 1.0
                yield weight * metric(estimate, goal) / sum(recipe.segments)
                after = after.detach()
            x = after
        if recipe.end_to_end:
            whole = metric.of_ends if isinstance(metric, InFeatures) else metric
            yield whole(x, states[-1]) / len(recipe.segments)


class _Walk:
    """The student's steps under one condition."""

    def __init__(
        self, subject: Subject, levels: Levels, drawn: Draw, condition: Condition, recipe: Recipe
    ) -> None:
        self.subject, self.levels, self.drawn = subject, levels, drawn
        self.condition, self.recipe = condition, recipe

    def step(self, x: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """f of states at a level of the grid, and the ratio of its edge to that, [b]."""
        ones, levels = torch.ones_like(self.drawn.gamma), self.levels
        t = torch.full_like(self.drawn.n, start)
        told = told_of(self.recipe, self.drawn, ones, x)
        sigma = levels.sigma[t]
        student, denoise = self.subject.student, self.subject.denoise
        denoised = denoise(student, x, sigma.to(x), self.condition, told)
        estimate = consistency(x, denoised, ones, (levels.skip[t], levels.out[t]))
        return estimate, levels.edge[self.drawn.phases, t] / sigma
