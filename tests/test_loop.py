"""The loop: what is written where, who may change it on the way, and which numbers survive."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

import fewstep.solver as registry
from fewstep.loop import State
from fewstep.noise import normal
from fewstep.plan import Combine, Eval, Plan, flatten, freeze, nfe
from fewstep.solving import iterate, solve
from tests.support.testbed import (
    ALL_SOLVERS,
    ODE_SOLVERS,
    SDE_SOLVERS,
    Counted,
    Mixture,
    eps_of,
    exact_path,
    karras,
    largest,
    log_uniform,
    noise,
    random_grid,
)

SEEDS = [1, 2, 3]
SIGMAS = random_grid(np.random.default_rng(3), 6)

# Solvers that use more than the last output even into 0: Adams in sigma has no pole there.
FULL_ORDER_INTO_ZERO = {
    f"{family}-{p}" for family in ("lms", "deis-rho", "ipndm-v", "ipndm") for p in (2, 3, 4)
}


def states_of(denoiser, x, name, sigmas=SIGMAS, **options) -> list[State]:
    return list(iterate(denoiser, x, name, grid=sigmas, seeds=SEEDS[: len(x)], **options))


def drive(run, change) -> State:
    """The last state of a run that is sent change(state) for every state."""
    state = next(run)
    while True:
        try:
            state = run.send(change(state))
        except StopIteration:
            return state


# --- sigma = 0 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_SOLVERS)
def test_a_grid_may_end_at_zero_where_methods_in_log_sigma_fall_to_order_1(name, mixture):
    """Order 1 into 0 is x = D, the last output itself."""
    sigmas = [*SIGMAS[:-1], 0.0]
    denoiser = Counted(mixture)
    end = solve(denoiser, noise(3, sigmas[0]), name, grid=sigmas, seeds=SEEDS)
    assert torch.isfinite(end).all()
    assert 0 not in denoiser.sigmas
    gap = largest(end - denoiser.outputs[-1])
    if name in FULL_ORDER_INTO_ZERO:
        assert gap > 1e-3
    else:
        assert gap < 1e-12


# --- starting in the middle ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_a_start_in_the_middle_converges_to_the_path_from_there(name, mixture):
    """Image to image: any start and any first sigma. A cold start is of order 1 at least."""
    finest = tuple(log_uniform(129, 1.5, 0.2))
    path = exact_path(finest, seed=7)
    found = []
    for every in (8, 4, 2, 1):
        end = solve(mixture, path[1.5], name, grid=finest[::every])
        found.append(float((end - path[0.2]).square().mean().sqrt()))
    assert found[-1] < 5e-3
    for coarse, fine in pairwise(found):
        assert fine < coarse / 1.8  # 2 in the limit, for order 1


@pytest.mark.parametrize("name", SDE_SOLVERS)
def test_a_stochastic_solver_draws_from_the_data_when_its_grid_is_fine(name):
    """Gaussian data N(0.3, 0.2^2): mean and spread of 4000 scalars at the end, from sigma = 3."""
    seeds = range(4)

    def denoiser(x, sigma):
        shrink = 0.04 / (0.04 + sigma.reshape(-1, 1) ** 2)
        return 0.3 + shrink * (x - 0.3)

    x = 0.3 + (0.04 + 9) ** 0.5 * noise(len(seeds), 1.0, shape=(1000,))
    name = "churn:noise=1" if name == "churn" else name  # 1.003 adds noise on purpose
    end = solve(denoiser, x, name, grid=karras(160, 3.0, 0.01), seeds=seeds)
    # four standard errors, 0.2 / sqrt(4000) and 0.2 / sqrt(8000), and what is left of order 1
    assert abs(float(end.mean()) - 0.3) < 0.0126
    assert abs(float(end.std()) - 0.2) < 0.0089 + 0.004


# --- iterate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_SOLVERS)
def test_iterate_yields_each_accepted_state_and_ends_where_solve_does(name, mixture):
    x = noise(3, SIGMAS[0])
    plan = registry.get(name).plan(SIGMAS)
    accepted = [op.sigma for op in plan.ops if isinstance(op, Combine) and op.accept]
    denoiser = Counted(mixture)
    states = []
    for state in iterate(denoiser, x, name, grid=SIGMAS, seeds=SEEDS):
        assert state.nfe == denoiser.calls
        assert state.denoised is not None or state.nfe == 0
        if state.denoised is not None:
            assert torch.equal(state.denoised, denoiser.outputs[-1])
        assert len(state.history) == min(state.nfe, registry.get(name).depth)
        states.append(state)
    assert [state.sigma for state in states] == accepted
    assert states[-1].sigma == SIGMAS[-1]
    assert torch.equal(states[-1].x, solve(mixture, x, name, grid=SIGMAS, seeds=SEEDS))


@pytest.mark.parametrize("afs", ["zero", "mean"])
@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_an_analytic_first_step_counts_nothing_and_shows_its_stand_in(name, afs, mixture):
    x = noise(3, SIGMAS[0])
    denoiser = Counted(mixture)
    states = []
    for state in iterate(denoiser, x, name, grid=SIGMAS, afs=afs, final=True):
        assert state.nfe == denoiser.calls
        states.append(state)
    assert torch.equal(states[-1].x, states[-1].denoised)  # the last D, to the bit
    if name in {"ddim", "lms-4", "deis-3", "dpmpp-2m"}:
        shrink = 1 - SIGMAS[0] / (1 + SIGMAS[0] ** 2) ** 0.5
        stand_in = mixture.far_mean.expand_as(x) if afs == "mean" else shrink * x
        torch.testing.assert_close(states[0].denoised, stand_in, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ALL_SOLVERS)
def test_the_tensors_of_a_yielded_state_are_never_written_to_again(name, mixture):
    x = noise(3, SIGMAS[0])
    start = x.clone()
    kept = []
    with torch.no_grad():
        for state in iterate(mixture, x, name, grid=SIGMAS, seeds=SEEDS):
            tensors = [
                state.x,
                *state.history,
                *([] if state.denoised is None else [state.denoised]),
            ]
            kept.append((tensors, [tensor.clone() for tensor in tensors]))
    for tensors, copies in kept:
        assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
    assert torch.equal(x, start)


@pytest.mark.parametrize("name", ALL_SOLVERS)
def test_a_state_sent_back_is_gone_on_from(name, mixture):
    """Send the states of another run: from there on the two runs are one, whatever went before."""
    x, other = noise(3, SIGMAS[0], seed=1), noise(3, SIGMAS[0], seed=2)
    guide = states_of(mixture, other, name)
    run = iterate(mixture, x, name, grid=SIGMAS, seeds=SEEDS)
    states = [next(run)]
    for state in guide[:-1]:
        # every state is replaced but the last, so the last depends on the guide alone
        states.append(run.send(State(state.x, state.history, None, 0.0, 0)))
    assert largest(states[0].x - guide[0].x) > 0.1
    assert torch.equal(states[-1].x, guide[-1].x)
    assert states[-1].nfe == guide[-1].nfe  # counted by the loop, not taken from what is sent


@pytest.mark.parametrize("name", ALL_SOLVERS)
def test_sending_back_the_state_itself_changes_nothing(name, mixture):
    x = noise(3, SIGMAS[0])
    end = drive(iterate(mixture, x, name, grid=SIGMAS, seeds=SEEDS), lambda state: state)
    assert torch.equal(end.x, solve(mixture, x, name, grid=SIGMAS, seeds=SEEDS))


def test_a_history_sent_back_too_long_keeps_its_newest_outputs(mixture):
    x = noise(3, SIGMAS[0])
    junk = torch.full_like(x, torch.nan)  # never reached: the depth is 2, and each step adds one

    def lengthen(state: State) -> State:
        return replace(state, history=(*state.history, junk, junk))

    end = drive(iterate(mixture, x, "dpmpp-2m", grid=SIGMAS), lengthen)
    assert torch.equal(end.x, solve(mixture, x, "dpmpp-2m", grid=SIGMAS))


def test_closing_cancels(mixture):
    denoiser = Counted(mixture)
    run = iterate(denoiser, noise(3, 10.0), "heun", grid=SIGMAS)
    next(run)
    run.close()
    assert denoiser.calls == 2
    with pytest.raises(StopIteration):
        next(run)


# --- buffers, grad mode and gradients ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL_SOLVERS)
def test_grad_mode_does_not_change_a_bit(name, dtype, mixture):
    """Without gradients the loop writes into buffers of earlier steps."""
    x = noise(3, SIGMAS[0]).to(dtype)
    start = x.clone()
    with torch.no_grad():
        without = solve(mixture, x, name, grid=SIGMAS, seeds=SEEDS)
    assert torch.equal(x, start)
    with torch.enable_grad():
        assert torch.equal(solve(mixture, x, name, grid=SIGMAS, seeds=SEEDS), without)
        with_graph = solve(mixture, x.clone().requires_grad_(), name, grid=SIGMAS, seeds=SEEDS)
    assert with_graph.requires_grad
    assert not without.requires_grad
    assert torch.equal(with_graph.detach(), without)


@pytest.mark.parametrize("name", ALL_SOLVERS)
def test_the_gradient_in_the_start_is_right(name, mixture):
    sigmas = [2.0, 1.3, 0.8, 0.5, 0.4]
    x = noise(2, sigmas[0]).requires_grad_()

    def end(x):
        return solve(mixture, x, name, grid=sigmas, seeds=SEEDS[:2])

    assert torch.autograd.gradcheck(end, x)


ALIASING = {
    "x itself": lambda x, sigma: x,
    "a view of x": lambda x, sigma: x[:],
    "x under another shape": lambda x, sigma: x.view(-1).view(x.shape),
}


@pytest.mark.parametrize("kind", ALIASING)
@pytest.mark.parametrize("name", ALL_SOLVERS)
def test_a_denoiser_that_returns_its_input_is_safe(name, kind):
    """D = x: a state at rest, and every solver leaves it where it is, apart from noise."""
    x = noise(3, SIGMAS[0])
    with torch.no_grad():
        found = solve(ALIASING[kind], x, name, grid=SIGMAS, seeds=SEEDS)
        copied = solve(lambda x, sigma: x.clone(), x, name, grid=SIGMAS, seeds=SEEDS)
    assert torch.equal(found, copied)
    if name in ODE_SOLVERS:
        assert largest(found - x) < 1e-12


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_SOLVERS)
def test_the_state_is_float32_unless_the_start_is_float64(name, mixture):
    x = noise(3, SIGMAS[0])
    exact = solve(mixture, x, name, grid=SIGMAS, seeds=SEEDS)
    assert exact.dtype == torch.float64
    for dtype in (torch.float32, torch.bfloat16):
        rounded = solve(mixture, x.to(dtype), name, grid=SIGMAS, seeds=SEEDS)
        assert rounded.dtype == torch.float32
    # weights of up to 1e2 on outputs of size 1
    single = solve(mixture, x.float(), name, grid=SIGMAS, seeds=SEEDS)
    assert largest(single - exact) < 1e-4


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL_SOLVERS)
def test_a_network_in_half_precision_keeps_the_state_in_float32(name, half, mixture):
    x = noise(3, SIGMAS[0]).float()

    def network(x, sigma):
        assert x.dtype == sigma.dtype == torch.float32
        return mixture(x, sigma).to(half)

    for state in iterate(network, x, name, grid=SIGMAS, seeds=SEEDS):
        kept = [state.x, *state.history, *([] if state.denoised is None else [state.denoised])]
        assert all(tensor.dtype == torch.float32 for tensor in kept)
    found = solve(network, x, name, grid=SIGMAS, seeds=SEEDS)
    assert found.dtype == torch.float32
    # the same as rounding the outputs alone
    rounded = solve(lambda x, s: network(x, s).float(), x, name, grid=SIGMAS, seeds=SEEDS)
    assert torch.equal(found, rounded)


# A flow model's times from 1 - 1e-5 on, sigma = t / (1 - t): the first interval spans four decades.
FLOW = [t / (1 - t) for t in (1 - 1e-5, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2, 0.05)]


@pytest.mark.parametrize("name", ALL_SOLVERS)
def test_a_huge_first_sigma_costs_float32_no_digits(name, mixture):
    """eps = (x - D) / sigma forgets D at sigma = 1e5 in float32, where x has an ulp of 0.008."""
    x = noise(16, FLOW[0]).float()
    seeds = range(16)
    exact = solve(mixture, x.double(), name, grid=FLOW, seeds=seeds)
    found = solve(mixture, x, name, grid=FLOW, seeds=seeds)
    # The first interval multiplies an output by `weight`, which is large for singlestep methods,
    # and so float32's rounding of that output: 6e-8 of size 1. The rest: a few dozen roundings.
    weight = np.abs(flatten(registry.get(name).plan(FLOW[:2]))[1:]).max()
    assert largest(found - exact) < 3e-6 + 2 * 6e-8 * weight


# --- what the network is told --------------------------------------------------------------------


def test_the_network_is_told_cond_but_eps_divides_by_sigma(mixture):
    """AMED conditions the network on a * mid."""
    ops = [
        Eval(2.0, cond=1.5),
        Combine((-1.0,), 1.0),
        Eval(1.0, cond=0.7),
        Combine((-0.2, -0.3), 0.5),
    ]
    plan = freeze(ops, prediction="eps", depth=2)
    x = noise(3, 2.0)

    def eps(x, sigma, cond):
        return eps_of(mixture, x, cond) * cond / sigma  # (x - D(x, cond)) / sigma

    e1 = eps(x, 2.0, 1.5)
    y = x - e1
    e2 = eps(y, 1.0, 0.7)
    torch.testing.assert_close(solve(mixture, x, plan), y - 0.2 * e2 - 0.3 * e1, rtol=0, atol=1e-13)


def test_a_trial_stage_may_take_up_noise(mixture):
    """Then x is no combination of outputs any more, and eps at x must be taken as it is."""
    ops = (
        Eval(2.0),
        Combine((-0.5,), 1.5, noise=0.4, accept=False),
        Eval(1.5),
        Combine((-0.3, -0.2), 1.0),
    )
    x = noise(3, 2.0)
    e1 = eps_of(mixture, x, 2.0)
    y = x - 0.5 * e1 + 0.4 * normal(SEEDS, (3,), "step", 0, torch.float64)
    hand = x - 0.3 * eps_of(mixture, y, 1.5) - 0.2 * e1
    found = solve(mixture, x, Plan("eps", 2, "test", "test", (), ops), seeds=SEEDS)
    torch.testing.assert_close(found, hand, rtol=0, atol=1e-13)


def test_levels_and_weights_may_be_tensors_one_per_sample_or_one_for_all(mixture):
    """Learned solvers: a batch of different tensors equals each sample alone with floats."""
    levels = torch.tensor([[2.0, 1.1, 0.5], [1.8, 0.9, 0.4], [2.2, 1.5, 0.6]], dtype=torch.float64)
    x = noise(3, 2.0)

    def ops(cur, mid, nxt):
        yield Eval(cur)
        yield Combine((mid - cur,), mid, accept=False)
        yield Eval(mid, cond=1.1 * mid)
        yield Combine((1.05 * (nxt - cur),), nxt)
        yield Eval(nxt)
        yield Combine((0.2 * nxt, -0.3 * nxt), 0.1, a=0.9 + 0.01 * nxt)

    def run(x, columns):
        # as a plan, whose numbers may be tensors while they are learned
        plan = Plan("eps", 3, "test", "test", (), tuple(ops(*columns)))
        return solve(Counted(mixture), x, plan)  # which insists on a sigma of [b]

    batch = run(x, levels.unbind(1))
    for i in range(3):
        alone = run(x[i : i + 1], levels[i].tolist())
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=0, atol=1e-13)
    scalars = run(x, levels[0].unbind())  # 0-dim: one learned number for the whole batch
    torch.testing.assert_close(scalars[:1], run(x[:1], levels[0].tolist()), rtol=0, atol=1e-13)


def test_gradients_reach_learned_levels(mixture):
    x = noise(2, 2.0)

    def end(mid, scale):
        ops = (
            Eval(2.0),
            Combine((mid - 2.0,), mid, accept=False),
            Eval(mid, cond=scale * mid),
            Combine((scale * (0.5 - 2.0),), 0.5),
        )
        return solve(mixture, x, Plan("eps", 2, "test", "test", (), ops))

    mid = torch.tensor([1.0, 0.8], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([1.1, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(end, (mid, scale))


class WithFeatures(Counted):
    def with_features(self, x, sigma):
        denoised = self(x, sigma)
        return denoised, denoised.mean(1)


def test_an_adaptive_solver_sees_features_only_where_it_asks(mixture):
    seen = []

    def ops(sigmas):
        for i, (cur, nxt) in enumerate(pairwise(sigmas)):
            reply = yield Eval(cur, features=i == 1)
            seen.append(reply)
            yield Combine((1 - nxt / cur,), nxt, a=nxt / cur)

    solver = registry.Solver("adaptive", ops, "x0", 1, 1, evaluations=lambda intervals: intervals)
    denoiser = WithFeatures(mixture)
    x = noise(3, SIGMAS[0])
    end = solve(denoiser, x, solver, grid=SIGMAS)
    assert torch.equal(end, solve(mixture, x, "ddim", grid=SIGMAS))
    assert [reply.features is not None for reply in seen] == [False, True, *[False] * 4]
    assert torch.equal(seen[1].features, denoiser.outputs[1].mean(1))
    assert torch.equal(seen[0].x, x)
    with pytest.raises(ValueError, match="adapts"):
        solver.plan(SIGMAS)


# --- ranges and grids by name --------------------------------------------------------------------


def test_the_range_is_the_denoiser_s_own_unless_given(mixture):
    x = noise(2, 1.0)
    denoiser = Counted(mixture)
    solve(denoiser, x, "ddim", nfe=4)  # a Counted has no range: EDM's, and the karras grid
    assert denoiser.sigmas == pytest.approx(karras(5, 80.0, 0.002)[:-1], rel=1e-12)

    class Own(Counted):
        sigma_min, sigma_max = 0.1, 5.0

    denoiser = Own(mixture)
    states = list(iterate(denoiser, x, "ddim", nfe=4, grid="log-snr"))
    assert denoiser.sigmas == pytest.approx(log_uniform(5, 5.0, 0.1)[:-1], rel=1e-12)
    assert states[-1].sigma == 0.1
    denoiser = Own(mixture)
    states = list(iterate(denoiser, x, "ddim", nfe=4, sigma_min=0.2, sigma_max=3.0))
    assert denoiser.sigmas == pytest.approx(karras(5, 3.0, 0.2)[:-1], rel=1e-12)
    assert states[-1].sigma == 0.2


# --- refusals ------------------------------------------------------------------------------------


def test_a_denoiser_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"returned \(3, 2\) for x of \(3, 3\)"):
        solve(lambda x, sigma: x[:, :2], noise(3, 1.0), "ddim", grid=[1.0, 0.5])


@pytest.mark.parametrize("name", SDE_SOLVERS)
def test_a_stochastic_solver_without_seeds_is_refused(name, mixture):
    with pytest.raises(ValueError, match="needs seeds, one per picture"):
        solve(mixture, noise(3, 10.0), name, grid=SIGMAS)


@pytest.mark.parametrize("name", ALL_SOLVERS)
def test_seeds_must_be_one_per_picture(name, mixture):
    with pytest.raises(ValueError, match="one entry per picture, got 2 for 3"):
        solve(mixture, noise(3, 10.0), name, grid=SIGMAS, seeds=[1, 2])


def test_the_mean_first_step_needs_a_mean():
    with pytest.raises(ValueError, match=r"needs denoiser\.far_mean"):
        solve(lambda x, sigma: 0 * x, noise(3, 1.0), "ddim", grid=[1.0, 0.5], afs="mean")


@pytest.mark.parametrize("grid", [[1.0], [1.0, 1.0], [1.0, 2.0], [1.0, -0.5], [torch.inf, 1.0]])
def test_grids_that_do_not_strictly_decrease_are_refused(grid, mixture):
    with pytest.raises(ValueError, match=r"grid needs|strictly decrease|finite and >= 0"):
        solve(mixture, noise(3, 1.0), "ddim", grid=grid)


def test_a_plan_comes_with_its_grid_and_ends(mixture):
    plan = registry.get("ddim").plan(SIGMAS, "zero")
    assert nfe(plan) == len(SIGMAS) - 2
    chosen: list[dict[str, Any]] = [{"grid": SIGMAS}, {"afs": "zero"}, {"final": True}]
    for options in chosen:
        with pytest.raises(ValueError, match="has its own grid, first step and end: leave out"):
            solve(mixture, noise(3, 10.0), plan, **options)


def test_a_step_that_reaches_further_back_than_the_history_is_refused(mixture):
    for weight in (1.0, torch.ones(3)):
        ops = (Eval(1.0), Combine((weight, weight), 0.5))
        for prediction in ("eps", "x0"):
            plan = Plan(prediction, 2, "test", "test", (), ops)
            with pytest.raises(ValueError, match="uses 2 outputs, but only 1 are in the history"):
                solve(mixture, noise(3, 1.0), plan)


def test_errors_in_arguments_come_before_the_first_state():
    with pytest.raises(ValueError, match="no solver called"):
        iterate(Mixture(), noise(3, 1.0), "no-such-solver")


@pytest.mark.parametrize("x_T", [5.0, np.ones((2, 3)), [[1.0, 2.0]], torch.tensor(1.0), None])
def test_a_start_that_is_no_tensor_of_pictures_is_refused_by_name(x_T: Any) -> None:
    for begin in (solve, iterate):
        with pytest.raises(ValueError, match=r"x_T must be a tensor \[b"):
            begin(Mixture(), x_T, "ddim", 2)
