"""The option `end`: a named grid whose last point is moved to 0, at no cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import fewstep
import fewstep.solver as registry
from fewstep.models import BUILTIN
from fewstep.models.formats.native import load_folder
from fewstep.models.network import NetworkModel
from fewstep.solving import solve
from tests.support.testbed import ALL_SOLVERS, Counted, Mixture, karras, noise

SEEDS = (1, 2, 3)
LOW, HIGH = Mixture.sigma_min, Mixture.sigma_max


@pytest.fixture(scope="module")
def model() -> NetworkModel:
    return load_folder(BUILTIN / "fashion-mnist")


@pytest.mark.parametrize("name", ALL_SOLVERS)
def test_it_equals_sigmas_whose_last_is_0(name: str, mixture: Mixture) -> None:
    x, intervals = noise(3, HIGH), 4
    by_hand = [*karras(intervals + 1, HIGH, LOW)[:-1], 0.0]
    spent = registry.get(name).on(by_hand).evaluations
    ended = solve(mixture, x, name, spent, end="zero", seeds=SEEDS)
    # the two grids come from two formulas, which agree to a few units in the last place
    torch.testing.assert_close(
        ended, solve(mixture, x, name, grid=by_hand, seeds=SEEDS), rtol=0, atol=1e-11
    )


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("ddim", [1, 2, 3]),
        ("heun", [1, 3, 5]),  # the step into 0 is Euler's, and spends one
        ("dpm-solver-2", [1, 3, 5]),
        ("dpm-solver-3", [1, 4, 7]),
        ("dpmpp-2m", [1, 2, 3]),
        ("churn", [1, 3, 5]),
    ],
)
def test_a_step_into_0_spends_one_evaluation(name: str, counts: list[int]) -> None:
    solver = registry.get(name)
    found = [registry.intervals_for(solver, count, end="zero") for count in counts]
    assert found == [1, 2, 3]
    for count in counts:
        denoiser = Counted(Mixture())
        solve(denoiser, noise(3, 80.0), name, count, end="zero", seeds=SEEDS)
        assert denoiser.calls == count


def test_a_budget_that_does_not_fit_names_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"heun with end=zero cannot .* 4 .*; it can spend .*3, 5"):
        registry.intervals_for(registry.get("heun"), 4, end="zero")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"end": "null"}, "end must be one of sigma_min, zero, got 'null'"),
        ({"end": "zero", "grid": [20.0, 1.0]}, "sigmas have their own ends"),
        ({"end": "zero", "final": True}, "the grid ends at 0"),
        ({"end": "zero", "solver": registry.get("ddim").plan([20.0, 1.0])}, "leave out end$"),
    ],
)
@pytest.mark.parametrize("through", ["solve", "iterate", "sample"])
def test_what_has_its_own_end_refuses_it(
    through: str, arguments: dict[str, Any], message: str, mixture: Mixture, model: NetworkModel
) -> None:
    run = {
        "solve": lambda **given: fewstep.solve(mixture, noise(3, HIGH), **given),
        "iterate": lambda **given: list(fewstep.iterate(mixture, noise(3, HIGH), **given)),
        "sample": lambda **given: fewstep.sample(model, seeds=SEEDS, **given),
    }[through]
    with pytest.raises(ValueError, match=message) as caught:
        run(**{"solver": "ddim", **arguments})
    assert "\n" not in str(caught.value)


def test_auto_takes_the_end_that_the_card_names(model: NetworkModel) -> None:
    auto = {"3": {"solver": "dpmpp-2m", "grid": "log-snr", "end": "zero"}, "4": {"solver": "ddim"}}
    knowing = replace(model, card=replace(model.card, auto=auto))

    def made(nfe: int, **more: Any) -> Any:
        return fewstep.sample(knowing, nfe=nfe, seeds=SEEDS, **more)

    known = made(3)
    assert (known.provenance["end"], made(4).provenance["end"]) == ("zero", "sigma_min")
    named = fewstep.sample(model, solver="dpmpp-2m", nfe=3, grid="log-snr", end="zero", seeds=SEEDS)
    assert (known.images == named.images).all()
    assert made(3, end="sigma_min").provenance["end"] == "sigma_min"
    assert made(3, final=True).provenance["end"] == "sigma_min"  # one or the other
