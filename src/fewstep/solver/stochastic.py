"""Stochastic solvers: noise goes in at every step, keyed by seed.

The ancestral step from t to s splits s^2 into fresh noise up^2 and what is left of the old,

    up^2 = eta^2 s^2 (t^2 - s^2) / t^2        down^2 = s^2 - up^2

which in EDM space is DDIM's sigma(eta) exactly, so DDIM with eta and Euler-ancestral are one
method.

Sources: Song et al. 2021 (DDIM), arXiv:2010.02502; Karras et al. 2022 (EDM, algorithm 2),
arXiv:2206.00364; Lu et al. 2022 (SDE-DPM-Solver++, appendix), arXiv:2211.01095.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from fewstep.plan import Combine, Eval, Ops
from fewstep.solver.rules import trapezoid

__all__ = ["ancestral", "churn", "dpmpp_2m_sde"]


def ancestral(sigmas: Sequence[float], *, eta: float = 1.0) -> Ops:
    """DDIM with eta = Euler-ancestral, on D. eta = 0 is ddim, eta = 1 is DDPM's ancestral
    sampling."""
    for cur, nxt in pairwise(sigmas):
        up = eta * nxt * math.sqrt((cur - nxt) * (cur + nxt)) / cur
        down = math.sqrt((nxt - up) * (nxt + up))
        yield Eval(cur)
        yield Combine((1 - down / cur,), nxt, a=down / cur, noise=up)


def churn(
    sigmas: Sequence[float],
    *,
    churn: float = 40.0,
    low: float = 0.05,
    high: float = 50.0,
    noise: float = 1.003,
) -> Ops:
    """EDM's stochastic sampler: raise the noise a little, then a Heun step from there, on eps.

    As `heun`, it takes the step in a flow's time where the grid starts at pure noise.

    Args:
        sigmas: strictly decreasing
        churn, low, high, noise: S_churn, S_tmin, S_tmax, S_noise of the paper, whose ImageNet 64
            values they have
    """
    gamma = min(churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    for cur, nxt in pairwise(sigmas):
        raised = cur
        if low <= cur <= high and gamma > 0:
            raised = cur * (1 + gamma)
            added = noise * cur * math.sqrt(gamma * (2 + gamma))
            yield Combine((), raised, noise=added)
        yield Eval(raised)
        yield Combine((nxt - raised,), nxt, accept=nxt == 0)
        if nxt == 0:
            return
        yield Eval(nxt)
        a, b = trapezoid(raised, nxt, sigmas[0])
        yield Combine(b, nxt, a)


def dpmpp_2m_sde(sigmas: Sequence[float], *, eta: float = 1.0) -> Ops:
    """SDE-DPM-Solver++(2M) on D, in its midpoint form; noise from one Brownian path per seed.

    x_s = (s / t) e^{-eta h} x + w [(1 + 1 / (2 r)) D_0 - D_1 / (2 r)] + s sqrt(1 - e^{-2 eta h}) xi
    with w = 1 - e^{-(1 + eta) h} and r the ratio of the last log step to this one.
    """
    before = None
    for cur, nxt in pairwise(sigmas):
        yield Eval(cur)
        if nxt == 0:
            yield Combine((1.0,), nxt, a=0.0)
            return
        h = math.log(cur / nxt)
        whole = -math.expm1(-(1 + eta) * h)
        slope = whole * h / (2 * math.log(before / cur)) if before else 0.0
        b = (whole + slope, -slope) if before else (whole,)
        added = nxt * math.sqrt(-math.expm1(-2 * eta * h))
        yield Combine(b, nxt, a=nxt / cur * math.exp(-eta * h), noise=added, interval=(cur, nxt))
        before = cur
