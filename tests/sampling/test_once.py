"""What a run works out before its first picture is worked out once, whatever the number of
batches."""

from __future__ import annotations

import collections
import hashlib
import timeit
from typing import Any

import pytest

import fewstep
from fewstep import solving
from fewstep.learned.solver import LearnedSolver
from fewstep.plan import Plan
from fewstep.sampling import choose, generate
from fewstep.sampling.settings import Settings
from tests.support.testbed import Mixture


def calls(monkeypatch: pytest.MonkeyPatch, **run: Any) -> dict[str, int]:
    """How often a run of 16 pictures resolves, makes a plan and hashes."""
    count: collections.Counter[str] = collections.Counter()

    def counted(home: Any, name: str) -> None:
        real = getattr(home, name)

        def call(*given: Any, **named: Any) -> Any:
            count[name] += 1
            return real(*given, **named)

        monkeypatch.setattr(home, name, call)

    model = fewstep.load("fashion-mnist")
    for home in (generate, choose):
        counted(home, "resolve")
    counted(LearnedSolver, "plan")
    counted(Plan, "to_json")
    counted(hashlib, "sha256")
    fewstep.sample(model, seeds=range(16), nfe=3, **run)
    monkeypatch.undo()
    return dict(count)


@pytest.mark.parametrize("solver", ["auto", "tuned", "dpmpp-2m", "ddim"])
def test_four_batches_are_resolved_planned_and_hashed_as_often_as_one(
    solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls(monkeypatch, solver=solver, batch=16)  # learned solvers are read and kept
    one = calls(monkeypatch, solver=solver, batch=16)
    four = calls(monkeypatch, solver=solver, batch=4)
    assert one["resolve"] >= 1
    assert four == one


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "unipc-3", "ipndm-4"])
def test_a_plan_is_found_again_in_microseconds(solver: str) -> None:
    denoiser, settings = Mixture(), Settings(solver, 5)
    assert solving.resolve(settings, denoiser) is solving.resolve(settings, denoiser)
    each = min(timeit.repeat(lambda: solving.resolve(settings, denoiser), number=200, repeat=20))
    assert each / 200 < 50e-6  # 3 microseconds on an idle machine, where it was 100 and more
