"""What cannot be meant is refused in one line that says what to do."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fewstep
import fewstep.solver as registry
from fewstep.denoiser import Guided
from fewstep.models import BUILTIN
from fewstep.models.formats.native import load_folder
from fewstep.models.network import NetworkModel
from fewstep.plan import Combine
from fewstep.solver import Solver
from fewstep.solver.registry import _key
from fewstep.solving import solve
from tests.support.testbed import ALL_SOLVERS, Mixture, noise

GRID = [10.0, 3.0, 1.0]


@pytest.fixture(scope="module")
def model() -> NetworkModel:
    return load_folder(BUILTIN / "fashion-mnist")


# --- names and options of solvers ----------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_SOLVERS)
def test_names_may_be_spelled_with_underscores_and_capitals(name: str) -> None:
    assert registry.get(name.upper().replace("-", "_")) is registry.get(name)
    assert registry.get(f" {name} ".replace("-", " ")) is registry.get(name)


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("dpmpp_2m", "dpmpp-2m"),
        ("dpm++2m", "dpmpp-2m"),
        ("DPM++ 2M", "dpmpp-2m"),
        ("DPM++ 2M SDE", "dpmpp-2m-sde"),
        ("dpm_solver++", "dpmpp-2m"),
        ("uni_pc", "unipc-2"),
        ("Euler a", "ddim-eta"),
        ("euler_a", "ddim-eta"),
        ("dpm_2", "dpm-solver-2"),
        ("DDPM", "ddim-eta"),
    ],
)
def test_usual_names_of_other_programs_are_known(spelled: str, name: str) -> None:
    assert registry.get(spelled).name == name


def test_every_alias_has_one_reading() -> None:
    names = [*registry.names(), *registry.ALIASES]
    assert len({_key(name) for name in names}) == len(names)
    with pytest.raises(ValueError, match="already a solver called 'dpmpp-2m'"):
        registry.register(Solver("DPM++ 2M", registry.get("ddim").ops, "x0", 1, 1))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dpm-solver-2:r=0", "r of dpm-solver-2 must be above 0 and at most 1, got 0"),
        ("dpm-solver-2:r=-1", "r of dpm-solver-2"),
        ("dpmpp-2s:r=2", "r of dpmpp-2s"),
        ("churn:churn=-5", "churn of churn must be at least 0, got -5"),
        ("churn:noise=inf", "noise of churn"),
        ("churn:low=nan", "low of churn"),
        ("ddim-eta:eta=-0.1", "eta of ddim-eta must be at least 0 and at most 1"),
        ("ddim-eta:eta=1.1", "eta of ddim-eta"),
        ("dpmpp-2m-sde:eta=-1", "eta of dpmpp-2m-sde must be at least 0, got -1"),
        ("dpmpp-2m-sde:eta=inf", "eta of dpmpp-2m-sde"),
        ("dpm-solver-2:r=nan", "r of dpm-solver-2"),
    ],
)
def test_options_out_of_range_are_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.get(name)


@pytest.mark.parametrize("name", ALL_SOLVERS)
def test_every_option_declares_its_range_and_the_ends_of_it_run(
    name: str, mixture: Mixture
) -> None:
    solver = registry.get(name)
    ranges = dict(solver.ranges)
    assert ranges.keys() == dict(solver.options).keys()
    for option, allowed in ranges.items():
        low = allowed.low + 1e-3 * allowed.above
        for value in (low, min(allowed.high, 50.0)):
            other = solver.with_options(**{option: value})
            assert torch.isfinite(
                solve(mixture, noise(2, 10.0), other, grid=GRID, seeds=(1, 2))
            ).all()


def test_an_option_is_no_text() -> None:
    with pytest.raises(ValueError, match=r"eta of ddim-eta must be .* got '1'"):
        registry.get("ddim-eta").with_options(eta="1")  # type: ignore[arg-type]


def test_a_name_with_options_is_exact() -> None:
    third = registry.get("dpm-solver-2").with_options(r=1 / 3)
    assert third.name != registry.get("dpm-solver-2:r=0.333333").name
    assert registry.get(third.name).options == third.options


def test_a_solver_and_samples_show_themselves_in_one_line(model: NetworkModel) -> None:
    assert repr(registry.get("unipc-2")) == "Solver('unipc-2', order 3, history of x0)"
    shown = repr(fewstep.sample(model, solver="ddim", nfe=2, seeds=(0, 1)))
    assert shown.startswith("Samples(2 of 32x32x1, 2 evaluations")
    assert "\n" not in shown
    assert len(shown) < 120


# --- arguments of the library --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (lambda x: (x, None), "tuple"),
        (lambda x: SimpleNamespace(sample=x), "SimpleNamespace"),
        (lambda x: None, "NoneType"),
    ],
)
def test_a_denoiser_that_returns_no_tensor_is_told_so(made: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=f"returned a {kind}; it must return D alone"):
        solve(lambda x, sigma: made(x), noise(2, 10.0), "ddim", grid=GRID)


@pytest.mark.parametrize("solver", [None, 3, lambda sigmas: None])
def test_a_solver_is_a_name_or_runs(solver: Any, mixture: Mixture, model: NetworkModel) -> None:
    with pytest.raises(ValueError, match=r"solver must be a name, .* got "):
        solve(mixture, noise(2, 10.0), solver, 3)
    with pytest.raises(ValueError, match="solver must be a name"):
        fewstep.sample(model, solver=solver, seeds=(0,))


@pytest.mark.parametrize("nfe", [2.5, "5", None])
def test_a_budget_is_a_whole_number(nfe: Any) -> None:
    with pytest.raises(ValueError, match="nfe must be a whole number, got"):
        registry.intervals_for(registry.get("ddim"), nfe)
    assert registry.intervals_for(registry.get("ddim"), np.int64(5)) == 5  # type: ignore[arg-type]


def test_a_solver_that_spends_nothing_says_so() -> None:
    def ops(sigmas):
        yield Combine((), sigmas[-1])

    with pytest.raises(ValueError, match="idle cannot spend exactly 3 evaluations; it spends none"):
        registry.intervals_for(Solver("idle", ops, "x0", 1, 1), 3)


@pytest.mark.parametrize("seeds", [5, 1.5, [1.5], ["a"], None])
def test_seeds_are_whole_numbers_one_per_picture(seeds: Any, model: NetworkModel) -> None:
    with pytest.raises(ValueError, match="seeds must be whole numbers, one per picture"):
        fewstep.sample(model, seeds=seeds)


def test_a_model_is_loaded_first() -> None:
    with pytest.raises(ValueError, match="load it first"):
        fewstep.sample("fashion-mnist", seeds=(0,))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cond", "uncond", "message"),
    [
        ("a boot", "", "must be tensors, .* got str and str"),
        (torch.ones(1, 2), None, "got Tensor and NoneType"),
        (None, None, "got NoneType"),
        ({"text": torch.ones(1), "size": "a"}, {"text": torch.ones(1), "size": "b"}, "str"),
        ((torch.ones(1),), torch.ones(1), "got tuple and Tensor"),
    ],
)
def test_conditions_of_guidance_are_tensors(cond: Any, uncond: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guided(lambda x, sigma, condition: x, 2.0, cond, uncond)


def test_what_is_not_finite_stays_the_callers_in_solve() -> None:
    end = solve(lambda x, sigma: x * math.nan, noise(2, 10.0), "ddim", grid=GRID)
    assert torch.isnan(end).all()


# --- the mean as a first step --------------------------------------------------------------------


@pytest.mark.parametrize("start", [5.0, Mixture.sigma_max * (1 - 1e-3)])
def test_the_mean_of_d_at_sigma_max_stands_for_none_below(start: float, mixture: Mixture) -> None:
    x, grid = noise(2, start), (start, 1.0, 0.1)
    with pytest.raises(ValueError, match=r"afs='mean' holds at sigma_max, 20, and this starts"):
        solve(mixture, x, "ddim", grid=grid, afs="mean")
    with pytest.raises(ValueError, match="afs='mean' holds at sigma_max"):
        solve(mixture, x, "ddim", 3, sigma_max=start, afs="mean")
    with pytest.raises(ValueError, match="afs='mean' holds at sigma_max"):
        solve(mixture, x, registry.get("ddim").plan(grid, "mean"))


@pytest.mark.parametrize("start", [20.0, 20.0 * (1 - 1e-7), 40.0])
def test_at_sigma_max_and_above_it_does(start: float, mixture: Mixture) -> None:
    ended = solve(mixture, noise(2, start), "ddim", grid=(start, 1.0, 0.1), afs="mean")
    assert torch.isfinite(ended).all()


def test_under_a_head_start_auto_leaves_the_mean_out(model: NetworkModel) -> None:
    assert model.card.auto["2"].afs == "mean"
    assert model.card.auto["2"].learned is None
    plain = fewstep.sample(model, nfe=2, seeds=(0,)).provenance
    below = fewstep.sample(model, nfe=2, seeds=(0,), head_start=20.0).provenance
    top = fewstep.sample(model, nfe=2, seeds=(0,), head_start=80.0).provenance
    assert [run["afs"] for run in (plain, below, top)] == ["mean", "none", "mean"]
    assert {run["nfe"] for run in (plain, below, top)} == {2}
    learned = fewstep.sample(model, nfe=5, seeds=(0,)).provenance
    below = fewstep.sample(model, nfe=5, seeds=(0,), head_start=20.0).provenance
    assert learned["solver"].startswith("tuned")  # which starts at sigma_max alone
    assert (below["solver"], below["afs"]) == ("ipndm-3", "none")
    with pytest.raises(ValueError, match="afs='mean' holds at sigma_max, 80, and this starts at"):
        fewstep.sample(model, nfe=5, seeds=(0,), head_start=20.0, afs="mean")


# --- auto beside sigmas, and conditions per picture ----------------------------------------------


def test_beside_sigmas_auto_is_a_solver_alone(model: NetworkModel) -> None:
    sigmas = (80.0, 10.0, 2.0, 0.5, 0.002)
    made = fewstep.sample(model, seeds=(0,), grid=sigmas)
    assert made.nfe == len(sigmas) - 1
    assert made.provenance["afs"] == "none"
    assert made.provenance["solver"] == model.card.auto["4"].solver
    asked = fewstep.sample(model, seeds=(0,), grid=sigmas, afs="mean")
    assert (asked.nfe, asked.provenance["afs"]) == (len(sigmas) - 2, "mean")


def test_guidance_and_labels_may_be_one_per_picture(model: NetworkModel) -> None:
    seeds, labels, scales = (3, 4, 5), (1, 8, 9), (1.5, 4.0, 0.0)

    def pictures(**more: Any) -> Any:
        return fewstep.sample(model, solver="dpmpp-2m", nfe=3, **more)

    alone = [
        pictures(seeds=[seed], label=label, guidance=scale).images[0].astype(int)
        for seed, label, scale in zip(seeds, labels, scales, strict=True)
    ]
    for made in (
        pictures(seeds=seeds, label=torch.tensor(labels), guidance=torch.tensor(scales)),
        pictures(seeds=seeds, label=np.array(labels), guidance=scales, batch=2),
    ):
        # equal to float32 rounding, one grey level
        assert np.abs(made.images.astype(int) - np.stack(alone)).max() <= 1
        assert json.loads(json.dumps(made.provenance)) == made.provenance
        assert made.provenance["guidance"] == list(scales)
        assert made.provenance["label"] == list(labels)
    with pytest.raises(ValueError, match="guidance must be one or one per seed, got 2 for 3"):
        pictures(seeds=seeds, label=1, guidance=(1.0, 2.0))
    with pytest.raises(ValueError, match="guidance must be finite"):
        pictures(seeds=seeds, label=1, guidance=(1.0, 2.0, math.nan))


@pytest.mark.parametrize("label", [np.int64(3), torch.tensor(3), np.array(3)])
def test_provenance_is_json_whatever_the_label_came_as(label: Any, model: NetworkModel) -> None:
    made = fewstep.sample(model, nfe=2, seeds=(0,), label=label).provenance
    assert json.loads(json.dumps(made))["label"] == 3


def test_text_is_a_name_first_and_a_number_an_index(model: NetworkModel) -> None:
    names = tuple(str(9 - i) for i in range(10))  # "9" is the class of index 0
    digits = replace(model, card=replace(model.card, classes=names))
    x, sigma = model.prior((0,)), torch.tensor([5.0])
    for label, row in (("9", 0), (9, 9), ("2", 7), (2, 2), (np.int64(2), 2), (torch.tensor(2), 2)):
        theirs = digits.denoiser(label)(x, sigma)
        assert torch.equal(theirs, model.denoiser(row)(x, sigma))


def test_a_model_loads_with_torchs_own_dtype_and_device() -> None:
    loaded = fewstep.load("fashion-mnist", dtype=torch.bfloat16, device=torch.device("cpu"))
    assert loaded.dtype == torch.bfloat16
