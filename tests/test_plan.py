"""Plans: a round trip through JSON, one row of weights, and budgets that are kept exactly."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fewstep.solver as registry
from fewstep.plan import Combine, Eval, Plan, flatten, freeze, nfe
from fewstep.solving import solve
from tests.support.testbed import (
    ALL_SOLVERS,
    ODE_SOLVERS,
    SDE_SOLVERS,
    Counted,
    Mixture,
    noise,
    random_grid,
)

SEEDS = [1, 2]
IRREGULAR = random_grid(np.random.default_rng(2), 6)
LAST = {"as it is": (False, IRREGULAR[-1]), "final": (True, IRREGULAR[-1]), "to zero": (False, 0.0)}

# Every float64 that a plan may hold, short of infinities.
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def plans(draw) -> Plan:
    """Any static program: what it computes does not matter here."""
    depth = draw(st.integers(1, 4))
    ops: list[Eval | Combine] = []
    for _ in range(draw(st.integers(1, 5))):
        cond = draw(st.none() | FLOATS)
        ops.append(Eval(draw(FLOATS), cond, draw(st.sampled_from(["net", "zero", "mean"]))))
        ops.append(
            Combine(
                tuple(draw(st.lists(FLOATS, max_size=depth))),
                draw(FLOATS),
                draw(FLOATS),
                draw(st.floats(min_value=0.0, allow_infinity=False)),  # a standard deviation
                draw(st.none() | st.tuples(FLOATS, FLOATS)),
                draw(st.booleans()),
            )
        )
    levels = draw(st.lists(st.floats(0, allow_infinity=False), max_size=4, unique=True))
    sigmas = tuple(sorted(levels, reverse=True))
    return Plan(draw(st.sampled_from(["eps", "x0"])), depth, "any", "any", sigmas, tuple(ops))


def bits(value: object) -> object:
    """The value with every float as its bits, so that 0.0 and -0.0 differ."""
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, tuple):
        return type(value).__name__, tuple(bits(part) for part in value)
    return value


@given(plan=plans())
def test_a_plan_survives_json_to_the_bit(plan):
    read = Plan.from_json(plan.to_json())
    assert read == plan
    assert bits((read.ops, read.sigmas)) == bits((plan.ops, plan.sigmas))


@pytest.mark.parametrize("name", ALL_SOLVERS)
def test_a_solver_s_plan_survives_json_and_samples_the_same_bits(name, mixture):
    plan = registry.get(name).plan(IRREGULAR, grid="custom")
    read = Plan.from_json(plan.to_json())
    assert read == plan
    x = noise(len(SEEDS), IRREGULAR[0])
    one = solve(mixture, x, name, grid=IRREGULAR, seeds=SEEDS)
    assert torch.equal(solve(mixture, x, read, seeds=SEEDS), one)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{}", '{"ops": [{"op": "jump"}]}', '{"ops": [{"op": "eval"}]}', '{"ops": 1}'],
)
def test_text_that_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match="not a plan"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"sigmas": [', '"sigmas": [NaN, ', "must be finite, got NaN"),
        ('"sigmas": [', '"sigmas": [1e999, ', "must be finite, got 1e999"),
        ('"sigmas": [', '"sigmas": [0.001, ', "strictly decrease"),
        ('"sigmas": [', '"sigmas": ["80", ', "finite numbers >= 0, got '80'"),
        ('"sigmas": [', '"sigmas": [true, ', "finite numbers >= 0, got True"),
        ('"sigmas": [', f'"sigmas": [1{"0" * 400}, ', "finite numbers >= 0"),
        ('"depth": 2', '"depth": true', "depth must be an integer"),
        ('"depth": 2', '"depth": 2, "depth": 2', "'depth' stands twice"),
        ('"depth": 2', '"depth": 2, "extra": 2', "extra"),
        ('"op": "eval"', '"op": ["eval"]', "an operation must be"),
        ('"op": "eval"', '"op": "eval", "source": "file"', "source must be one of"),
        ('"op": "eval"', '"op": "eval", "features": 3', "features must be true or false"),
        ('"op": "combine"', '"op": "combine", "interval": [1.0]', "two noise levels"),
        ('"op": "combine"', '"op": "combine", "noise": "1"', "must be finite, got '1'"),
        ('"solver": "', '"solver": "\\u001b[31m', "control character"),
        ('"solver": "', '"solver": 3, "grid": "', "stands twice"),
        ('"sigmas": [', '"sigmas": [' + "[" * 100_000, "nested"),
    ],
)
def test_plans_that_cannot_be_are_one_line_that_says_why(old, new, words):
    text = registry.get("dpmpp-2m").plan(IRREGULAR).to_json()
    assert old in text
    with pytest.raises(ValueError, match="not a plan") as caught:
        Plan.from_json(text.replace(old, new, 1))
    assert re.search(words, str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_plan_whose_header_contradicts_its_steps_is_refused():
    plan = json.loads(registry.get("lms-4").plan(IRREGULAR).to_json())
    with pytest.raises(ValueError, match="reaches 3 outputs back, depth is 2"):
        Plan.from_json(json.dumps({**plan, "depth": 2}))
    with pytest.raises(ValueError, match="prediction must be eps or x0, got 'v'"):
        Plan.from_json(json.dumps({**plan, "prediction": "v"}))


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("afs", registry.AFS)
@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_the_flattened_row_applied_to_the_recorded_outputs_is_the_solution(
    name, afs, last, mixture
):
    final, end = LAST[last]
    sigmas = [*IRREGULAR[:-1], end]
    plan = registry.get(name).plan(sigmas, afs, final)
    denoiser = Counted(mixture)
    x = noise(3, sigmas[0])
    solved = solve(denoiser, x, name, grid=sigmas, afs=afs, final=final)
    row = flatten(plan)
    outputs = list(denoiser.outputs)
    if afs == "zero":  # its weight is that of x_T
        assert row[1] == 0
        outputs.insert(0, torch.zeros_like(x))
    if afs == "mean":
        outputs.insert(0, mixture.far_mean.expand_as(x))
    assert len(row) == 1 + len(outputs)
    by_row = sum((w * d for w, d in zip(row[1:], outputs, strict=True)), row[0] * x)
    torch.testing.assert_close(solved, by_row, rtol=0, atol=1e-11)  # weights up to 1e2


def random_program(rng: np.random.Generator) -> tuple[list[Eval | Combine], int]:
    """A legal stream of evaluations, trial and accepted steps in any order, and a depth."""
    depth = int(rng.integers(1, 4))
    ops: list[Eval | Combine] = []
    outputs = 0
    for _ in range(rng.integers(1, 13)):
        if rng.random() < 0.5:
            ops.append(Eval(rng.uniform(0.1, 5.0)))
            outputs += 1
        else:
            b = rng.uniform(-1.5, 1.5, rng.integers(0, min(outputs, depth) + 1)).tolist()
            accept = bool(rng.random() < 0.5)
            ops.append(Combine(tuple(b), 1.0, rng.uniform(-1.5, 1.5), accept=accept))
    return [*ops, Combine((), 1.0)], depth  # the anchor as it stands


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "x0"])
@settings(max_examples=200)  # most programs have no step of each kind
@given(seed=st.integers(0, 10**6))
def test_any_stream_of_operations_does_what_its_flattened_row_says(prediction, grad, seed):
    """Whatever the order of trial and accepted steps, and whether buffers are reused or not."""
    ops, depth = random_program(np.random.default_rng(seed))
    plan = freeze(ops, prediction=prediction, depth=depth)
    denoiser = Counted(Mixture())
    x = noise(2, 2.0)
    with torch.set_grad_enabled(grad):
        solved = solve(denoiser, x, plan)
    row = flatten(plan)
    by_row = sum((w * d for w, d in zip(row[1:], denoiser.outputs, strict=True)), row[0] * x)
    # eps divides by sigma >= 0.1, at most once for each output that a chain goes through
    size = max(1.0, float(np.abs(row).max()))
    torch.testing.assert_close(solved, by_row, rtol=0, atol=1e-10 * size)


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize(
    "name, afs",
    [(name, afs) for name in ODE_SOLVERS for afs in registry.AFS]
    + [(name, "none") for name in SDE_SOLVERS],
)
def test_a_budget_is_spent_exactly_or_refused_with_the_budgets_that_are_possible(
    name, afs, final, mixture
):
    solver = registry.get(name)
    x = noise(2, mixture.sigma_max)
    refused = 0
    for budget in range(1, 13):
        denoiser = Counted(mixture)
        options = {"seeds": SEEDS, "afs": afs, "final": final}
        try:
            end = solve(denoiser, x, name, nfe=budget, sigma_max=20.0, sigma_min=0.01, **options)
        except ValueError as error:
            refused += 1
            possible = [int(n) for n in re.findall(r"\d+", str(error).split("it can spend")[1])]
            assert possible
            assert budget not in possible
            for other in possible:
                assert registry.intervals_for(solver, other, afs, final) >= 1
            continue
        assert denoiser.calls == budget
        assert torch.isfinite(end).all()
    per_interval = {"heun": 2, "dpm-solver-2": 2, "dpm-solver-3": 3, "dpmpp-2s": 2, "churn": 2}
    spent = (per_interval.get(name, 1) * n - (afs != "none") + final for n in range(1, 15))
    assert refused == 12 - len([n for n in spent if 1 <= n <= 12])


@pytest.mark.parametrize("name", ALL_SOLVERS)
def test_nfe_counts_what_the_network_is_asked(name, mixture):
    for final, end in LAST.values():
        sigmas = [*IRREGULAR[:-1], end]
        denoiser = Counted(mixture)
        solve(denoiser, noise(2, 10.0), name, grid=sigmas, seeds=SEEDS, final=final)
        assert nfe(registry.get(name).plan(sigmas, "none", final)) == denoiser.calls


def test_a_solver_that_waits_for_the_network_has_no_plan():
    def adaptive():
        seen = yield Eval(1.0)
        yield Combine((float(seen.denoised.mean()),), 0.5)

    with pytest.raises(ValueError, match="careful adapts to the network, so it has no plan"):
        freeze(adaptive(), prediction="x0", depth=1, solver="careful")


@pytest.mark.parametrize("name", SDE_SOLVERS)
def test_an_analytic_first_step_of_a_stochastic_solver_is_refused(name):
    with pytest.raises(ValueError, match="is stochastic; an analytic first step goes with ODE"):
        registry.get(name).plan(IRREGULAR, afs="zero")


def test_a_last_denoising_step_after_zero_is_refused():
    with pytest.raises(ValueError, match="the grid ends at 0"):
        registry.get("ddim").plan([1.0, 0.0], final=True)


def test_unknown_names_and_options_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"no solver called 'dpmp-2m'.*dpmpp-2m"):
        registry.get("dpmp-2m")
    with pytest.raises(ValueError, match=r"ddim-eta has no option 'eto'; it has: eta"):
        registry.get("ddim-eta:eto=1")
    with pytest.raises(ValueError, match=r"NAME:key=number"):
        registry.get("ddim-eta:eta")
    with pytest.raises(ValueError, match=r"eta of ddim-eta must be .* at most 1, got 2\.0"):
        registry.get("ddim-eta:eta=2")
    with pytest.raises(ValueError, match="afs must be one of none, zero, mean, got 'one'"):
        registry.get("ddim").plan(IRREGULAR, afs="one")
    with pytest.raises(ValueError, match="nfe must be from 1 to 10000, got 0"):
        registry.intervals_for(registry.get("ddim"), 0)
    with pytest.raises(ValueError, match="already a solver called 'ddim'"):
        registry.register(registry.get("ddim"))


def test_options_make_another_solver_and_leave_the_first_alone():
    half = registry.get("ddim-eta:eta=0.5")
    assert half.options == (("eta", 0.5),)
    assert half.name == "ddim-eta:eta=0.5"
    assert registry.get("ddim-eta").options == (("eta", 1.0),)
    again = registry.get("churn:low=1").with_options(high=2.0)
    assert dict(again.options) == {"churn": 40.0, "low": 1.0, "high": 2.0, "noise": 1.003}
    raised = [
        op for op in again.plan([3.0, 1.5, 0.5, 0.1]).ops if isinstance(op, Combine) and op.noise
    ]
    assert [op.sigma for op in raised] == [pytest.approx(1.5 * math.sqrt(2))]
