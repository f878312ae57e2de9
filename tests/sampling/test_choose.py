"""The plan that a run would follow."""

from __future__ import annotations

import pytest

import fewstep
from fewstep.sampling.choose import plan_for
from fewstep.sampling.settings import Settings
from fewstep.solver import get


def test_a_plan_is_its_own_plan() -> None:
    plan = get("dpmpp-2m").plan((80.0, 5.0, 0.3, 0.002))
    assert plan_for(Settings(plan)) is plan
    assert plan_for(Settings(plan), fewstep.load("fashion-mnist")) is plan


def test_a_plan_that_does_not_fit_the_model_is_refused() -> None:
    plan = get("dpmpp-2m").plan((40.0, 5.0, 0.3, 0.002))
    with pytest.raises(ValueError, match="starts at sigma 40, and sampling starts at 80"):
        plan_for(Settings(plan), fewstep.load("fashion-mnist"))
