"""Sub-paths: the line between two states of a trajectory, and the consistency function on it.

A sub-path runs from the noisier level t to the cleaner level s. In EDM units, with gamma in [0, 1],

    x_gamma  = (1 - gamma) x_s + gamma x_t
    x0_hat   = (1 - ratio) x_gamma + ratio D(x_gamma; told sigma_t and gamma)
    f        = skip x_gamma + out x0_hat

    ratio = sigma_gamma / sigma_t, with q = sigma_s / sigma_t
      variance   ratio^2 = (1 - gamma^2) q^2 + gamma^2      as published
      linear     ratio = (1 - gamma) q + gamma              exact for one DDIM step, see below

The published form is in VP units, where the line has the drift coefficient alpha_t/alpha_s and
x0_hat = (z_gamma - sigma_gamma eps) / alpha_t; dividing by alpha_t gives the above, for every kind
of prediction. The linear rule is exact where x_s is one DDIM step from x_t, since both then have
one eps; x0_hat with that very eps does not depend on gamma.

These are formulas for eps: D divides by the told level, so a network that gives the right x0_hat at
gamma < 1 gives a D with (1 - 1/ratio) sigma_gamma of noise in it. That costs a network that
predicts eps nothing. One that predicts x_0, as under EDM's preconditioning, would have to paint
noise of standard deviation 20 at sigma = 80, and one of v or of flow has the same trouble at large
sigma, where its answer too is as large as a picture. Told sigma_gamma itself, and no gamma, eps
divides by sigma_gamma, and for every kind of network

    x0_hat   = D(x_gamma; told sigma_gamma)

All agree at gamma = 1, the only value at inference.

Source: SPLAM, arXiv:2404.13903; the boundary of discrete-time models is that of Luo et al. 2023
(LCM), arXiv:2310.04378, and the metric that of Song & Dhariwal 2023, arXiv:2310.14189.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.denoiser import Condition, Evaluation, Wrapper, per_sample
from fewstep.schedule import Schedule

__all__ = [
    "LOSSES",
    "RULES",
    "Boundary",
    "CleanEnd",
    "Consistency",
    "DiscreteEnd",
    "consistency",
    "on_line",
    "x0_hat",
]

HUBER = 1e-3  # c of the published training scripts

# (gamma, q) -> ratio; exactly 1 at gamma = 1, and q at gamma = 0
RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "variance": lambda gamma, q: ((1 - gamma**2) * q**2 + gamma**2).sqrt(),
    "linear": lambda gamma, q: (1 - gamma) * q + gamma,
}

# (difference) -> elementwise
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "huber": lambda d: (d.square() + HUBER**2).sqrt() - HUBER,
    "l2": torch.square,
}


def on_line(x_s: Tensor, x_t: Tensor, gamma: Tensor) -> Tensor:
    """x_gamma, [b, ...]; gamma [b]. At gamma = 1 it is x_t to the bit."""
    g = per_sample(gamma, x_t)
    return (1 - g) * x_s + g * x_t


def x0_hat(x_gamma: Tensor, denoised: Tensor, ratio: Tensor) -> Tensor:
    """The clean picture that D at x_gamma stands for; ratio as the module's docstring has it, [b].

    eps divides by the level that the network is told, sigma_t, and not by that of x_gamma. At ratio
    = 1 it is D to the bit.
    """
    r = per_sample(ratio, x_gamma)
    return (1 - r) * x_gamma + r * denoised


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


def consistency(
    x: Tensor, denoised: Tensor, ratio: Tensor, scalings: tuple[Tensor, Tensor]
) -> Tensor:
    """f = skip x + out x0_hat, [b, ...]; everything else [b]."""
    skip, out = (per_sample(scale, x) for scale in scalings)
    return skip * x + out * x0_hat(x, denoised, ratio)


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
