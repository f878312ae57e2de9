"""Singlestep solvers: several evaluations inside each interval, no history between intervals.

In EDM space, with t the current level, s the next one and h = log(t / s), the intermediate levels
are t exp(-r h). A method that is of exponential type falls to its first order into sigma = 0.

Sources: Karras et al. 2022 (Heun), arXiv:2206.00364; Lu et al. 2022 (DPM-Solver), arXiv:2206.00927;
Lu et al. 2022 (DPM-Solver++), arXiv:2211.01095.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from fewstep.plan import Combine, Eval, Ops
from fewstep.solver.rules import expm1, is_zero, log, trapezoid

__all__ = ["dpm_solver_2", "dpm_solver_3", "dpmpp_2s", "heun"]


def heun(sigmas: Sequence[float]) -> Ops:
    """The trapezoidal rule on eps, two evaluations an interval; Euler into sigma = 0, as in EDM.

    From pure noise on (flows, zero terminal SNR) it is the rule in a flow's time; see
    `rules.trapezoid`.
    """
    for cur, nxt in pairwise(sigmas):
        yield Eval(cur)
        yield Combine((nxt - cur,), nxt, accept=is_zero(nxt))
        if is_zero(nxt):
            return
        yield Eval(nxt)
        a, b = trapezoid(cur, nxt, sigmas[0])
        yield Combine(b, nxt, a)


def dpm_solver_2(sigmas: Sequence[float], *, r: float = 0.5) -> Ops:
    """DPM-Solver-2 on eps, the intermediate level at the share r of the log interval (1/2 = the
    midpoint).

    x_s = x_t + (s - t) [eps_mid / (2 r) + (1 - 1 / (2 r)) eps_t]
    """
    for cur, nxt in pairwise(sigmas):
        yield Eval(cur)
        if is_zero(nxt):
            yield Combine((-cur,), nxt)
            return
        mid = cur ** (1 - r) * nxt**r
        yield Combine((mid - cur,), mid, accept=False)
        yield Eval(mid)
        new = (nxt - cur) / (2 * r)
        yield Combine((new, nxt - cur - new), nxt)


def dpm_solver_3(sigmas: Sequence[float]) -> Ops:
    """DPM-Solver-3 on eps: three evaluations an interval, at the shares 0, 1/3 and 2/3 of the log
    interval.

    x_1 = x_t + (s_1 - t) eps_t
    x_2 = x_t + (s_2 - t) eps_t - s_2 (r_2 / r_1) ((e^{r_2 h} - 1) / (r_2 h) - 1) (eps_1 - eps_t)
    x_s = x_t + (s - t) eps_t - (s / r_2) ((e^h - 1) / h - 1) (eps_2 - eps_t)
    """
    r1, r2 = 1 / 3, 2 / 3
    for cur, nxt in pairwise(sigmas):
        yield Eval(cur)
        if is_zero(nxt):
            yield Combine((-cur,), nxt)
            return
        h = log(cur / nxt)
        s1, s2 = cur ** (1 - r1) * nxt**r1, cur ** (1 - r2) * nxt**r2
        yield Combine((s1 - cur,), s1, accept=False)
        yield Eval(s1)
        slope = -s2 * (r2 / r1) * (expm1(r2 * h) / (r2 * h) - 1)
        yield Combine((slope, s2 - cur - slope), s2, accept=False)
        yield Eval(s2)
        slope = -(nxt / r2) * (expm1(h) / h - 1)
        yield Combine((slope, 0.0, nxt - cur - slope), nxt)


def dpmpp_2s(sigmas: Sequence[float], *, r: float = 0.5) -> Ops:
    """DPM-Solver++(2S) on D, the intermediate level at the share r of the log interval.

    x_s = (s / t) x_t + (1 - e^{-h}) [D_mid / (2 r) + (1 - 1 / (2 r)) D_t]
    """
    for cur, nxt in pairwise(sigmas):
        yield Eval(cur)
        if is_zero(nxt):
            yield Combine((1.0,), nxt, a=0.0)
            return
        mid = cur ** (1 - r) * nxt**r
        yield Combine((1 - mid / cur,), mid, a=mid / cur, accept=False)
        yield Eval(mid)
        whole = 1 - nxt / cur
        yield Combine((whole / (2 * r), whole * (1 - 1 / (2 * r))), nxt, a=nxt / cur)
