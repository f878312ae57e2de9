"""One step of a distillation: what it draws, and the loss of it.

    draw    n, gamma, noise          t = levels[n], s = levels[n + 1], x_t = x_0 + sigma_t eps
    teacher x_s = a solver's step from x_t to s, under guidance: one batched call
    target  f(x_s; s, gamma = 1) of the slow average of the student, without gradient
    student f(x_gamma; sigma_gamma), x_gamma = (1 - gamma) x_s + gamma x_t
            or, as published, told t and gamma
    loss    the metric's distance of the two

In segments both are asked for the point at the lower edge b of the sub-path's own segment, and the
target is the f that lands there:

    z       (b/s) x_s + (1 - b/s) f(x_s; s)
    goal    (z - (b/sigma_gamma) x_gamma) / (1 - b/sigma_gamma)

which for b = 0, one segment, is the target above to the bit. Where s is the edge, the goal is the
teacher's own chord, all along the line.

With gamma = 1 throughout this is LCM. gamma has a point mass at 1, the only value at inference,
which a uniform draw never gives. Every draw is a function of (seed, step).

Sources: SPLAM, arXiv:2404.13903; Luo et al. 2023 (LCM), arXiv:2310.04378; Heek et al. 2024
(multistep consistency models), arXiv:2403.06807.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.denoiser import Bound, Condition, Guided, per_sample
from fewstep.distillation.recipe import Recipe
from fewstep.distillation.subject import Subject
from fewstep.distillation.subpath import RULES, on_line
from fewstep.distillation.teacher import Stepper
from fewstep.models.students import consistency, edges, jump
from fewstep.networks.conditioning import indices
from fewstep.noise import generator
from fewstep.solving import solve
from fewstep.train.order import batch_indices

__all__ = ["Draw", "Levels", "Metric", "draw", "guided", "subpath_losses", "told_of"]

NEAREST = 0.05  # least gamma in segments; the goal divides by almost nothing below

Metric = Callable[[Tensor, Tensor], Tensor]  # (estimate, goal) [b, ...] -> [b]


class Levels(NamedTuple):
    """Tables over the training grid, float64 [points]: the levels, and the scalings of f there; and
    for each number of segments the level of each sub-path's edge, [numbers, points - 1]."""

    sigma: Tensor
    skip: Tensor
    out: Tensor
    edge: Tensor

    @classmethod
    def of(
        cls, sigmas: Sequence[float], boundary: Callable, phases: Sequence[int] = (1,)
    ) -> Levels:
        sigma = torch.tensor(sigmas, dtype=torch.float64)
        ends = torch.cat((sigma[:-1], sigma.new_zeros(1)))  # the last edge is the clean end
        table = []
        for count in phases:
            marks = torch.tensor(edges(len(sigma), count))
            table.append(ends[marks[torch.searchsorted(marks, torch.arange(1, len(sigma)))]])
        skip, out = boundary(sigma)
        return cls(sigma, skip, out, torch.stack(table))


class Draw(NamedTuple):
    """What one step draws, for each of its pictures, on the CPU.

    chosen: index of the picture
    n: the sub-path, from levels[n] to levels[n + 1]
    gamma, guidance: float64
    phases: which of the numbers of segments
    dropped: whether its condition is left out
    eps: standard normal, [b, ...]
    """

    chosen: Tensor
    n: Tensor
    gamma: Tensor
    guidance: Tensor
    phases: Tensor
    dropped: Tensor
    eps: Tensor

    def part(self, which: slice) -> Draw:
        return Draw(*(value[which] for value in self))


def draw(recipe: Recipe, step: int, count: int, paths: int, shape: Sequence[int]) -> Draw:
    """The draws of one step, from `count` pictures and `paths` sub-paths; n is stratified."""
    gen, b = generator(recipe.seed, "sub-paths", step), recipe.batch
    n = (torch.arange(b) + torch.rand(b, generator=gen, dtype=torch.float64)) / b * paths
    uniform, low_high = torch.rand(4, b, generator=gen, dtype=torch.float64), recipe.scales
    gamma = torch.where(uniform[0] < recipe.ones, 1.0, uniform[1])
    several = len(recipe.segments)
    if recipe.segments != (1,):
        gamma = gamma.clamp(min=NEAREST)
    eps = torch.randn(b, *shape, generator=gen)
    phases = torch.randint(several, (b,), generator=gen) if several > 1 else torch.zeros(b).long()
    return Draw(
        chosen=batch_indices(count, b, recipe.seed, step, name="order"),
        n=n.long().clamp(max=paths - 1),
        gamma=gamma,
        guidance=low_high[0] + (low_high[1] - low_high[0]) * uniform[2],
        phases=phases,
        dropped=uniform[3] < recipe.dropout,
        eps=eps,
    )


def subpath_losses(
    subject: Subject,
    target: nn.Module,
    step: Stepper,
    levels: Levels,
    drawn: Draw,
    x_0: Tensor,
    condition: Condition,
    recipe: Recipe,
    metric: Metric,
) -> Tensor:
    """The loss of each picture, [b], with gradients to subject.student.

    Args:
        target: the student's slow average
        x_0: clean states on the device, [b, ...]; condition: theirs, b rows, dropped ones replaced
    """
    t, s = drawn.n, drawn.n + 1
    sigma_t, sigma_s = (levels.sigma[i].to(x_0) for i in (t, s))
    ones = torch.ones_like(drawn.gamma)
    with torch.no_grad():
        x_t = x_0 + per_sample(sigma_t, x_0) * drawn.eps.to(x_0)
        teacher = guided(subject, condition, drawn.guidance, recipe)
        x_s = solve(teacher, x_t, step.program(drawn.n))
        told = told_of(recipe, drawn, ones, x_0)
        denoised = subject.denoise(target, x_s, sigma_s, condition, told)
        goal = consistency(x_s, denoised, ones, (levels.skip[s], levels.out[s]))
        edge = levels.edge[drawn.phases, t]
        landed = jump(x_s, goal, edge / levels.sigma[s])
    x_gamma = on_line(x_s, x_t, drawn.gamma)
    q = levels.sigma[s] / levels.sigma[t]
    ratio = RULES[recipe.level_rule](drawn.gamma, q)
    kept = edge / (ratio * levels.sigma[t])
    goal = (landed - per_sample(kept, x_0) * x_gamma) / per_sample(1 - kept, x_0)
    level, scalings = sigma_t, (levels.skip[t], levels.out[t])
    if recipe.tell != "gamma":  # eps divides by the told level, which is sigma_gamma then
        sigma_gamma = ratio * levels.sigma[t]
        level, scalings, ratio = sigma_gamma.to(x_0), subject.boundary(sigma_gamma), ones
    told = told_of(recipe, drawn, drawn.gamma, x_0)
    denoised = subject.denoise(subject.student, x_gamma, level, condition, told)
    estimate = consistency(x_gamma, denoised, ratio, scalings)
    losses = metric(estimate, goal)
    return losses * (1 - kept).to(losses) if recipe.phase_weight == "edge" else losses


def guided(subject: Subject, condition: Condition, scale: Tensor, recipe: Recipe) -> Any:
    """The teacher under its conditions; both passes of guidance are one batched call."""
    far = subject.far_mean
    if recipe.scales == (1.0, 1.0):
        return Bound(subject.teacher, condition, far(condition))
    if recipe.scales == (0.0, 0.0):
        return Bound(subject.teacher, subject.none, far(subject.none))
    means = far(condition), far(subject.none)
    both = None if means[0] is None or means[1] is None else (means[0], means[1])
    return Guided(subject.teacher, scale, condition, subject.none, both)


def told_of(recipe: Recipe, drawn: Draw, gamma: Tensor, x: Tensor) -> Tensor | None:
    """What the student is told of the draws beside the level, [b, numbers]."""
    phases = torch.tensor(recipe.segments)[drawn.phases]
    told = indices(recipe.told, gamma, drawn.guidance, phases)
    return None if told is None else told.to(x.device)
