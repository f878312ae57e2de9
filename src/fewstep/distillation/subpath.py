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

f is `fewstep.models.students.consistency`.

Source: SPLAM, arXiv:2404.13903; the metric is that of Song & Dhariwal 2023, arXiv:2310.14189.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.denoiser import per_sample

__all__ = ["LOSSES", "RULES", "on_line"]

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
