"""What the tests of the core share: an exact test bed, exact solutions, and ways to drive the loop.

The test bed is a Gaussian mixture, whose D is known in closed form. It depends on x *and* on
sigma, is smooth and far from linear, and is written here so that a mistake in the package cannot
hide in it.

    w_k(x)  ~  weight_k N(x; mu_k, v_k + sigma^2)
    D(x, sigma) = sum_k w_k(x) [mu_k + v_k / (v_k + sigma^2) (x - mu_k)]
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core, so a thread for each process
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import fewstep.solver as registry
from fewstep.loop import State
from fewstep.plan import Combine, Eval, Plan
from fewstep.solving import iterate

ALL_SOLVERS = registry.names()
ODE_SOLVERS = registry.names(stochastic=False)
SDE_SOLVERS = registry.names(stochastic=True)
FEW_RIVALS = ("ddim", "ipndm-2")  # that trainings are measured against here; users have ten


class Mixture:
    """D of a mixture of three isotropic Gaussians over shape (3,)."""

    sigma_min, sigma_max = 0.01, 20.0
    weight = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    variance = torch.tensor([0.1, 0.2, 0.15], dtype=torch.float64)
    mean = torch.tensor([[0.6, -0.3, 0.2], [-0.5, 0.4, 0.5], [0.1, 0.5, -0.7]], dtype=torch.float64)

    @property
    def far_mean(self) -> Tensor:
        """D at infinite sigma: the mean of the data."""
        return self.weight @ self.mean

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        far = x.unsqueeze(1) - self.mean.to(x)  # [b, k, 3]
        total = self.variance.to(x) + sigma.reshape(-1, 1) ** 2  # [b, k]
        log_w = self.weight.to(x).log() - 1.5 * total.log() - far.square().sum(-1) / (2 * total)
        shrunk = self.mean.to(x) + (self.variance.to(x) / total).unsqueeze(-1) * far
        return (log_w.softmax(1).unsqueeze(-1) * shrunk).sum(1)


class Counted:
    """A denoiser that counts its calls and records what it is told and what it returns."""

    def __init__(self, inner: Callable[[Tensor, Tensor], Tensor]):
        self.inner = inner
        self.sigmas: list[float] = []
        self.outputs: list[Tensor] = []

    @property
    def calls(self) -> int:
        return len(self.outputs)

    @property
    def far_mean(self) -> Tensor:
        return self.inner.far_mean  # type: ignore[attr-defined]

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == (len(x),)
        self.sigmas.append(float(sigma[0]))
        self.outputs.append(self.inner(x, sigma))
        return self.outputs[-1]


def noise(batch: int, sigma: float, seed: int = 0, shape: Sequence[int] = (3,)) -> Tensor:
    """A float64 start [batch, *shape] at noise level sigma."""
    generator = torch.Generator().manual_seed(seed)
    return sigma * torch.randn(batch, *shape, generator=generator, dtype=torch.float64)


def random_grid(rng: np.random.Generator, intervals: int, start: float = 10.0) -> list[float]:
    """A strictly decreasing grid, as irregular as log steps between 0.1 and 1 are."""
    return [start, *(start * np.exp(-np.cumsum(rng.uniform(0.1, 1.0, intervals)))).tolist()]


def karras(points: int, high: float, low: float, rho: float = 7.0) -> list[float]:
    ramp = np.linspace(high ** (1 / rho), low ** (1 / rho), points) ** rho
    return [high, *ramp[1:-1].tolist(), low]


def log_uniform(points: int, high: float, low: float) -> list[float]:
    return [high, *np.geomspace(high, low, points)[1:-1].tolist(), low]


SMOOTH_GRIDS: dict[str, Callable[[int, float, float], list[float]]] = {
    "karras": karras,
    "log-snr": log_uniform,
}


def eps_of(denoiser: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: float) -> Tensor:
    return (x - denoiser(x, torch.full((len(x),), sigma, dtype=x.dtype))) / sigma


@functools.cache
def exact_path(levels: tuple[float, ...], batch: int = 4, seed: int = 0) -> dict[float, Tensor]:
    """The mixture's exact states at `levels` (decreasing), from one start at the first of them.

    dx/dlambda = D - x, integrated by DOP853 to 1e-13; the states between its own come from its
    interpolant of degree 7, good to about 1e-12.
    """
    mixture = Mixture()
    x = noise(batch, levels[0], seed)

    def slope(log_snr: float, flat: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(flat).reshape(x.shape)
        sigma = torch.full((batch,), math.exp(-log_snr), dtype=torch.float64)
        return (mixture(state, sigma) - state).flatten().numpy()

    times = [-math.log(level) for level in levels]
    solved = solve_ivp(
        slope,
        (times[0], times[-1]),
        x.flatten().numpy(),
        method="DOP853",
        t_eval=times,
        rtol=1e-13,
        atol=1e-13,
    )
    states = torch.from_numpy(solved.y.T.copy()).reshape(-1, *x.shape)
    return dict(zip(levels, states, strict=True))


def one_evaluation_an_interval(plan: Plan) -> bool:
    """Whether history from earlier intervals matters: a singlestep method evaluates more often."""
    return sum(isinstance(op, Eval) for op in plan.ops) == len(plan.sigmas) - 1


def held(plan: Plan) -> list[list[float]]:
    """For each accepted state of a plan: the levels of the outputs in its history, newest first."""
    levels: list[float] = []
    out = []
    for op in plan.ops:
        if isinstance(op, Eval):
            levels = [float(op.sigma), *levels[: plan.depth - 1]]
        elif isinstance(op, Combine) and op.accept:
            out.append(list(levels))
    return out


def solve_seeded(
    name: str,
    sigmas: Sequence[float],
    denoiser: Callable[[Tensor, Tensor], Tensor],
    state_at: Callable[[float], Tensor],
) -> Tensor:
    """Run a solver; until its history is full, replace each state and its history by exact ones.

    A multistep method that starts cold is of order 1 or 2 on its first steps, which would hide its
    own order. A singlestep method needs no seeds.
    """
    solver = registry.get(name)
    plan = solver.plan(sigmas)
    histories = held(plan)
    seeded = solver.depth if one_evaluation_an_interval(plan) else 0

    def output(sigma: float) -> Tensor:
        x = state_at(sigma)
        eps = eps_of(denoiser, x, sigma)
        return eps if solver.prediction == "eps" else x - sigma * eps

    run = iterate(denoiser, state_at(sigmas[0]), name, grid=sigmas)
    state = next(run)
    for i, history in enumerate(histories[:-1]):
        sent = None
        if i < seeded:
            past = tuple(output(sigma) for sigma in history)
            sigma = float(state.sigma)
            sent = State(state_at(sigma), past, state.denoised, sigma, state.nfe)
        state = run.send(sent)
    with pytest.raises(StopIteration):
        run.send(None)
    return state.x


def largest(value: Any) -> float:
    """max |value|, of an array or a tensor."""
    return float(abs(value).max())
