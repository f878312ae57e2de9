"""Step rules: the weights of one step, for Python floats and for [b] tensors with gradients alike.

A rule is `rule(past, nxt, order) -> (a, b)` for the step x_nxt = a x + sum_j b_j y_j, where past[j]
is the noise level of the output y_j, newest first and past[0] the level of x. It uses at most
`order` outputs, fewer where fewer are there. The y are eps or D; every rule says which.

The Adams rules integrate, exactly, the polynomial through the outputs, and differ only in its
variable and in the weight under the integral. With nodes u_j = variable(past[j]) -
variable(past[0]) they solve the Vandermonde system

    sum_j b_j u_j^k = m_k,  k = 0..order-1        m_k the k-th moment of the step

    rule          y     variable   m_k
    adams_sigma   eps   sigma      int_0^h u^k du              = h^(k+1) / (k+1)
    adams_log     eps   log_snr    -s int_0^h e^(h-u) u^k du   = -s h^(k+1) k! phi_{k+1}(h)
    exp_adams     D     log_snr    int_0^h e^(u-h) u^k du      = h^(k+1) k! phi_{k+1}(-h)

with log_snr = -log sigma, h the step in the variable, s the new level.

Sources: Zhang and Chen 2023 (DEIS), arXiv:2204.13902; Lu et al. 2022 (DPM-Solver++),
arXiv:2211.01095; Zhao et al. 2023 (UniPC), arXiv:2302.04867; Liu et al. 2022 (PNDM),
arXiv:2202.09778; Hochbruck and Ostermann 2010 (exponential integrators),
doi:10.1017/S0962492910000048; Bjorck and Pereyra 1970 (Vandermonde systems).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.schedule import PURE_NOISE

__all__ = [
    "Weights",
    "adams_log",
    "adams_sigma",
    "dpmpp_2m",
    "dpmpp_3m",
    "exp_adams",
    "expm1",
    "interpolatory",
    "ipndm",
    "is_zero",
    "log",
    "phi",
    "trapezoid",
    "unic",
    "unip",
]

# The rules are written once for floats and tensors; a type that is both would say no more than this
# one does.
Number = Any
Weights = tuple[Number, tuple[Number, ...]]

# Adams-Bashforth weights on a uniform grid, newest first.
UNIFORM = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def log(value: Number) -> Number:
    return value.log() if isinstance(value, Tensor) else math.log(value)


def expm1(value: Number) -> Number:
    return value.expm1() if isinstance(value, Tensor) else math.expm1(value)


def is_zero(sigma: Number) -> bool:
    """Whether a level is the end of the path; learned levels (tensors) never are."""
    return not isinstance(sigma, Tensor) and sigma == 0


def phi(z: Number, count: int) -> list[Number]:
    """[phi_1(z), ..., phi_count(z)], phi_k(z) = int_0^1 exp((1 - u) z) u^(k-1) / (k-1)! du.

    Below |z| = 1 by the series of the highest and the downward recursion, above it by the upward
    one, which loses at most the digits of count!.
    """
    if isinstance(z, Tensor):
        near = z.abs() < 1
        small = _phi_series(torch.where(near, z, 0.5), count)
        large = _phi_recursion(torch.where(near, 2.0, z), count)
        return [torch.where(near, s, e) for s, e in zip(small, large, strict=True)]
    return _phi_series(z, count) if abs(z) < 1 else _phi_recursion(z, count)


def _phi_series(z: Number, count: int) -> list[Number]:
    top = 1.0 / math.factorial(count + 20)
    for n in reversed(range(20)):
        top = top * z + 1.0 / math.factorial(count + n)
    out = [top]
    for k in reversed(range(1, count)):
        out.insert(0, z * out[0] + 1.0 / math.factorial(k))
    return out


def _phi_recursion(z: Number, count: int) -> list[Number]:
    out = [expm1(z) / z]
    for k in range(1, count):
        out.append((out[-1] - 1.0 / math.factorial(k)) / z)
    return out


def interpolatory(nodes: Sequence[Number], moments: Sequence[Number]) -> tuple[Number, ...]:
    """Weights b with sum_j b_j nodes_j^k = moments_k for every k: the algorithm of Bjorck and
    Pereyra."""
    b, n = list(moments), len(moments)
    for k in range(n - 1):
        for i in reversed(range(k + 1, n)):
            b[i] = b[i] - nodes[k] * b[i - 1]
    for k in reversed(range(n - 1)):
        for i in range(k + 1, n):
            b[i] = b[i] / (nodes[i] - nodes[i - k - 1])
        for i in range(k, n - 1):
            b[i] = b[i] - b[i + 1]
    return tuple(b)


def _phi_moments(h: Number, z: Number, count: int, scale: Number = 1.0) -> list[Number]:
    return [
        scale * math.factorial(k) * h ** (k + 1) * value for k, value in enumerate(phi(z, count))
    ]


def adams_sigma(past: Sequence[Number], nxt: Number, order: int) -> Weights:
    """Adams-Bashforth in sigma, on eps: the LMS of k-diffusion, DEIS in rho, iPNDM on any grid."""
    past = past[:order]
    h = nxt - past[0]
    moments = [h ** (k + 1) / (k + 1) for k in range(len(past))]
    return 1.0, interpolatory([p - past[0] for p in past], moments)


def adams_log(past: Sequence[Number], nxt: Number, order: int) -> Weights:
    """DEIS with polynomials in log sigma, on eps. Order 1 into sigma = 0, where the log has no
    end."""
    past = past[:order]
    if is_zero(nxt):
        return 1.0, (-past[0],)
    h = log(past[0] / nxt)
    nodes = [log(past[0] / p) for p in past]
    return 1.0, interpolatory(nodes, _phi_moments(h, h, len(past), scale=-nxt))


def exp_adams(past: Sequence[Number], nxt: Number, order: int) -> Weights:
    """Exponential Adams-Bashforth, on D: UniP of any order; order 1 is DDIM. Order 1 into sigma =
    0."""
    past = past[:order]
    if is_zero(nxt):
        return 0.0, (1.0,)
    h = log(past[0] / nxt)
    nodes = [log(past[0] / p) for p in past]
    return nxt / past[0], interpolatory(nodes, _phi_moments(h, -h, len(past)))


def ipndm(past: Sequence[Number], nxt: Number, order: int) -> Weights:
    """iPNDM, on eps: Adams-Bashforth with the weights of a uniform grid, whatever the grid is, as
    published."""
    h = nxt - past[0]
    return 1.0, tuple(h * w for w in UNIFORM[min(order, len(past))])


def dpmpp_2m(past: Sequence[Number], nxt: Number, order: int = 2) -> Weights:
    """DPM-Solver++(2M), on D. Order 1 into sigma = 0."""
    past = past[:order]
    if len(past) < 2 or is_zero(nxt):
        return exp_adams(past, nxt, 1)
    h, back = log(past[0] / nxt), log(past[1] / past[0])
    whole = -expm1(-h)
    slope = whole * h / (2 * back)
    return nxt / past[0], (whole + slope, -slope)


def dpmpp_3m(past: Sequence[Number], nxt: Number, order: int = 3) -> Weights:
    """DPM-Solver++(3M) on D, as in every public implementation: its second difference lacks a
    factor 2.

    So it is of order 2 in practice; `exp_adams` of order 3 is the corrected method. Order 1 into
    sigma = 0.
    """
    past = past[:order]
    if len(past) < 3 or is_zero(nxt):
        return dpmpp_2m(past, nxt)
    h, back, further = log(past[0] / nxt), log(past[1] / past[0]), log(past[2] / past[1])
    r0, r1 = back / h, further / h
    phi_1, phi_2, phi_3 = phi(-h, 3)
    # D1 = d0 + r0 / (r0 + r1) (d0 - d1),  D2 = (d0 - d1) / (r0 + r1),  d0, d1 divided differences
    first, second = h * phi_2, h * phi_3
    weight_d0 = first + (first * r0 + second) / (r0 + r1)
    weight_d1 = -(first * r0 + second) / (r0 + r1)
    b0 = h * phi_1 + weight_d0 / r0
    b1 = -weight_d0 / r0 + weight_d1 / r1
    return nxt / past[0], (b0, b1, -weight_d1 / r1)


def unip(past: Sequence[Number], nxt: Number, order: int, bh: int = 2) -> Weights:
    """UniPC's predictor, on D. At order 2 it takes the shortcut rho = 1/2 with B(h) = h (bh=1) or 1
    - e^-h (2).

    From order 3 on B cancels and the predictor is `exp_adams`. Order 1 into sigma = 0.
    """
    if min(order, len(past)) != 2 or is_zero(nxt):
        return exp_adams(past, nxt, order)
    h, back = log(past[0] / nxt), log(past[1] / past[0])
    whole = -expm1(-h)
    slope = (h if bh == 1 else whole) * h / (2 * back)
    return nxt / past[0], (whole + slope, -slope)


def trapezoid(cur: Number, nxt: Number, start: Number) -> Weights:
    """The trapezoidal rule, on eps; the output at nxt comes first in b.

    It takes the mean of dx/dsigma = eps at the two ends, b = h/2 each with h = nxt - cur. Where the
    grid starts at pure noise, one output at nxt would count for a step of infinite length. There
    the mean is of dy/du = eps - D, in the time in which infinity lies at 1:

        y = x / (1 + sigma)     u = sigma / (1 + sigma)     b_new = h (1 + nxt) / (2 (1 + cur))

    and b_old = h - b_new. These are the state and the time of a flow.

    Args:
        cur: the level of the state, that of the grid or one that was raised
        nxt: the level of the next state
        start: the level at which the grid starts
    """
    h = nxt - cur
    far = not isinstance(start, Tensor) and start > PURE_NOISE
    new = h * (1 + nxt) / (2 * (1 + cur)) if far else h / 2
    return 1.0, (new, h - new)


def unic(past: Sequence[Number], nxt: Number, order: int, bh: int = 2) -> Weights:
    """UniPC's corrector, on D: the same step with the output at nxt added; its weight comes first
    in b.

    Order 1 takes the shortcut rho = 1/2, as published; from 2 on it is the exponential
    Adams-Moulton rule.
    """
    past = past[:order]
    h = log(past[0] / nxt)
    if len(past) == 1:
        whole = -expm1(-h)
        new = (h if bh == 1 else whole) / 2
        return nxt / past[0], (new, whole - new)
    nodes = [h, *(log(past[0] / p) for p in past)]
    return nxt / past[0], interpolatory(nodes, _phi_moments(h, -h, len(nodes)))
