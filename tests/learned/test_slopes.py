"""AMED-Plugin refuses a base whose rule loses the gradient of the learned levels."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest

import fewstep.solver.registry as kept
from fewstep.learned import train
from fewstep.learned.ops import bases, check_slope
from fewstep.solver import Solver
from fewstep.solver.multistep import linear_multistep
from fewstep.solver.rules import exp_adams, expm1, log
from tests.support.testbed import Counted, Mixture


def with_math(past: Any, nxt: Any, order: int) -> Any:
    """DDIM with its step in log sigma by `math`: nothing of b is differentiable."""
    h = math.log(past[0] / nxt)
    return math.exp(-h), (-math.expm1(-h),)


def in_part(past: Any, nxt: Any, order: int) -> Any:
    """The same, where a is differentiable and b is not."""
    return nxt / past[0], (-math.expm1(-math.log(past[0] / nxt)),)


def two_with_float(past: Any, nxt: Any, order: int) -> Any:
    """Right with one output, and without the gradient of the level of the newest of two."""
    if len(past) < 2 or order < 2:
        return exp_adams(past, nxt, 1)
    return exp_adams([float(past[0]), past[1]], nxt, 2)


def right(past: Any, nxt: Any, order: int) -> Any:
    return nxt / past[0], (-expm1(-log(past[0] / nxt)),)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Any:
    def register(rule: Any, order: int) -> str:
        ops = functools.partial(linear_multistep, rule=rule, order=order)
        monkeypatch.setitem(kept._REGISTRY, "own", Solver("own", ops, "x0", order, 1))
        return "own"

    return register


@pytest.mark.parametrize("rule, order", [(with_math, 1), (in_part, 1), (two_with_float, 2)])
def test_it_is_refused_before_training(rule: Any, order: int, registered: Any) -> None:
    denoiser = Counted(Mixture())
    with pytest.raises(ValueError, match=r"'own': its rule loses .* log and expm1 .* take tuned"):
        train(denoiser, (3,), method="amed-plugin", base=registered(rule, order), nfe=4)
    assert denoiser.calls <= 1


@pytest.mark.parametrize("name", bases())
def test_our_own_rules_pass(name: str) -> None:
    check_slope(name)


def test_a_rule_of_ones_own_passes_with_our_functions(registered: Any) -> None:
    check_slope(registered(right, 1))
