"""A solver that adapts to the network: features in, per-sample tensors out, gradients through.

The solver here has the shape of AMED (arXiv:2312.00094): the predictor sees the features and names,
for each picture, an intermediate level, a scale of the step and a level that the network is told.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.plan import Ops
from fewstep.solver import Solver, intervals_for

GRID = (10.0, 3.0, 1.0, 0.2)
Predictor = Callable[[Tensor | None, float, float, int], tuple[Tensor, Tensor, Tensor]]


class Denoiser:
    """D of two points at +-1 and one feature per picture."""

    sigma_min, sigma_max = 0.2, 10.0
    far_mean = torch.zeros(1, 3, dtype=torch.float64)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(x.sum(1) / sigma**2)[:, None].expand_as(x)

    def with_features(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return self(x, sigma), x.mean(1) / sigma


def predictor(weights: Tensor) -> Predictor:
    def predict(features: Tensor | None, cur: float, nxt: float, count: int):
        seen = torch.zeros(count, dtype=torch.float64) if features is None else features
        r = torch.sigmoid(weights[0] * seen + cur / 10)
        return r, 1 + 0.1 * torch.tanh(weights[1] + seen), 1 + 0.1 * torch.tanh(weights[2] - seen)

    return predict


def amed(sigmas: tuple[float, ...], *, predict: Predictor, count: int) -> Ops:
    for cur, nxt in pairwise(sigmas):
        seen = yield fewstep.Eval(cur, features=True)
        assert seen is not None
        r, c, a = predict(seen.features, cur, nxt, count)
        mid = nxt**r * cur ** (1 - r)
        yield fewstep.Combine((mid - cur,), mid, accept=False)
        yield fewstep.Eval(mid, cond=a * mid)
        yield fewstep.Combine((c * (nxt - cur),), nxt)


def solver(weights: Tensor, count: int = 4) -> Solver:
    def ops(sigmas):
        return amed(sigmas, predict=predictor(weights), count=count)

    return Solver("test-amed", ops, "eps", 1, 2, evaluations=lambda intervals: 2 * intervals)


def by_hand(x: Tensor, weights: Tensor, afs: str = "none") -> Tensor:
    network, predict = Denoiser(), predictor(weights)
    for i, (cur, nxt) in enumerate(pairwise(GRID)):
        level = torch.full((len(x),), cur, dtype=torch.float64)
        denoised, features = network.with_features(x, level)
        eps = (x - denoised) / cur
        if i == 0 and afs == "zero":
            eps, features = x / (1 + cur**2) ** 0.5, None
        r, c, a = predict(features, cur, nxt, len(x))
        mid = nxt**r * cur ** (1 - r)
        x_mid = x + (mid - cur)[:, None] * eps
        eps_mid = (x_mid - network(x_mid, a * mid)) / mid[:, None]
        x = x + (c * (nxt - cur))[:, None] * eps_mid
    return x


@pytest.fixture
def start() -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    x = 10 * torch.randn(4, 3, dtype=torch.float64, generator=gen)
    return x, torch.randn(3, dtype=torch.float64, generator=gen)


@pytest.mark.parametrize("afs", ["none", "zero"])
def test_the_loop_equals_the_hand_written_step(start: tuple[Tensor, Tensor], afs: str) -> None:
    x, weights = start
    ours = fewstep.solve(Denoiser(), x, solver(weights), grid=GRID, afs=afs)
    torch.testing.assert_close(ours, by_hand(x, weights, afs), rtol=0, atol=1e-12)


def test_gradients_reach_the_predictor(start: tuple[Tensor, Tensor]) -> None:
    x, weights = start

    def end(weights: Tensor) -> Tensor:
        return fewstep.solve(Denoiser(), x, solver(weights), grid=GRID)

    assert torch.autograd.gradcheck(end, (weights.requires_grad_(),))


def test_predictions_do_not_depend_on_the_batch(start: tuple[Tensor, Tensor]) -> None:
    x, weights = start
    together = fewstep.solve(Denoiser(), x, solver(weights), grid=GRID)
    for i in range(4):
        alone = fewstep.solve(Denoiser(), x[i : i + 1], solver(weights, count=1), grid=GRID)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-12)


def test_a_trainer_restarts_each_step_from_the_teacher(start: tuple[Tensor, Tensor]) -> None:
    """Send back a State at every step: the student's next step starts from the teacher's state."""
    x, weights = start
    teacher = [x * s / 10 for s in GRID]
    stream = fewstep.iterate(Denoiser(), x, solver(weights), grid=GRID)
    state, seen = next(stream), []
    for position in teacher[1:]:
        seen.append(state.x)
        try:
            state = stream.send(fewstep.State(position, (), None, state.sigma, state.nfe))
        except StopIteration:
            break
    one_step = fewstep.solve(Denoiser(), teacher[1], solver(weights), grid=GRID[1:3])
    torch.testing.assert_close(seen[1], one_step, rtol=0, atol=1e-12)


def test_budgets_of_an_adaptive_solver(start: tuple[Tensor, Tensor]) -> None:
    _, weights = start
    assert intervals_for(solver(weights), 6) == 3
    assert intervals_for(solver(weights), 5, afs="zero") == 3
    with pytest.raises(ValueError, match="4, 6"):
        intervals_for(solver(weights), 5)
    with pytest.raises(ValueError, match="no plan"):
        solver(weights).plan(GRID)
