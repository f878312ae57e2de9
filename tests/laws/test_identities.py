"""Which solvers are one method under two names, and which are not: compared as rows of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

import fewstep.solver as registry
from fewstep.plan import Combine, Plan, flatten, freeze
from fewstep.solver import rules
from fewstep.solver.multistep import linear_multistep
from tests.support.testbed import SMOOTH_GRIDS, largest, random_grid

GRIDS = {
    "karras": SMOOTH_GRIDS["karras"](9, 20.0, 0.05),
    "irregular": random_grid(np.random.default_rng(0), 8),
    "to zero": [*random_grid(np.random.default_rng(1), 7), 0.0],
}


def plan(name: str, sigmas: Sequence[float]) -> Plan:
    return registry.get(name).plan(sigmas)


def row(name: str, sigmas: Sequence[float]) -> np.ndarray:
    return flatten(plan(name, sigmas))


def assert_equal_rows(one: np.ndarray, other: np.ndarray) -> None:
    # weights of a long multistep chain reach 1e2; each is a sum of a few dozen roundings
    assert one.shape == other.shape
    assert largest(one - other) <= 1e-12 * max(1.0, largest(one))


SAME = [
    ("ddim", "euler"),
    ("ddim", "dpm-solver-1"),
    ("ddim", "exp-adams-1"),
    ("ddim", "ipndm-1"),
    ("ddim", "ddim-eta:eta=0"),
    ("ddim-eta", "euler-ancestral"),
    ("heun", "dpm-solver-2:r=1"),
    ("heun", "churn:churn=0"),
    ("dpmpp-2m", "dpmpp-2m-sde:eta=0"),
    ("exp-adams", "exp-adams-3"),
    ("unipc", "unipc-2"),
    ("deis", "deis-3"),
    ("deis-rho", "deis-rho-3"),
    ("ipndm", "ipndm-4"),
    ("ipndm-v", "ipndm-v-4"),
    ("lms", "lms-4"),
    *((f"lms-{p}", f"ipndm-v-{p}") for p in (2, 3, 4)),
    *((f"lms-{p}", f"deis-rho-{p}") for p in (2, 3, 4)),
]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("one, other", SAME)
def test_the_same_method_under_two_names(one, other, grid):
    assert_equal_rows(row(one, GRIDS[grid]), row(other, GRIDS[grid]))


DIFFERENT = [
    ("exp-adams-2", "dpmpp-2m"),
    ("exp-adams-3", "dpmpp-3m"),
    ("exp-adams-2", "exp-adams-3"),
    ("unipc-2", "unipc-2-bh1"),
    ("unipc-2", "exp-adams-2"),
    ("ipndm-4", "ipndm-v-4"),
    ("deis-3", "deis-rho-3"),
    ("deis-2", "exp-adams-2"),
    ("ddim", "ddim-eta:eta=0.5"),
    ("dpm-solver-2", "dpm-solver-2:r=0.3"),
    ("dpm-solver-2", "dpmpp-2s"),
    ("heun", "dpm-solver-2"),
]


@pytest.mark.parametrize("one, other", DIFFERENT)
def test_methods_that_are_easily_confused_differ(one, other):
    sigmas = GRIDS["karras"]
    assert largest(row(one, sigmas) - row(other, sigmas)) > 1e-3


@pytest.mark.parametrize("grid", GRIDS)
def test_dpmpp_2m_is_unip_2_with_bh2(grid):
    sigmas = GRIDS[grid]
    unip = freeze(linear_multistep(sigmas, rule=rules.unip, order=2), prediction="x0", depth=2)
    assert_equal_rows(row("dpmpp-2m", sigmas), flatten(unip))


def full_order(found: Plan, outputs: int) -> list[Combine]:
    """The steps of a plan that use at least this many outputs: those after the ramp."""
    steps = [op for op in found.ops if isinstance(op, Combine)]
    return [op for op in steps if len(op.b) >= outputs]


@pytest.mark.parametrize("p", [3, 4])
def test_exp_adams_is_unip_from_order_3_on(p):
    """Below, UniP takes the shortcut rho = 1/2, and the ramp goes through there."""
    sigmas = GRIDS["irregular"]
    unip = freeze(linear_multistep(sigmas, rule=rules.unip, order=p), prediction="x0", depth=p)
    ours = full_order(plan(f"exp-adams-{p}", sigmas), 3)
    assert len(ours) == len(sigmas) - 3
    assert ours == full_order(unip, 3)


def test_the_two_kinds_of_b_cancel_in_unipc_3_after_its_ramp_but_not_in_unipc_2():
    sigmas = GRIDS["irregular"]
    third = full_order(plan("unipc-3", sigmas), 3)
    assert len(third) == 2 * len(sigmas) - 6  # correctors from the third point on, predictors too
    assert third == full_order(plan("unipc-3-bh1", sigmas), 3)
    second = [op for op in full_order(plan("unipc-2", sigmas), 2) if len(op.b) == 2]
    other = [op for op in full_order(plan("unipc-2-bh1", sigmas), 2) if len(op.b) == 2]
    gaps = [abs(float(op.b[0] - op_1.b[0])) for op, op_1 in zip(second, other, strict=True)]
    assert min(gaps) > 1e-3


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_ipndm_is_lms_on_a_grid_uniform_in_sigma(p):
    sigmas = np.linspace(10, 1, 10).tolist()
    assert_equal_rows(row(f"ipndm-{p}", sigmas), row(f"lms-{p}" if p > 1 else "ddim", sigmas))


def adams_bashforth(sigmas: Sequence[float], order: int) -> np.ndarray:
    """Adams-Bashforth on eps by a dense solve for every step, over [x_T, D_0, D_1, ...]."""
    unit = np.eye(len(sigmas))
    x, past = unit[0], []
    for i in range(len(sigmas) - 1):
        past = [(sigmas[i], (x - unit[i + 1]) / sigmas[i]), *past[: order - 1]]
        nodes = np.array([sigma for sigma, _ in past])
        powers = np.arange(len(past))
        h = sigmas[i + 1] - sigmas[i]
        matrix = (nodes - sigmas[i])[None] ** powers[:, None]
        weights = np.linalg.solve(matrix, h ** (powers + 1) / (powers + 1))
        x = x + sum(w * eps for w, (_, eps) in zip(weights, past, strict=True))
    return x


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("p", [2, 3, 4])
def test_lms_is_adams_bashforth_in_sigma(p, grid):
    assert_equal_rows(row(f"lms-{p}", GRIDS[grid]), adams_bashforth(GRIDS[grid], p))


@pytest.mark.parametrize(
    "name", ["deis-2", "deis-3", "deis-4", "exp-adams-2", "dpmpp-2m", "dpmpp-3m"]
)
def test_the_first_interval_of_a_multistep_method_is_ddim(name):
    assert_equal_rows(row(name, [10.0, 2.0]), row("ddim", [10.0, 2.0]))


@pytest.mark.parametrize("name", registry.names())
def test_constant_outputs_end_on_the_line_to_them(name):
    """D = x = c stays, so the row sums to 1; x_T = sigma_0 z and D = 0 end at sigma_N z."""
    sigmas = GRIDS["irregular"]
    found = plan(name, sigmas)
    weights = flatten(found)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    if not any(isinstance(op, Combine) and op.noise for op in found.ops):
        assert weights[0] == pytest.approx(sigmas[-1] / sigmas[0], rel=1e-9)


@pytest.mark.parametrize(
    "name", ["ddim-eta", "ddim-eta:eta=0.5", "dpmpp-2m-sde", "dpmpp-2m-sde:eta=0.5"]
)
def test_noise_makes_up_for_what_a_step_takes_away(name):
    """With D = 0 the state is noise of variance sigma^2, so a^2 cur^2 + noise^2 = nxt^2."""
    sigmas = GRIDS["irregular"]
    steps = [op for op in plan(name, sigmas).ops if isinstance(op, Combine)]
    for cur, op in zip(sigmas, steps, strict=False):
        assert op.noise > 0
        assert (op.a * cur) ** 2 + op.noise**2 == pytest.approx(op.sigma**2, rel=1e-12)


def test_churn_raises_the_noise_to_the_level_that_it_names():
    sigmas = GRIDS["karras"]
    level, raised = sigmas[0], []
    for op in plan("churn:noise=1", sigmas).ops:
        if isinstance(op, Combine):
            if op.noise:
                # 40 / 8 intervals is above the cap, sqrt(2) - 1
                assert op.sigma == pytest.approx(level * math.sqrt(2), rel=1e-12)
                assert op.noise**2 + level**2 == pytest.approx(op.sigma**2, rel=1e-12)
                raised.append(level)
            level = op.sigma
    assert raised == [sigma for sigma in sigmas[:-1] if 0.05 <= sigma <= 50]
