"""The loop over a solver's operations equals the method written by hand, in its paper's form."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from fewstep.noise import brownian, normal
from fewstep.solving import solve
from tests.support.testbed import SMOOTH_GRIDS, Mixture, eps_of, largest, noise, random_grid

D = Callable[[Tensor, float], Tensor]
SEEDS = [3, 1, 4]
GRIDS = {
    "karras": SMOOTH_GRIDS["karras"](8, 20.0, 0.02),
    "irregular": random_grid(np.random.default_rng(5), 7),
}


def told(model: Callable[[Tensor, Tensor], Tensor]) -> D:
    """The model, called with one float."""
    return lambda x, sigma: model(x, torch.full((len(x),), sigma, dtype=x.dtype))


def lagrange(nodes: Sequence[float], j: int) -> Polynomial:
    """The polynomial that is 1 at nodes[j] and 0 at the others."""
    factors = (Polynomial([-n, 1]) / (nodes[j] - n) for i, n in enumerate(nodes) if i != j)
    return math.prod(factors, start=Polynomial([1.0]))


def ddim(model: D, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Song et al. 2021 (DDIM), eq. 12 with eta = 0, in EDM's units."""
    for t, s in pairwise(sigmas):
        denoised = model(x, t)
        x = denoised + s * (x - denoised) / t
    return x


def heun(model: D, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Karras et al. 2022 (EDM), algorithm 1."""
    for t, s in pairwise(sigmas):
        d = (x - model(x, t)) / t
        y = x + (s - t) * d
        x = x + (s - t) * (d + (y - model(y, s)) / s) / 2
    return x


def dpm_solver_2(model: D, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Lu et al. 2022 (DPM-Solver), algorithm 1, with alpha = 1."""
    for t, s in pairwise(sigmas):
        h, mid = math.log(t / s), math.sqrt(t * s)
        u = x - mid * math.expm1(h / 2) * (x - model(x, t)) / t
        x = x - s * math.expm1(h) * (u - model(u, mid)) / mid
    return x


def dpm_solver_3(model: D, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Lu et al. 2022 (DPM-Solver), algorithm 2, with alpha = 1."""
    r1, r2 = 1 / 3, 2 / 3
    for t, s in pairwise(sigmas):
        h = math.log(t / s)
        s1, s2 = t * math.exp(-r1 * h), t * math.exp(-r2 * h)
        e = (x - model(x, t)) / t
        u1 = x - s1 * math.expm1(r1 * h) * e
        d1 = (u1 - model(u1, s1)) / s1 - e
        share = math.expm1(r2 * h) / (r2 * h) - 1
        u2 = x - s2 * math.expm1(r2 * h) * e - s2 * r2 / r1 * share * d1
        d2 = (u2 - model(u2, s2)) / s2 - e
        x = x - s * math.expm1(h) * e - s / r2 * (math.expm1(h) / h - 1) * d2
    return x


def dpmpp_2s(model: D, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Lu et al. 2022 (DPM-Solver++), algorithm 1, r = 1/2."""
    for t, s in pairwise(sigmas):
        h, mid = math.log(t / s), math.sqrt(t * s)
        u = mid / t * x - math.expm1(-h / 2) * model(x, t)
        x = s / t * x - math.expm1(-h) * model(u, mid)
    return x


def dpmpp_2m(model: D, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Lu et al. 2022 (DPM-Solver++), algorithm 2."""
    last, h_last = None, 0.0
    for t, s in pairwise(sigmas):
        h, denoised = math.log(t / s), model(x, t)
        d = denoised
        if last is not None:
            r = h_last / h
            d = (1 + 1 / (2 * r)) * denoised - last / (2 * r)
        x = s / t * x - math.expm1(-h) * d
        last, h_last = denoised, h
    return x


def dpmpp_3m(model: D, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """DPM-Solver++(3M) as its public implementations have it, D2 without the factor 2."""
    outputs: list[Tensor] = []
    for i, (t, s) in enumerate(pairwise(sigmas)):
        h = math.log(t / s)
        outputs.insert(0, model(x, t))
        phi_1 = math.expm1(-h)
        phi_2 = phi_1 / h + 1
        phi_3 = phi_2 / h - 0.5
        base = s / t * x - phi_1 * outputs[0]
        if i == 0:
            x = base
            continue
        r0 = math.log(sigmas[i - 1] / t) / h
        d1_0 = (outputs[0] - outputs[1]) / r0
        if i == 1:
            x = base - phi_1 * d1_0 / 2
            continue
        r1 = math.log(sigmas[i - 2] / sigmas[i - 1]) / h
        d1_1 = (outputs[1] - outputs[2]) / r1
        d1 = d1_0 + r0 / (r0 + r1) * (d1_0 - d1_1)
        d2 = (d1_0 - d1_1) / (r0 + r1)
        x = base + phi_2 * d1 - phi_3 * d2
    return x


def exp_adams_3(model: D, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Newton's interpolation of D in lambda, integrated under exp(-(h - u)) term by term."""
    past: list[tuple[float, Tensor]] = []
    for t, s in pairwise(sigmas):
        h = math.log(t / s)
        past = [(-math.log(t), model(x, t)), *past[:2]]
        one = -math.expm1(-h)  # the integrals of 1, u and u^2
        u, u_u = h - one, h * h - 2 * (h - one)
        x = s / t * x + one * past[0][1]
        if len(past) > 1:
            back = past[0][0] - past[1][0]
            slope = (past[0][1] - past[1][1]) / back
            x = x + u * slope
        if len(past) > 2:
            slope_before = (past[1][1] - past[2][1]) / (past[1][0] - past[2][0])
            bend = (slope - slope_before) / (past[0][0] - past[2][0])
            x = x + (u_u + back * u) * bend
    return x


def unipc(model: D, x: Tensor, sigmas: Sequence[float], order: int) -> Tensor:
    """Zhao et al. 2023 (UniPC), algorithms 5 and 6 (data prediction), B(h) = e^h - 1."""

    def step(x, past, s, p, new=None):
        (t, d0), h = past[0], math.log(past[0][0] / s)
        r = [math.log(t / sigma) / h for sigma, _ in past[1:p]]
        differences = [(d - d0) / rk for (_, d), rk in zip(past[1:p], r, strict=True)]
        if new is not None:
            r, differences = [*r, 1.0], [*differences, new - d0]
        big, term, rhs = math.expm1(-h), math.expm1(-h) / -h - 1, []
        for i in range(1, len(r) + 1):
            rhs.append(term * math.factorial(i) / big)
            term = term / -h - 1 / math.factorial(i + 1)
        rho = (
            np.linalg.solve(np.vander(r, increasing=True).T, rhs) if len(r) > 1 else [0.5] * len(r)
        )
        return s / t * x - big * (d0 + sum(w * d for w, d in zip(rho, differences, strict=True)))

    past: list[tuple[float, Tensor]] = []
    corrected = x
    for i, (t, s) in enumerate(pairwise(sigmas)):
        denoised = model(x, t)
        if i > 0:
            corrected = step(corrected, past, t, order, denoised)
        past = [(t, denoised), *past]
        x = step(corrected, past, s, order)
    return x


def deis_3(model: D, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Zhang and Chen 2023 (DEIS), t-AB in log rho: the closed integrals of 1, log and log^2."""
    past: list[tuple[float, Tensor]] = []
    for t, s in pairwise(sigmas):
        past = [(t, (x - model(x, t)) / t), *past[:2]]
        moments = [
            s - t,
            (s * math.log(s) - s) - (t * math.log(t) - t),
            s * (math.log(s) ** 2 - 2 * math.log(s) + 2)
            - t * (math.log(t) ** 2 - 2 * math.log(t) + 2),
        ]
        nodes = [math.log(sigma) for sigma, _ in past]
        for j, (_, e) in enumerate(past):
            x = x + np.dot(lagrange(nodes, j).coef, moments[: len(past)]) * e
    return x


def lms_4(model: D, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Adams-Bashforth in sigma: the integral of each Lagrange polynomial."""
    past: list[tuple[float, Tensor]] = []
    for t, s in pairwise(sigmas):
        past = [(t, (x - model(x, t)) / t), *past[:3]]
        nodes = [sigma - t for sigma, _ in past]
        for j, (_, e) in enumerate(past):
            x = x + lagrange(nodes, j).integ()(s - t) * e
    return x


def ipndm_4(model: D, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Zhang and Chen 2023 (DEIS), eq. 36 to 39: iPNDM."""
    e: list[Tensor] = []
    for t, s in pairwise(sigmas):
        e.insert(0, (x - model(x, t)) / t)
        if len(e) == 1:
            d = e[0]
        elif len(e) == 2:
            d = (3 * e[0] - e[1]) / 2
        elif len(e) == 3:
            d = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
        else:
            d = (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24
        x = x + (s - t) * d
    return x


def ddim_eta(model: D, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Song et al. 2021 (DDIM), eq. 12 and 16, eta = 0.7, in VP units from end to end."""
    alpha = [1 / math.sqrt(1 + s * s) for s in sigmas]
    beta = [s / math.sqrt(1 + s * s) for s in sigmas]
    z = alpha[0] * x
    for i in range(len(sigmas) - 1):
        ratio = alpha[i] / alpha[i + 1]
        up = 0.7 * beta[i + 1] / beta[i] * math.sqrt(1 - ratio**2)
        denoised = model(z / alpha[i], sigmas[i])
        e = (z - alpha[i] * denoised) / beta[i]
        z = alpha[i + 1] * denoised + math.sqrt(beta[i + 1] ** 2 - up**2) * e
        z = z + up * normal(SEEDS, x.shape[1:], "step", i, x.dtype)
    return z / alpha[-1]


def churn(model: D, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Karras et al. 2022 (EDM), algorithm 2, S_churn = 1.4, S_noise = 1.01, between 0.1 and 5."""
    draws = 0
    for t, s in pairwise(sigmas):
        if 0.1 <= t <= 5:
            raised = t + min(1.4 / (len(sigmas) - 1), math.sqrt(2) - 1) * t
            xi = normal(SEEDS, x.shape[1:], "step", draws, x.dtype)
            x = x + math.sqrt(raised**2 - t**2) * 1.01 * xi
            draws, t = draws + 1, raised
        x = heun(model, x, [t, s])
    assert 0 < draws < len(sigmas) - 1
    return x


def dpmpp_2m_sde(model: D, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Lu et al. 2022 (DPM-Solver++), SDE-DPM-Solver++(2M) of the appendix, eta = 1."""
    last, h_last = None, 0.0
    for t, s in pairwise(sigmas):
        h, denoised = math.log(t / s), model(x, t)
        x = s / t * math.exp(-h) * x - math.expm1(-2 * h) * denoised
        if last is not None:
            x = x - math.expm1(-2 * h) / 2 * (denoised - last) * h / h_last
        xi = brownian(SEEDS, x.shape[1:], (t, s), x.dtype)
        x = x + s * math.sqrt(-math.expm1(-2 * h)) * xi
        last, h_last = denoised, h
    return x


ODE = {
    "ddim": ddim,
    "heun": heun,
    "dpm-solver-2": dpm_solver_2,
    "dpm-solver-3": dpm_solver_3,
    "dpmpp-2s": dpmpp_2s,
    "dpmpp-2m": dpmpp_2m,
    "dpmpp-3m": dpmpp_3m,
    "exp-adams-3": exp_adams_3,
    "unipc-2": lambda model, x, sigmas: unipc(model, x, sigmas, 2),
    "unipc-3": lambda model, x, sigmas: unipc(model, x, sigmas, 3),
    "deis-3": deis_3,
    "ipndm-4": ipndm_4,
    "lms-4": lms_4,
}
SDE = {
    "ddim-eta:eta=0.7": ddim_eta,
    "churn:churn=1.4,noise=1.01,low=0.1,high=5": churn,
    "dpmpp-2m-sde": dpmpp_2m_sde,
}


def assert_same(ours: Tensor, hand: Tensor) -> None:
    # states of size 20 and less, through a few dozen float64 roundings
    torch.testing.assert_close(ours, hand, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ODE | SDE)
def test_the_loop_equals_the_method_by_hand(name, grid, mixture):
    sigmas = GRIDS[grid]
    x = noise(len(SEEDS), sigmas[0])
    hand = (ODE | SDE)[name](told(mixture), x, sigmas)
    assert_same(solve(mixture, x, name, grid=sigmas, seeds=SEEDS), hand)


@pytest.mark.parametrize("afs", ["zero", "mean"])
@pytest.mark.parametrize("name", ODE)
def test_an_analytic_first_step_stands_in_for_the_first_call_alone(name, afs, mixture):
    """eps = x / sqrt(1 + sigma^2), or D = the mean of the data, in place of the first call."""
    sigmas = GRIDS["karras"]
    x = noise(len(SEEDS), sigmas[0])
    calls = 0

    def model(x: Tensor, sigma: float) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            return told(mixture)(x, sigma)
        mean = mixture.weight @ mixture.mean
        return x - sigma * x / math.sqrt(1 + sigma**2) if afs == "zero" else mean.expand_as(x)

    hand = ODE[name](model, x, sigmas)
    assert_same(solve(mixture, x, name, grid=sigmas, afs=afs), hand)


@pytest.mark.parametrize("name", ODE | SDE)
def test_final_is_one_more_call_at_the_end(name, mixture):
    sigmas = GRIDS["karras"]
    x = noise(len(SEEDS), sigmas[0])
    end = (ODE | SDE)[name](told(mixture), x, sigmas)
    hand = told(mixture)(end, sigmas[-1])
    assert_same(solve(mixture, x, name, grid=sigmas, seeds=SEEDS, final=True), hand)


def test_the_mixture_is_the_denoiser_that_its_score_says(mixture):
    """Tweedie: D = x + sigma^2 grad log p(x; sigma), the gradient by autograd on the density."""
    assert isinstance(mixture, Mixture)
    x = noise(5, 1.0).requires_grad_()
    for sigma in (0.1, 1.0, 10.0):
        total = mixture.variance + sigma**2
        square = (x.unsqueeze(1) - mixture.mean).square().sum(-1)
        density = mixture.weight * total ** (-1.5) * torch.exp(-square / (2 * total))
        (score,) = torch.autograd.grad(density.sum(1).log().sum(), x)
        assert largest(eps_of(mixture, x.detach(), sigma) + sigma * score) < 1e-12
