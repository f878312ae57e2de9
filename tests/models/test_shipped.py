"""Learned solvers by budget in one folder, those that come with a model, and what leaves fewstep as
plain numbers."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.evaluate.compare import Design, Workbench, compare
from fewstep.evaluate.demo import run_demo
from fewstep.evaluate.features import own_features, resolve_features
from fewstep.evaluate.references import References
from fewstep.learned import LearnedSolver
from fewstep.learned.tuned import Tuned
from fewstep.models import BUILTIN, builtin
from fewstep.plan import Plan, levels
from fewstep.reference import ReferenceSolve
from fewstep.report.demo import write_demo
from fewstep.sampling.choose import choose, plan_for
from fewstep.sampling.settings import Settings
from studies import ship_solvers
from tests.learned.test_training import Tapped, short, solver
from tests.support.command import command
from tests.support.testbed import Mixture, noise

SIGMAS = {3: (80.0, 9.0, 1.0, 0.002), 4: (80.0, 15.0, 4.0, 0.7, 0.002)}


def tuned(nfe: int, weights: str) -> LearnedSolver:
    """A table of `nfe` evaluations with something learned in it."""
    table = Tuned.start("ipndm-2", SIGMAS[nfe], "none")
    for value in table.learned.values():
        value += 0.01
    return LearnedSolver(table, {"name": "fashion-mnist", "weights": weights})


@pytest.fixture
def folder(tmp_path) -> Path:
    """The built-in model with learned solvers for 3 and 4, of which its card names the first."""
    here = tmp_path / "with-solvers"
    here.mkdir()
    for name in ("card.json", "model.safetensors"):
        shutil.copy(BUILTIN / "fashion-mnist" / name, here)
    card = json.loads((here / "card.json").read_text())
    for entry in card["auto"].values():  # of what comes with the built-in model
        entry.pop("learned", None)
    for nfe in SIGMAS:
        tuned(nfe, card["weights_sha256"]).save(here / "solvers" / "tuned" / str(nfe))
    card["auto"]["3"]["learned"] = "tuned"
    (here / "card.json").write_text(json.dumps(card))
    return here


def run(*arguments: Any) -> str:
    result = command(*arguments)
    if result.exit_code:
        raise ValueError(result.stderr.strip())
    return result.stdout


def test_auto_is_the_learned_solver_at_its_budget(folder):
    model = fewstep.load(folder)
    found = choose(model, Settings("auto", 3))
    shipped = LearnedSolver.load(folder / "solvers" / "tuned" / "3")
    assert (found.nfe, found.grid, found.solver.name) == (3, None, shipped.program().name)
    for nfe in (2, 4, 9):
        assert isinstance(choose(model, Settings("auto", nfe)).solver, str)
    made = fewstep.sample(model, nfe=3, seeds=[1_000_000])
    ours = fewstep.sample(model, solver=shipped, seeds=[1_000_000])
    assert (made.images == ours.images).all()
    assert made.provenance["solver"] == f"tuned from ipndm-2 {shipped.digest}"


@pytest.mark.parametrize(
    "named",
    [
        {"grid": "karras"},
        {"grid": (80.0, 5.0, 1.0, 0.01)},
        {"afs": "none"},
        {"end": "zero"},
        {"final": True},
        {"head_start": 20.0},
    ],
)
def test_what_the_caller_names_is_kept(named, folder):
    found = choose(fewstep.load(folder), Settings("auto", 3, **named))
    assert isinstance(found.solver, str)
    known = {name: value for name, value in named.items() if name != "head_start"}
    assert {name: getattr(found, name) for name in known} == known


def test_a_name_stands_for_the_solver_that_comes_with_the_model(folder, tmp_path):
    model = fewstep.load(folder)
    for nfe in (3, 4):
        found = choose(model, Settings("tuned", nfe))
        shipped = LearnedSolver.load(folder / "solvers" / "tuned" / str(nfe))
        assert (found.nfe, found.solver.name) == (nfe, shipped.program().name)
        assert shipped.sigmas == SIGMAS[nfe]
        assert plan_for(Settings("tuned", nfe), model).sigmas[0] == 80.0
    with pytest.raises(ValueError, match=re.escape("has solvers for nfe=3, 4, got nfe=5")):
        choose(model, Settings("tuned"))
    out = tmp_path / "pictures"
    told = run("sample", folder, "--solver", "tuned", "--nfe", 4, "--seeds", 0, "--out", out)
    assert "tuned from ipndm-2" in told
    assert "4 evaluations" in told
    shutil.rmtree(folder / "solvers")
    bare = fewstep.load(folder)
    with pytest.raises(ValueError, match="no solver called 'tuned'"):
        choose(bare, Settings("tuned", 3))


def test_a_folder_of_budgets_is_a_solver(folder):
    family, x = folder / "solvers" / "tuned", noise(2, 80.0)
    mixture = Mixture()
    for nfe in (3, 4):
        ours = fewstep.solve(mixture, x, str(family), nfe)
        assert torch.equal(ours, fewstep.solve(mixture, x, str(family / str(nfe))))
    with pytest.raises(ValueError, match=re.escape("has solvers for nfe=3, 4, got nfe=7")):
        fewstep.solve(mixture, x, str(family), 7)


def test_compare_takes_them_by_their_names(folder, tmp_path):
    model = fewstep.load(folder)
    references = References(model, ReferenceSolve(nfe=8), folder=tmp_path / "cache")
    design = Design(("auto", "tuned", "ddim"), (3, 5), (0, 1), screen=0, population=4)
    record = compare(Workbench(model, references, tmp_path / "out"), design, []).record
    rows = {(row["sampler"], row["nfe"]): row for row in record["rows"]}
    assert rows["auto", 3]["error"] == rows["tuned", 3]["error"] != rows["ddim", 3]["error"]
    assert rows["tuned", 3]["solver"].startswith("tuned from ipndm-2 ")
    assert ("auto", 5) in rows
    assert "got nfe=5" in record["left_out"]["tuned@5"]
    with pytest.raises(ValueError, match="no solver called 'tunned'"):
        compare(Workbench(model, references, tmp_path / "out"), Design(("tunned",), (3,), (0,)), [])


@pytest.fixture
def quick(monkeypatch):
    """A demo whose exact solution is rough."""
    for name in ("EXACT", "CHECK"):
        monkeypatch.setattr(f"fewstep.evaluate.demo.{name}", ReferenceSolve("deis-3", 9))
    monkeypatch.setattr("fewstep.evaluate.demo.ROUNDS", 1)


@pytest.mark.usefixtures("quick")
def test_the_demo_shows_them(folder, tmp_path):
    told = run_demo(str(folder), nfe=3, seeds=[0], solvers=("auto", "ddim"))
    row = next(row for row in told.rows if row.solver == "auto")
    assert row.about.startswith("tuned from ipndm-2")
    assert row.errors is not None
    page = write_demo(told, tmp_path).files[1].read_text()
    # a long name leaves room for the pictures
    assert re.search(r'<span class="about">tuned, error 0\.\d+', page)


def test_a_damaged_one_is_one_line(folder):
    path = folder / "solvers" / "tuned" / "3" / "solver.json"
    data = path.read_text()
    for broken in (data[: len(data) // 2], data.replace("fewstep-solver/1", "fewstep-solver/9")):
        path.write_text(broken)
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            run("sample", folder, "--nfe", 3, "--seeds", 0, "--out", folder / "pictures")
        assert "\n" not in str(caught.value)
        assert not (folder / "pictures").exists()
    shutil.rmtree(path.parent)
    with pytest.raises(ValueError, match=r"3 is not a learned solver"):
        fewstep.sample(fewstep.load(folder), nfe=3, seeds=[0])
    assert fewstep.sample(fewstep.load(folder), nfe=3, afs="mean", seeds=[0]).nfe == 3


def test_shipping_takes_the_best_of_each_budget(folder, tmp_path):
    shutil.rmtree(folder / "solvers")
    weights = fewstep.models.read_card(folder).weights_sha256

    def trained(
        path: str, nfe: int, error: float, label: str | None = None, until: int = 1_000_064
    ) -> None:
        found = tuned(nfe, weights)
        figures = {"error": error, "error_untrained": 0.1, "seeds": [1_000_000, until]}
        made = replace(found, validation=figures, training={"loss": "pixels"})
        replace(made, model={**made.model, "label": label}).save(tmp_path / "runs" / path)

    trained("a/3", 3, 0.08)
    trained("b/3", 3, 0.07)
    trained("labelled/3", 3, 0.01, label="boot")
    trained("a/4", 4, 0.12)  # worse than its start
    before = (folder / "card.json").read_text()
    chosen = ship_solvers.main(tmp_path / "runs", str(folder))
    assert (folder / "card.json").read_text() == before
    assert not (folder / "solvers").exists()
    assert {nfe: one.validation["error"] for nfe, one in chosen.items()} == {3: 0.07}
    ship_solvers.main(tmp_path / "runs", str(folder), write=True)
    assert [path.name for path in (folder / "solvers" / "tuned" / "3").iterdir()] == ["solver.json"]
    found = choose(fewstep.load(folder), Settings("auto", 3)).solver
    shipped = LearnedSolver.load(folder / "solvers" / "tuned" / "3")
    assert (found.name, shipped.validation["error"]) == (shipped.program().name, 0.07)
    with pytest.raises(ValueError, match="no solver of method amed"):
        ship_solvers.main(tmp_path / "runs", str(folder), method="amed")
    trained("c/3", 3, 0.05, until=1_000_256)
    with pytest.raises(ValueError, match="different validation seeds"):
        ship_solvers.main(tmp_path / "runs", str(folder))


def test_what_the_built_in_models_name_is_there():
    for name in builtin():
        model = fewstep.load(name)
        for nfe in map(int, model.card.auto):
            chosen = choose(model, Settings("auto", nfe))
            assert chosen.nfe == nfe
            if isinstance(chosen.solver, LearnedSolver):
                assert chosen.solver.model["weights"] == model.card.weights_sha256


# -- plain numbers ----------------------------------------------------------------------------


def test_plan_prints_a_learned_solver(folder, tmp_path):
    family = folder / "solvers" / "tuned"
    text = run("plan", family / "3", "--json")
    assert Plan.from_json(text) == LearnedSolver.load(family / "3").plan()
    assert run("plan", family, "--nfe", 3, "--json") == text
    assert run("plan", "auto", "--nfe", 3, "--model", folder, "--json") == text
    assert "told" in run("plan", family / "3")
    sigmas = run("plan", family / "3", "--sigmas").strip()
    assert json.loads(run("plan", family / "3", "--sigmas", "--json")) == [
        float(part) for part in sigmas.split(",")
    ]
    assert len(sigmas.split(",")) == 4
    run("sample", "--grid", sigmas, "--solver", "ddim", "--seeds", 0, "--out", tmp_path / "a")
    (tmp_path / "plan.json").write_text(text)
    run("sample", "--plan", tmp_path / "plan.json", "--seeds", 0, "--out", tmp_path / "b")
    for extra in (("--grid", "karras"), ("--afs", "mean"), ("--sigma-min", 0.1)):
        name = extra[0].removeprefix("--").replace("-", "_")
        with pytest.raises(ValueError, match=f"has its own grid, .*: leave out {name}$"):
            run("plan", family / "3", *extra)
    with pytest.raises(ValueError, match="was trained for nfe=3, got nfe=4"):
        run("plan", family / "3", "--nfe", 4)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpm-solver-2", "unipc-2"])
def test_levels_are_where_it_evaluates(name):
    plan = plan_for(Settings(name, 4))
    found = levels(plan.ops)
    assert found[-1] == plan.sigmas[-1]
    assert set(plan.sigmas) <= set(found)
    assert all(cur > nxt for cur, nxt in pairwise(found))


@pytest.mark.parametrize("base", [None, "dpm-solver-2", "ipndm-3", "dpmpp-2m"])
def test_a_solver_that_reads_features_has_a_plan_of_means(base):
    method = solver(base, "zero")
    learned, x = LearnedSolver(method), noise(64, 20.0)
    with pytest.raises(ValueError, match=r"name the model for their means \(--model\)"):
        learned.plan()
    one = noise(1, 20.0)  # of one sample the means are itself
    plan = learned.plan(Tapped(), one)
    ours, theirs = (fewstep.solve(Tapped(), one, s) for s in (learned, plan))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    plan = learned.plan(Tapped(), x)
    assert fewstep.nfe(plan) == learned.nfe
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.slow
def test_the_command_takes_the_means_of_the_models_samples(tmp_path):
    model = fewstep.load("fashion-mnist")
    learned = fewstep.learned.train(
        model.denoiser(),
        model.shape,
        method="amed",
        nfe=2,
        grid="karras",
        trajectories=2,
        batch=2,
        validation_seeds=1,
        fallback=False,
    )
    learned.save(tmp_path)
    with pytest.raises(ValueError, match="reads the network's features"):
        run("plan", tmp_path)
    plan = Plan.from_json(run("plan", tmp_path, "--model", "fashion-mnist", "--json"))
    assert fewstep.nfe(plan) == 2


# -- bad input, from the command line ---------------------------------------------------------


def test_a_solver_file_that_cannot_be_read_is_one_line(tmp_path):
    short(tmp_path, features=False)
    path = tmp_path / "solver.json"
    whole = json.loads(path.read_text())
    cases = {
        "is not a learned solver of fewstep.* was cut short": path.read_text()[:40],
        "update fewstep": json.dumps({**whole, "format": "fewstep-solver/2"}),
        "it lacks settings": json.dumps({k: v for k, v in whole.items() if k != "settings"}),
    }
    for message, text in cases.items():
        path.write_text(text)
        for line in (["sample", "--out", tmp_path / "x"], ["compare", "--out", tmp_path / "x"]):
            option = "--solver" if line[0] == "sample" else "--solvers"
            with pytest.raises(ValueError, match=message) as caught:
                run(*line, option, tmp_path)
            assert "\n" not in str(caught.value)
            assert not (tmp_path / "x").exists()
        with pytest.raises(ValueError, match=message):
            run("plan", tmp_path)


def test_the_population_that_ships_is_the_one_that_a_comparison_looks_for(tmp_path, monkeypatch):
    """Without a solve. How it was made stands in its name, as a hash."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the population was solved again")

    monkeypatch.setattr(References, "chunks", refuse)
    model = fewstep.load("fashion-mnist")
    design = Design(("ddim",), (3,), (0, 1))
    for name in own_features("fashion-mnist"):
        judge = resolve_features(name)
        found = Workbench(model, References(model), tmp_path).population(judge, design)
        assert (found.count, found.extractor, found.dim) == (10_000, judge.name, 128)
        # another draw of the network's own pictures is near those it was trained on
        assert judge.data is not None
        assert 0.3 < found.frechet(judge.data) < 10


def test_a_learned_grid_does_not_start_elsewhere():
    model = fewstep.load("fashion-mnist")
    with pytest.raises(ValueError, match="has its own grid, which starts at sigma 80, and sampl"):
        fewstep.sample(model, solver="tuned", nfe=3, seeds=[0], head_start=10.0)


def test_a_learned_solver_is_not_recorded_with_another_ones_ends():
    model = fewstep.load("fashion-mnist")
    record = choose(model, Settings("tuned", 3)).record()
    assert (record["grid"], record["afs"], record["end"]) == (None, None, None)
    assert choose(model, Settings("ddim", 3)).record()["end"] is not None
