"""The study of distillation on a tiny network, its table, and how a student is shipped."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fewstep
from fewstep import models
from fewstep.distillation import Recipe, distill
from fewstep.models.formats.native import save_folder
from fewstep.report.tables import seeds_table
from recipes.ship_student import ship
from studies import distill_lines, distill_study, distill_teachers, make_results
from tests.distillation.test_distill import TINY, pictures, tiny_model, write_idx

QUICK: dict[str, Any] = {"batch": 8, "warmup": 0, "points": 5, "dtype": "float32"}
TOLD = [f"{name}={value}" for name, value in QUICK.items()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model among built-in ones, and data."""
    folder, model, (images, labels) = (
        tmp_path_factory.mktemp("study"), tiny_model(), pictures(),
    )  # fmt: skip
    save_folder(folder / "builtin" / "tiny", model.card, model.net, model.stats)
    (folder / "data").mkdir()
    write_idx(folder / "data" / "train-images-idx3-ubyte", images[:, 0].numpy())
    write_idx(folder / "data" / "train-labels-idx1-ubyte", labels.numpy().astype(np.uint8))
    return folder


def study(place: Path, *more: str) -> None:
    quick = "--seeds 0-3 --screen 2 --population 10 --reference-nfe 10 --features none --no-plots"
    paths = {"--model": "builtin/tiny", "--data": "data", "--out": "study"}
    arguments = [word for name, path in paths.items() for word in (name, str(place / path))]
    arguments += ["--pictures", "32", "--training-seeds", "2", "--validation-seeds", "2"]
    arguments += ["--set", *TOLD]
    arguments += ["--solvers", "ddim", "--compare", quick]
    distill_study.main([*arguments, *more])


@pytest.fixture(scope="module")
def done(place: Path) -> Path:
    """The whole study: two methods, two rates, two seeds, one ablation; a search that fails."""
    with pytest.MonkeyPatch.context() as patch:
        methods = {name: distill_study.METHODS[name] for name in ("splam", "lcm")}
        patch.setattr(distill_study, "METHODS", methods)
        patch.setenv("FEWSTEP_CACHE", str(place / "cache"))
        patch.setattr(distill_study, "RATES", (1e-4, 1e-2))
        patch.setattr(distill_study, "FARTHER", 1)
        ablations = {"gamma-one-never": distill_study.ABLATIONS["gamma-one-never"]}
        patch.setattr(distill_study, "ABLATIONS", ablations)
        patch.setattr(distill_study, "BUDGETS", "1,2")
        failed = place / "study" / "runs" / "lcm-lr0.01"
        failed.mkdir(parents=True)
        recipe = asdict(Recipe(**QUICK, method="lcm", pictures=8, lr=1e-2))
        reason = json.dumps({"reason": "the loss is nan", "recipe": recipe})
        (failed / distill_study.FAILED).write_text(reason)
        study(place, "--only", "search")
        assert not (place / "study" / "runs" / "lcm-0").exists()
        study(place)
    return place / "study"


@pytest.mark.slow
def test_each_method_trains_at_the_rate_that_its_search_found(done: Path) -> None:
    def scores(pattern: str) -> dict[float, float]:
        """By learning rate."""
        scores = {}
        for log in (done / "runs").glob(f"{pattern}/log.jsonl"):
            last = json.loads(log.read_text().splitlines()[-1])
            found = [
                last["rmse_1"],
                min(last["rmse_2"], last["rmse_ode_2"]),
                min(last["rmse_4"], last["rmse_ode_4"]),
            ]
            scores[models.read_card(log.parent).about["recipe"]["lr"]] = math.prod(found)
        return scores

    for method in ("splam", "lcm"):
        search, finals = scores(f"{method}-lr*"), scores(f"whole-lr*/{method}-0")
        assert set(finals) == set(sorted(search, key=search.__getitem__)[:2])
        rate = min(finals, key=finals.__getitem__)
        for seed in (0, 1):
            made = models.read_card(done / "runs" / f"whole-lr{rate:g}" / f"{method}-{seed}")
            recipe = made.about["recipe"]
            assert (recipe["lr"], recipe["seed"], recipe["pictures"]) == (rate, seed, 32)
            assert made.name == f"{method}-{seed}"
        if method == "lcm":  # failed at 0.01, so the other is at an end
            assert sorted(search) == [3.33e-5, 1e-4]
        else:
            assert sorted(search) in ([3.33e-5, 1e-4, 1e-2], [1e-4, 1e-2, 3e-2])
    quarter = models.read_card(done / "runs" / "gamma-one-never").about["recipe"]
    assert (quarter["pictures"], quarter["gamma_one"]) == (8, 0.0)


@pytest.mark.slow
def test_what_is_done_is_not_done_again(done: Path, place: Path, capsys: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done / "runs").rglob("*.safetensors")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill_study, "METHODS", {"lcm": distill_study.METHODS["lcm"]})
        patch.setattr(distill_study, "RATES", (1e-4, 1e-2))
        patch.setattr(distill_study, "FARTHER", 1)
        patch.setattr(distill_study, "ABLATIONS", {})
        study(place, "--only", "search,train")
        words = r"lcm-lr0.0001 is of another study \(target_decay=0.95, now 0.5\); give another"
        with pytest.raises(ValueError, match=words):
            study(place, "--set", *TOLD, "target_decay=0.5")
        patch.setattr(distill_study, "RATES", (1e-4, 5e-4))
        study(place, "--status")
    text = capsys.readouterr().out
    assert "0 pictures left to train on in what is chosen" in text
    assert "lr by the search" in text
    assert "the loss is nan" in text
    left = 8 + 32 + 32 + 32  # a search, two finals that wait for it, and another seed
    assert f"\n{left} pictures left to train on\n" in text
    assert before == {p: p.stat().st_mtime_ns for p in (done / "runs").rglob("*.safetensors")}


def names_of(record: dict[str, Any]) -> set[str]:
    return {Path(row["sampler"]).name for row in record["rows"]}


@pytest.mark.slow
def test_its_comparisons_are_what_the_results_are_made_of(done: Path) -> None:
    record = json.loads((done / "students" / "comparison.json").read_text())
    assert names_of(record) == {"ddim", "splam-0", "splam-1", "lcm-0", "lcm-1"}
    assert {row["nfe"] for row in record["rows"]} == {1, 2}
    ablations = json.loads((done / "ablations" / "comparison.json").read_text())
    usual = {name for name in names_of(ablations) if name != "gamma-one-never"}
    assert {name.partition("-lr")[0] for name in usual} == {"splam", "lcm"}
    assert names_of(ablations) == {*usual, "gamma-one-never"}
    for row in record["rows"]:
        row["fd"] = {"j": {"excess": row["error"], "excess_se": 0.0}}
    record["floor"] = {"j": {"fd": 1.0}}
    page = make_results.results_page({"students": record})
    assert "### Over training seeds" in page
    assert "splam less lcm, by seed" in page


def test_a_teacher_in_small_steps_ends_near_the_fine_solution(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(place / "cache"))
        model = ["--model", str(place / "builtin" / "tiny"), "--dtype", "float32", "--seeds", "4"]
        distill_teachers.main(["ddim:5:1", "unipc-2:30:2", *model])
    rough, fine = capsys.readouterr().out.splitlines()
    assert rough.startswith("ddim:5:1: 4 evaluations  error 0.")
    assert fine.startswith("unipc-2:30:2: 58 evaluations  error 0.")
    assert float(fine.split()[-1]) < 0.1 * float(rough.split()[-1])


@pytest.mark.parametrize("text", ["lr=1", "tell=gamma", "loss=l2", "batch"])
def test_what_the_study_sets_itself_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be NAME=VALUE, NAME one of points,"):
        distill_study.setting(text)


@pytest.mark.parametrize(
    "given, message",
    [
        (["--set", "batch=0"], "batch must be positive, got 0"),
        (["--set", "end_to_end=true"], "end_to_end is of method trajectory"),
        (["--set", "compile=true"], "compile does not go with method trajectory; leave it out"),
        (["--set", "batch=many"], "batch must be int, got 'many'"),
        (["--set", "batch=[1]"], "batch must be int, got '[1]'"),
        (["--set", "warmup=true"], "warmup must be float, got 'true'"),
        (["--set", "substeps=1.5"], "substeps must be int | None, got '1.5'"),
        (["--set", "guidance=a"], "guidance must be float | tuple[float, float] | None"),
        (["--pictures", "0"], "must be a whole number, at least 1, got '0'"),
        (["--training-seeds", "0"], "must be a whole number, at least 1, got '0'"),
        (["--validation-seeds", "few"], "must be a whole number, at least 1, got 'few'"),
    ],
)
def test_settings_that_no_run_can_have_are_refused(given, message, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        distill_study.main(["--data", "nowhere", "--out", "nowhere", *given])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "text, value",
    [("batch=64", 64), ("guidance=[1, 2]", [1, 2]), ("teacher=ddim", "ddim"), ("warmup=0", 0)],
)
def test_a_setting_is_what_json_has(text, value) -> None:
    assert distill_study.setting(text) == (text.partition("=")[0], value)


def test_the_table_over_training_seeds_by_hand() -> None:
    def row(sampler: str, nfe: int, excess: float, seed: int | None = None) -> dict[str, Any]:
        how: dict[str, Any] = {} if seed is None else {"student": {"recipe": {"seed": seed}}}
        how["stochastic"] = "splam" in sampler
        fd = {"a": {"excess": excess}, "b": {"excess": 10 * excess}}
        grid = None if "tuned" in sampler else "karras"
        return {"sampler": sampler, "nfe": nfe, "grid": grid, "error": 9 - excess, "fd": fd, **how}

    rows = [row(f"runs/lcm-{i}", 2, x, i) for i, x in enumerate((1.0, 2.0, 6.0))]
    rows += [row(f"runs/splam-{i}", 2, x, i) for i, x in enumerate((0.5, 1.0, 5.5))]
    rows += [row("runs/tuned-s0", 4, 1.0), row("runs/tuned-s1", 4, 2.0), row("tuned", 4, 0.0)]
    rows += [row("ddim", 2, 9.0), row("heun", 2, 8.0), row("heun", 4, 7.0), row("heun", 9, 1.0)]
    text = seeds_table({"rows": rows, "floor": {"a": {}, "b": {}}})
    first, second, third = text.split("\n\n")
    assert first.splitlines() == [
        "| excess FD-a | 2 NFE | 4 NFE |",
        "|---|---|---|",
        "| lcm | 3.000 ± 1.528 (3) | - |",
        "| splam | 2.333 ± 1.590 (3) | - |",
        "| tuned | - | 1.500 ± 0.500 (2) |",
        "| splam less lcm, by seed | -0.667 ± 0.167 (3) | - |",
        "| best training-free solver | 8.000 (heun) | 7.000 (heun) |",
    ]
    assert "| lcm | 30.000 ± 15.275 (3) | - |" in second
    assert third.splitlines()[0] == "| error | 2 NFE | 4 NFE |"
    assert "| best training-free solver | 0.000 (ddim) | 2.000 (heun) |" in third
    assert seeds_table({"rows": rows[-3:], "floor": {}}) == ""


def test_the_expectations_by_hand() -> None:
    def row(sampler: str, nfe: int, excess: float, seed: int | None = None) -> dict[str, Any]:
        how = {} if seed is None else {"student": {"recipe": {"seed": seed}}}
        row = {"sampler": sampler, "nfe": nfe, "grid": "karras", "fd": {"a": {"excess": excess}}}
        return row | how

    rows = [row("ddim", 1, 9.0), row("runs/tuned-s0", 1, 4.0), row("ddim", 2, 0.5)]
    rows += [row(f"runs/splam-{i}", nfe, nfe + i, i) for nfe in (1, 2, 4) for i in range(3)]
    rows += [row("runs/lcm-0", 2, 3.0, 0), row("runs/lcm-2", 2, 7.0, 2), row("lcm-1", 4, 8.0, 1)]
    assert distill_study.expectations({"rows": rows, "floor": {"a": {}}}) == [
        "pass  splam at 1 is below tuned-s0, FD-a: 2.00 ± 0.58 (3) against 4.00",
        "FAIL  splam at 2 is below ddim, FD-a: 3.00 ± 0.58 (3) against 0.50",
        "open  splam less lcm at 2, by seed, FD-a: -2.00 ± 1.00 (2) against 0.00",
        "pass  splam less lcm at 4, by seed, FD-a: -3.00 (1) against 0.00",
    ]


def test_a_student_ships_with_its_figures_under_a_name(place: Path) -> None:
    into, folder, comparison = place / "builtin", place / "student", place / "comparison.json"
    teacher = fewstep.load(into / "tiny")
    made = distill(teacher, pictures(), out=folder, validation_seeds=1, **{**TINY, "pictures": 8})
    shipped = json.loads((Path(__file__).parents[2] / "results" / "fashion-mnist.json").read_text())
    whole = next(row for row in shipped["rows"] if row["grid"] is not None)  # of no learned solver
    whole = {**whole, "fd_data": {}, "source": 1}
    whole.pop("student", None)
    whole["fd"] = {"j": next(iter(whole["fd"].values()))}
    rows = [
        {**whole, "nfe": nfe, "solver": solver, "error": nfe / 8,
         "fd": {"j": {**whole["fd"]["j"], "excess": nfe / 4}},
         "student": {"weights": made.card.weights_sha256}}
        for nfe, solver in ((1, "consistency"), (2, "ddim"))
    ]  # fmt: skip
    source = {**shipped["sources"][0], "command": "study"}
    record = {**shipped, "seeds": "0-9", "sources": [source, source], "floor": {"j": {"fd": 0.0}}}
    comparison.write_text(json.dumps({**record, "rows": rows}))
    ship(folder, "tiny-splam", comparison, into)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "BUILTIN", into)
        assert models.builtin() == ["tiny", "tiny-splam"]
        student: Any = fewstep.load("tiny-splam")
    card = student.card
    assert (card.name, card.weights_sha256) == ("tiny-splam", made.card.weights_sha256)
    assert (card.distilled.teacher, card.distilled.method) == ("tiny", "splam")
    assert card.about["data"]["pictures"] == 40
    assert card.about["validation"]["step"] == 1
    test = {"seeds": "0-9", "command": "study"}
    test |= {str(nfe): {"error": nfe / 8, "excess FD-j": nfe / 4} for nfe in (1, 2)}
    assert card.about["test"] == test
    samplers = [entry.solver for entry in card.auto.values()]
    assert samplers == ["consistency", *["consistency-ode"] * 3]
    ours, theirs = (
        fewstep.sample(one, solver="consistency-ode", nfe=2, seeds=[5]).images
        for one in (student, made)
    )
    assert np.array_equal(ours, theirs)

    comparison.write_text(json.dumps({**record, "rows": [whole]}))
    for other, figures, words in (
        (into / "tiny", None, "is no student of fewstep distill"),
        (folder, comparison, "the comparison has no rows of the student"),
    ):
        with pytest.raises(ValueError, match=words):
            ship(other, "other", figures, into)
    with pytest.raises(ValueError, match="was distilled from a model that does not ship"):
        ship(folder, "other", None, models.BUILTIN)
    assert not (into / "other").exists()


def test_targets_on_the_line_are_as_right_as_its_end_by_the_linear_rule(place: Path) -> None:
    model = ["--model", str(place / "builtin" / "tiny"), "--dtype", "float32", "--seeds", "4"]
    found = distill_lines.main([*model, "--points", "5", "--teacher", "ddim", "--substeps", "1"])
    assert found.shape == (4, 3)
    end, variance, linear = found[:-1].mean(0)  # the last interval ends where nothing is solved
    assert linear < 1.2 * end
    assert variance > 2 * linear
