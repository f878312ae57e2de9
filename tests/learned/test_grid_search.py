"""Grids found by dynamic programming: the path is the best of all, the grid no worse than any that
has a name, and the folder a solver like any other."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch

import fewstep
from fewstep.grid import GRIDS, make_grid
from fewstep.learned import LearnedSolver, train
from fewstep.learned.grid_search import FINE, WEIGHTS, search_grid, shortest
from fewstep.solver import get
from tests.support.command import command
from tests.support.testbed import Counted, Mixture, noise

SHAPE = (3,)
SHORT = {"method": "grid", "base": "ipndm-2", "nfe": 4, "trajectories": 24, "validation_seeds": 24}
SHORT |= {"fallback": False}


def named(points: int) -> dict[str, tuple[float, ...]]:
    return {name: make_grid(name, points, 20.0, 0.01) for name in ("karras", "log-snr")}


@pytest.mark.parametrize("edges", [1, 2, 3, 6])
def test_the_path_is_the_best_of_all(edges):
    costs = torch.rand(7, 7, generator=torch.Generator().manual_seed(edges))
    found = shortest(costs, edges)
    inner = itertools.combinations(range(1, 6), edges - 1)
    every = [[0, *nodes, 6] for nodes in inner]

    def total(path):
        return sum(costs[i, j].item() for i, j in itertools.pairwise(path))

    assert total(found) == pytest.approx(min(map(total, every)), rel=1e-6)
    assert found in every


@pytest.mark.parametrize("afs", ["none", "zero", "mean"])
def test_costs_are_the_errors_of_ddim_steps(afs, mixture, monkeypatch):
    """Every cost that the search adds up, beside a DDIM step from the teacher's own state."""
    seen = []
    monkeypatch.setattr(
        "fewstep.learned.grid_search.shortest",
        lambda costs, edges: seen.append(costs) or shortest(costs, edges),
    )
    x, fine = noise(5, 20.0), make_grid("karras", FINE + 1, 20.0, 0.01)
    search_grid([(mixture, x[:2]), (mixture, x[2:])], fine, named(4), afs, get("ddim").on)
    states = [x, *(s.x for s in fewstep.iterate(mixture, x, "deis-3", grid=fine))]
    for i, j in ((0, 1), (0, FINE), (7, 30), (FINE - 1, FINE)):
        begin = afs if i == 0 else "none"
        end = fewstep.solve(mixture, states[i], "ddim", grid=(fine[i], fine[j]), afs=begin)
        wanted = (end - states[j]).square().sum().item()
        assert seen[0][i, j].item() == pytest.approx(wanted, rel=1e-9, abs=1e-18)


def test_the_search_spends_what_it_says(mixture):
    counted = Counted(mixture)
    fine, known = make_grid("karras", FINE + 1, 20.0, 0.01), named(5)
    search_grid([(counted, noise(3, 20.0))], fine, known, "none", get("ddim").on)
    assert counted.calls == FINE + 4 * (len(known) + len(WEIGHTS))


@pytest.mark.parametrize("afs", ["none", "mean"])
@pytest.mark.parametrize("base", ["ddim", "ipndm-3", "dpmpp-2m"])
def test_it_is_the_base_on_a_grid_no_worse_than_any_named(base, afs, mixture):
    solver = train(mixture, SHAPE, **{**SHORT, "base": base, "afs": afs})
    assert solver.nfe == 4
    x = noise(6, 20.0)
    ours = fewstep.solve(mixture, x, solver)
    theirs = fewstep.solve(mixture, x, base, grid=solver.sigmas, afs=afs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)

    x = 20.0 * fewstep.noise.normal(range(2_000_000, 2_000_024), SHAPE, "prior").double()
    exact = fewstep.solve(mixture, x, "exp-adams-4", 200)

    def error(grid):
        return (fewstep.solve(mixture, x, base, grid=grid, afs=afs) - exact).square().mean()

    points = len(solver.sigmas)
    named = [make_grid(name, points, 20.0, 0.01) for name in list(GRIDS)[:3]]
    assert error(solver.sigmas) <= 1.01 * min(map(error, named))  # the teacher is not exact


def test_it_is_better_where_a_grid_matters(mixture):
    found = train(mixture, SHAPE, **{**SHORT, "trajectories": 64, "nfe": 6}).validation
    assert found["error"] < 0.9 * found["error_untrained"]


def test_it_is_the_same_every_time_and_its_folder_is_a_solver(mixture, tmp_path):
    afs = train(mixture, SHAPE, **SHORT, out=tmp_path)
    data = (tmp_path / "solver.json").read_bytes()
    assert train(mixture, SHAPE, **SHORT, out=tmp_path).digest == afs.digest
    assert (tmp_path / "solver.json").read_bytes() == data
    again = LearnedSolver.load(tmp_path)
    assert again.plan() == afs.plan()
    assert again.plan().sigmas == again.sigmas


def test_a_resumed_run_does_not_search_again(mixture, tmp_path, monkeypatch):
    short = {**SHORT, "method": "tuned", "trajectories": 24, "batch": 8, "out": tmp_path}

    def stop(progress: Any) -> None:
        if progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(mixture, SHAPE, **short, report=stop, checkpoint_every=1)
    monkeypatch.setattr("fewstep.learned.training.search_grid", None)  # cannot be called
    found = train(mixture, SHAPE, **short, checkpoint_every=1)
    monkeypatch.undo()
    assert train(mixture, SHAPE, **{**short, "out": None}).digest == found.digest
    with pytest.raises(ValueError, match="is of a run with"):
        train(mixture, SHAPE, **short, lr=0.1)


def test_other_methods_start_from_a_searched_grid(mixture):
    short = {
        "nfe": 4,
        "trajectories": 24,
        "batch": 8,
        "inner": 9,
        "validation_seeds": 8,
        "base": None,
    }
    short["fallback"] = False
    grid = train(mixture, SHAPE, **{**SHORT, **short, "afs": "none"})
    tuned = train(mixture, SHAPE, **short, method="tuned")  # as it does unless told otherwise
    assert tuned.sigmas == grid.sigmas
    assert tuned.training["grid"] == "search"
    assert tuned.validation["error"] <= grid.validation["error"]
    amed = train(mixture, SHAPE, **{**short, "inner": 1}, method="amed", grid="search")
    assert (amed.nfe, len(amed.sigmas)) == (4, 3)


def not_finite(x, sigma):
    return Mixture()(x, sigma) + torch.where(sigma < 1, torch.nan, 0.0)[:, None]


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"base": "heun", "nfe": 5}, ValueError, "cannot spend exactly 5"),
        ({"base": "churn"}, ValueError, "grid starts from a deterministic solver"),
        ({"nfe": 61}, ValueError, "a grid is searched among 60 intervals, got 61"),
        ({"parts": ("times",)}, ValueError, "grid has no option 'parts'; it has: none"),
        ({"denoiser": not_finite}, FloatingPointError, "NaN or infinity between sigma"),
    ],
)
def test_what_cannot_be_searched_is_one_line(changes, error, message, mixture):
    with pytest.raises(error, match=message) as caught:
        train(shape=SHAPE, **{"denoiser": mixture, **SHORT, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_command(tmp_path):
    out = tmp_path / "grid"
    arguments = ("--method", "grid", "--nfe", 3, "--trajectories", 2, "--validation-seeds", 2)
    told = command("train", "solver", "fashion-mnist", "--out", out, *arguments)
    assert "ipndm-2 on a searched grid" in told.stdout
    assert "untrained, on the best named grid" in told.stdout
    values = json.loads((out / "solver.json").read_text())
    assert (values["afs"], values["training"]["grid"]) == ("mean", "search")
    assert values["predictor_sha256"] is None
