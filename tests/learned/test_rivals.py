"""A learned solver is measured against the best training-free one, and says when it lost."""

from __future__ import annotations

from typing import Any

import pytest

from fewstep.grid import make_grid
from fewstep.learned import LearnedSolver, train
from fewstep.learned.rivals import RIVALS, best_rival, unbeaten
from fewstep.schedule import VP
from fewstep.solver import end_at, get
from tests.support.testbed import Mixture

SHORT: dict[str, Any] = {"trajectories": 32, "batch": 16, "validation_seeds": 16, "nfe": 5}


@pytest.fixture
def few_rivals() -> None:
    """All of them here."""


@pytest.mark.parametrize("end", ["sigma_min", "zero"])
def test_the_best_is_the_least_over_solvers_grids_and_first_steps(end: str) -> None:
    schedule, seen = VP.scaled_linear(), []

    def measure(program: Any) -> dict[str, float]:
        seen.append(program)
        return {"error": 1.0, "features": 0.5 if len(seen) == 7 else 2.0}

    best = best_rival(measure, 4, schedule.sigma_max, schedule.sigma_min, end, schedule)
    assert {program.evaluations for program in seen} == {4}
    assert {program.sigmas[0] for program in seen} == {schedule.sigma_max}
    lows = {program.sigmas[-1]: program.prediction for program in seen}
    assert lows[0.0] == ("eps" if end == "zero" else "x0")  # the last of them, eps beside D or not
    assert set(lows) == ({0.0} if end == "zero" else {0.0, schedule.sigma_min})
    points, last = len(seen[6].sigmas), "sigma_min" if seen[6].sigmas[-1] else "zero"
    levels = make_grid(best["grid"], points, schedule.sigma_max, schedule.sigma_min, schedule)
    assert seen[6].sigmas == end_at(levels, last)
    assert get(best["solver"]).on(seen[6].sigmas, best["afs"]).evaluations == 4
    assert best["features"] == 0.5


def test_each_first_step_that_is_known_is_tried() -> None:
    seen = []

    def measure(program: Any) -> dict[str, float]:
        seen.append(next(iter(program.start())).source)
        return {"error": float(seen[-1] != "mean")}

    best = best_rival(measure, 4, 80.0, 0.002, "zero", None, ("none", "zero", "mean"))
    assert set(seen) == {"net", "zero", "mean"}
    assert best["afs"] == "mean"


def test_none_is_best_where_none_is_finite() -> None:
    assert best_rival(lambda program: {"error": float("inf")}, 3, 80.0, 0.002, "zero", None) == {}
    assert unbeaten("amed", {"error": 1.0, "training_free": {}}) is None


@pytest.mark.parametrize("method", ["amed", "amed-plugin", "tuned"])
def test_a_training_says_whether_it_lost_and_keeps_it(method: str, tmp_path: Any) -> None:
    told: list[str] = []
    # at a rate of almost nothing the untrained solver comes out, which others beat
    kept = {"method": method, "lr": 1e-9, "fallback": False, "grid": "karras"}
    solver = train(Mixture(), (3,), **kept, out=tmp_path, note=told.append, **SHORT)
    rival = LearnedSolver.load(tmp_path).validation["training_free"]
    assert rival == solver.validation["training_free"]
    assert rival["solver"] in RIVALS
    lost = solver.validation["error"] >= rival["error"]
    lines = [line for line in told if "did not beat the best training-free" in line]
    assert len(lines) == lost
    assert all(f"{rival['solver']} on {rival['grid']}" in line for line in lines)
    assert lost or method != "amed"


def test_the_line_goes_by_the_features_of_the_loss() -> None:
    rival = {"solver": "deis-2", "grid": "karras", "afs": "zero", "error": 0.1, "features": 3.0}
    won = {"error": 0.2, "features": 2.0, "training_free": rival}
    assert unbeaten("tuned", won) is None
    line = unbeaten("tuned", {**won, "features": 3.5})
    assert line is not None
    assert "deis-2 on karras with afs=zero has features 3, this has 3.5" in line


@pytest.mark.parametrize("method", ["amed", "amed-plugin", "tuned"])
@pytest.mark.parametrize("nfe", [3, 5])
def test_no_solver_ends_above_the_best_training_free_one(
    method: str, nfe: int, tmp_path: Any
) -> None:
    told: list[str] = []
    how = {**SHORT, "method": method, "nfe": nfe, "note": told.append}
    solver = train(Mixture(), (3,), **how, out=tmp_path, lr=1e-9, afs="zero")
    rival = solver.validation["training_free"]
    assert solver.validation["error"] <= rival["error"]
    if solver.method.kind == "grid":  # it fell back, says so, and keeps what was trained in words
        assert any("the result is that solver" in line for line in told)
        assert solver.training["method"] == method
        assert solver.validation["trained"]["error"] >= rival["error"]
        plan = get(rival["solver"]).plan(tuple(rival["sigmas"]), rival["afs"], grid="searched")
        assert solver.plan().ops == plan.ops
        again = train(Mixture(), (3,), **how, out=tmp_path, lr=1e-9, afs="zero")
        assert again.digest == solver.digest == LearnedSolver.load(tmp_path).digest
    assert solver.nfe == nfe
