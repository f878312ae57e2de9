"""A comparison's numbers against plain numpy, what it costs, and what its report says."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
import shutil
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from rich.console import Console

import fewstep
from fewstep.evaluate import references as references_module
from fewstep.evaluate.compare import (
    Comparison,
    Design,
    Workbench,
    compare,
    merge,
    read_comparison,
    rows,
    screening,
)
from fewstep.evaluate.compare import bench as bench_module
from fewstep.evaluate.compare import run as module
from fewstep.evaluate.memo import Memo, Remembering
from fewstep.evaluate.references import References
from fewstep.evaluate.statistics import Statistics
from fewstep.learned import LearnedSolver
from fewstep.learned.amed import AMED
from fewstep.learned.method import Setup
from fewstep.learned.tuned import Tuned
from fewstep.models import Card
from fewstep.models.labels import by_seed, drawn_label
from fewstep.reference import ReferenceSolve
from fewstep.report.comparison import comparison_page, with_error, write_comparison
from fewstep.report.tables import comparison_csv
from fewstep.report.terminal import comparison_table
from fewstep.sampling.choose import choose
from fewstep.sampling.settings import Filled, Settings
from fewstep.solving import solve

# The test bed: every pixel a mixture of two points with some spread, so that D bends; 8x8 pictures.
SHAPE = (1, 8, 8)
LOW, HIGH = 0.02, 20.0
SPREAD = 0.15
LEVELS = np.linspace(-0.8, 0.1, 64).reshape(SHAPE)  # darker point of each pixel
APART = 0.6
SEEDS = tuple(range(20))


def denoised(x: np.ndarray, sigma: float) -> np.ndarray:
    """E[x_0 | x] where each pixel is at LEVELS or APART above it, half and half."""
    total = SPREAD**2 + sigma**2
    share = 1 / (1 + np.exp(-APART * (x - LEVELS - APART / 2) / total))
    middle = LEVELS + APART * share
    return middle + SPREAD**2 / total * (x - middle)


def start(seeds: Sequence[int]) -> np.ndarray:
    """What the toy draws: float32, [n, 1, 8, 8]."""
    noise = [np.random.default_rng(seed).standard_normal(SHAPE) for seed in seeds]
    return (HIGH * np.stack(noise)).astype(np.float32)


def pixels(x: np.ndarray) -> np.ndarray:
    """uint8 [n, h, w, c]"""
    return np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def exact(seeds: Sequence[int], points: int = 2000) -> np.ndarray:
    """x at LOW by Heun's method in log sigma; its own error is below 1e-5."""
    x = start(seeds).astype(float)
    levels = np.geomspace(HIGH, LOW, points)
    for cur, nxt in pairwise(levels):
        h = math.log(nxt / cur)
        slope = x - denoised(x, cur)
        ahead = x + h * slope
        x = x + h * (slope + ahead - denoised(ahead, nxt)) / 2
    return x


def grid(name: str, points: int, to_zero: bool = False) -> np.ndarray:
    if name == "karras":
        levels = np.linspace(HIGH ** (1 / 7), LOW ** (1 / 7), points) ** 7
    else:
        levels = np.geomspace(HIGH, LOW, points)
    return np.array([*levels[:-1], 0.0]) if to_zero else levels


def ddim(seeds: Sequence[int], nfe: int, name: str = "karras", afs: bool = False, zero=False):
    """x at the end of the grid, float64; first: D of the first evaluation is the data's mean."""
    x = start(seeds).astype(float)
    levels = grid(name, nfe + 1 + afs, zero)
    for i, (cur, nxt) in enumerate(pairwise(levels)):
        d = LEVELS + APART / 2 if afs and i == 0 else denoised(x, cur)
        x = nxt / cur * x + (1 - nxt / cur) * d
    return x


@dataclass
class Toy:
    """The test bed as a model; counts what is asked of it."""

    limit: float = math.inf
    mean: bool = True
    calls: int = 0
    drawn: list[int] = field(default_factory=list)
    card: Card = field(
        default_factory=lambda: Card("toy", sigma_min=LOW, sigma_max=HIGH, weights_sha256="0" * 64)
    )
    shape: tuple[int, ...] = SHAPE
    dtype: torch.dtype = torch.float32

    def denoiser(
        self, label: Any = None, prompt: Any = None, guidance: Any = None, **more: Any
    ) -> Any:
        return Bed(self)

    def prior(self, seeds: Sequence[int], sigma: Any = None, label: Any = None) -> torch.Tensor:
        self.drawn.extend(seeds)
        return torch.from_numpy(start(seeds))

    def decode(self, x: torch.Tensor) -> np.ndarray:
        return pixels(x.double().numpy())


@dataclass
class Bed:
    toy: Toy
    sigma_min: float = LOW
    sigma_max: float = HIGH

    @property
    def far_mean(self) -> torch.Tensor | None:
        return torch.from_numpy(LEVELS + APART / 2)[None] if self.toy.mean else None

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        self.toy.calls += 1
        if self.toy.calls > self.toy.limit:
            raise KeyboardInterrupt
        return torch.from_numpy(denoised(x.double().numpy(), float(sigma[0]))).to(x.dtype)


@dataclass(frozen=True)
class Patches:
    """A feature network: means of the four quarters, and how bright the picture varies."""

    label: str = "patches"
    data: Statistics | None = None

    @property
    def name(self) -> str:
        return f"{self.label} native"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        x = images.reshape(-1, 2, 4, 2, 4) / 255
        return np.concatenate([x.mean((2, 4)).reshape(-1, 4), x.std((1, 2, 3, 4))[:, None]], 1)


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """As in the textbooks, with scipy's matrix root."""
    (a, s), (b, t) = ((v.mean(0), np.cov(v.T)) for v in (x.astype(float), y.astype(float)))
    root = np.real(np.asarray(scipy.linalg.sqrtm(s @ t)))
    return float(((a - b) ** 2).sum() + np.trace(s + t - 2 * root))


def bench(folder: Path, toy: Toy | None = None) -> Workbench:
    toy = toy or Toy()
    return Workbench(toy, References(toy, ReferenceSolve(nfe=60), folder=folder / "cache"), folder)


def design(**changes: Any) -> Design:
    values: dict[str, Any] = {"solvers": ("ddim",), "budgets": (4,), "seeds": SEEDS, "screen": 0}
    return Design(**{**values, "population": 60, "resamples": 20, **changes})


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    rows = [{**row, "seconds": 0} for row in record["rows"]]
    return {**record, "rows": rows}


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for one in (module, bench_module, references_module):
        monkeypatch.setattr(one, "CHUNK", 8)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Three samplers, one of which cannot spend one of the budgets."""
    folder = tmp_path_factory.mktemp("result")
    data = Statistics.of(Patches()(pixels(exact(range(500, 540)))), "b native")
    judges = [Patches("a"), Patches("b", data)]
    plan = design(solvers=("ddim", "heun", "dpmpp-2m"), budgets=(3, 4))
    return compare(bench(folder), plan, judges, command="fewstep compare toy")


def comparison_html(*arguments: Any, **options: Any) -> str:
    return comparison_page(*arguments, **options).decode()


# The numbers.


def test_solves_are_kept_by_the_hash_of_the_weights_alone(tmp_path: Path) -> None:
    """Without one nothing is kept, as two networks in memory may have one name."""
    how = ReferenceSolve("ddim", 8)
    for weights, again in (("0" * 64, 0), ("", 8)):
        toy = Toy(card=Card("toy", sigma_min=LOW, sigma_max=HIGH, weights_sha256=weights))
        model: Any = toy
        folder = tmp_path / f"cache{len(weights)}"
        afs = References(model, how, folder=folder).endpoints(range(3))
        before = toy.calls
        second = References(model, how, folder=folder).endpoints(range(3))
        assert np.array_equal(afs, second)
        assert toy.calls - before == (before if again else 0)
        assert folder.exists() == (not again)
    (tmp_path / "file").write_text("in the way")
    model = Toy()
    with pytest.warns(UserWarning, match="nothing is kept in .*file"):
        found = References(model, how, folder=tmp_path / "file").endpoints(range(3))
    assert np.array_equal(found, afs)


def test_labels_go_by_seed(tmp_path: Path) -> None:
    model: Any = fewstep.load("fashion-mnist")
    seeds, how = [5, 6, 7], ReferenceSolve("ddim", 8)
    x, sigma = model.prior(seeds), torch.full((3,), 80.0)
    drawn = [drawn_label(seed, 10) for seed in seeds]
    for label, each in (("boot,bag", [8, 9, 8]), ("all", drawn), ("boot", [9, 9, 9])):
        ours, wanted = by_seed(model, label)(seeds), model.denoiser(each)
        with torch.inference_mode():
            assert torch.equal(ours(x, sigma), wanted(x, sigma))
    references = References(model, how, "all", folder=tmp_path)
    settings = Filled(solver="ddim", nfe=8, grid=how.grid)
    assert Workbench(model, references, tmp_path).run(settings, seeds).mse.max() < 1e-9
    with pytest.raises(ValueError, match="there is no label 'boat'"):
        by_seed(model, "boot,boat")


def test_fresh_noise_is_no_disadvantage_where_a_sampler_is_chosen() -> None:
    """One candidate draws from the law of the population, the other keeps each seed's noise and
    is a little off. Beside the exact solutions of the same seeds the second would win."""
    rng = np.random.default_rng(0)
    exact, anew, many = (rng.standard_normal((n, 8)) for n in (200, 200, 20_000))
    features = {"consistency": anew, "consistency-ode": exact + 0.12, "exact": exact}

    class Bench:
        def run(self, settings: Settings, seeds: Sequence[int]) -> Any:
            return Namespace(images=settings.solver, digest="", mse=np.zeros(len(seeds)))

        def features(self, judge: Any, images: str, digest: str) -> np.ndarray:
            return features[images]

        def exact(self, seeds: Sequence[int]) -> tuple[str, str]:
            return "exact", ""

        def population(self, judge: Any, design: Design) -> Statistics:
            return Statistics.of(many, extractor="f")

    def frechet(one: np.ndarray, other: np.ndarray) -> float:
        return Statistics.of(one, extractor="f").frechet(Statistics.of(other, extractor="f"))

    assert frechet(exact + 0.12, exact) < frechet(anew, exact)
    design = Design(("kid",), (2,), tuple(range(10)), screen=200, choose_by="f")
    candidates = [Filled(name, 2, (9.0, 1.0, 0.0)) for name in ("consistency-ode", "consistency")]
    judges: Any = {"f": Namespace(name="f", label="f")}
    bench: Any = Bench()
    chosen, how = screening.screened(bench, design, judges, candidates)
    assert chosen.solver == "consistency"
    assert how == {"score": pytest.approx(frechet(anew, many)), "of": 2}


def test_errors_are_those_of_plain_numpy(result):
    row = next(r for r in result.record["rows"] if (r["sampler"], r["nfe"]) == ("ddim", 4))
    gap = ddim(SEEDS, 4) - exact(SEEDS)
    each = np.sqrt(np.square(gap).reshape(20, -1).mean(1))
    # the reference solve of 60 evaluations is within 2e-5 of the one here
    assert row["error"] == pytest.approx(each.mean(), abs=5e-5)
    assert row["error_se"] == pytest.approx(each.std(ddof=1) / 20**0.5, rel=5e-3)
    assert row["psnr"] == pytest.approx(10 * np.log10(4 / np.square(gap).mean()), abs=0.01)
    assert row["check"] == {"seeds": "0-19", "error": row["error"]}
    assert result.record["references"]["own_error"] < 5e-5
    assert row["network_calls"] == 4


def test_agreement_is_the_cosine_to_the_samplers_largest_budget(result):
    less, most = (Patches()(pixels(ddim(SEEDS, nfe))).astype(float) for nfe in (3, 4))
    products = (less * most).sum(1)
    lengths = [np.sqrt(np.square(features).sum(1)) for features in (less, most)]
    cosine = (products / (lengths[0] * lengths[1])).mean()
    rows = {(row["sampler"], row["nfe"]): row for row in result.record["rows"]}
    wanted = {"nfe": 4, "cosine": dict.fromkeys("ab", pytest.approx(cosine, abs=1e-4))}
    assert rows["ddim", 3]["agreement"] == wanted
    assert "agreement" not in rows["ddim", 4]
    assert "agreement" not in rows["heun", 4]  # its only budget
    assert f", {cosine:.3f} like 4" in comparison_html(result.record, result.strips)
    table = list(csv.DictReader(io.StringIO(comparison_csv(result.record))))
    known = {(line["sampler"], line["nfe"]): line["a agreement"] for line in table}
    assert float(known["ddim", "3"]) == rows["ddim", 3]["agreement"]["cosine"]["a"]
    assert known["ddim", "4"] == known["heun", "4"] == ""


def test_population_that_comes_with_the_model_is_not_solved_again(tmp_path):
    """Only where it is of just these reference solves; of others it is not looked at."""
    card = replace(Toy().card, folder=tmp_path / "model")

    def measured(name: str, **changes: Any) -> tuple[dict[str, Any], bool]:
        toy = Toy(card=card)
        result = compare(bench(tmp_path / name, toy), design(**changes), [Patches()])
        return timeless(result.record), 100_000 in toy.drawn

    ours, solved = measured("afs")
    assert solved
    shutil.copytree(tmp_path / "afs" / "population", tmp_path / "model" / "population")
    assert measured("second") == (ours, False)
    assert measured("third", population=50)[1]


def test_distances_are_those_of_scipy(result):
    population = Patches()(pixels(exact(range(100_000, 100_060))))
    ours, second = (Patches()(pixels(x)) for x in (ddim(SEEDS, 4), exact(SEEDS)))
    row = next(r for r in result.record["rows"] if (r["sampler"], r["nfe"]) == ("ddim", 4))
    value, floor = frechet(ours, population), frechet(second, population)
    # a pixel on the edge between two grey levels may fall to either side
    found = {judge: row["fd"][judge] for judge in ("a", "b")}
    assert found["a"] == found["b"]  # the same network under two labels
    assert found["b"]["value"] == pytest.approx(value, rel=1e-3)
    assert found["b"]["excess"] == pytest.approx(value - floor, rel=1e-3, abs=1e-5)
    assert found["b"]["se"] > 0
    assert found["b"]["excess_se"] > 0
    assert result.record["floor"]["b"]["fd"] == pytest.approx(floor, rel=1e-3)
    data = Patches()(pixels(exact(range(500, 540))))
    assert row["fd_data"] == {"b": pytest.approx(frechet(ours, data), rel=1e-3)}
    assert result.record["floor"]["b"]["fd_data"] == pytest.approx(frechet(second, data), rel=1e-3)


def test_strips_are_the_first_pictures(result):
    for name, x in (("", exact(SEEDS[:16])), ("ddim@4", ddim(SEEDS[:16], 4))):
        off = np.abs(result.strips[name].astype(int) - pixels(x))
        assert off.max() <= 1
        assert (off > 0).mean() < 0.01


@pytest.mark.parametrize("zero", [False, True])
def test_a_sampler_that_ends_at_zero_is_held_to_the_solution_there(tmp_path, zero):
    """Whatever says so: the name of the end, or sigmas of its own."""
    work = bench(tmp_path)
    levels = tuple(grid("karras", 5, to_zero=zero))
    end = "zero" if zero else "sigma_min"
    named = work.run(Filled("ddim", 4, "karras", end=end), SEEDS[:4])
    own = work.run(Filled("ddim", 4, levels), SEEDS[:4])
    there = exact(SEEDS[:4])
    there = denoised(there, LOW) if zero else there
    want = np.square(ddim(SEEDS[:4], 4, zero=zero) - there).reshape(4, -1).mean(1)
    np.testing.assert_allclose(named.mse, want, rtol=1e-3)
    np.testing.assert_allclose(own.mse, want, rtol=1e-3)


# Budgets and choices.


def test_a_budget_that_a_solver_cannot_spend_is_left_out(result):
    rows = {(row["sampler"], row["nfe"]) for row in result.record["rows"]}
    assert rows == {("ddim", 3), ("ddim", 4), ("dpmpp-2m", 3), ("dpmpp-2m", 4), ("heun", 4)}
    assert result.record["left_out"] == {
        "heun@3": "heun cannot spend exactly 3 evaluations; it can spend 2, 4, 6, 8, ..."
    }


CHOICES = [
    (name, afs, end)
    for name in ("karras", "log-snr")
    for afs in ("none", "mean")
    for end in ("sigma_min", "zero")
]


def by_hand(seeds: Sequence[int], nfe: int) -> dict[tuple[str, str, str], float]:
    """Mean error of DDIM at each setting."""
    there = exact(seeds)
    ends = {"sigma_min": there, "zero": denoised(there, LOW)}
    found = {}
    for name, afs, end in CHOICES:
        gap = ddim(seeds, nfe, name, afs == "mean", end == "zero") - ends[end]
        found[name, afs, end] = float(np.sqrt(np.square(gap).reshape(len(gap), -1).mean(1)).mean())
    return found


def test_screening_takes_the_best_on_the_validation_seeds_and_touches_no_other(
    tmp_path, monkeypatch
):
    runs: list[tuple[Filled, tuple[int, ...]]] = []
    run = Workbench.run

    def spy(self: Workbench, settings: Filled, seeds: Sequence[int]) -> Any:
        runs.append((settings, tuple(seeds)))
        return run(self, settings, seeds)

    monkeypatch.setattr(Workbench, "run", spy)
    plan = design(
        budgets=(3,), screen=30, screen_first=10, grids=("karras", "log-snr"),
        afs=("none", "mean"),
    )  # fmt: skip
    row = compare(bench(tmp_path), plan, []).record["rows"][0]
    validation = tuple(range(1_000_000, 1_000_030))
    few, all_of_them = by_hand(validation[:10], 3), by_hand(validation, 3)
    finalists = sorted(few, key=few.__getitem__)[:2]
    best = min(finalists, key=all_of_them.__getitem__)
    assert (row["grid"], row["afs"], row["end"]) == best
    assert row["screened"] == {"score": pytest.approx(all_of_them[best], abs=5e-5), "of": 8}
    tested = [settings for settings, seeds in runs if set(seeds) & set(SEEDS)]
    assert [(s.grid, s.afs, s.end) for s in tested] == [best]
    assert {seeds for _, seeds in runs} == {validation[:10], validation, SEEDS}


def test_screening_by_a_distance_takes_the_nearest(tmp_path):
    plan = design(
        screen=40, screen_first=40, grids=("karras", "log-snr"), afs=("none", "mean"),
        choose_by="patches",
    )  # fmt: skip
    row = compare(bench(tmp_path), plan, [Patches()]).record["rows"][0]
    seeds = range(1_000_000, 1_000_040)
    target = Patches()(pixels(exact(seeds)))  # of the same seeds
    score = {}
    for name, afs, end in CHOICES:
        x = ddim(seeds, 4, name, afs == "mean", end == "zero")
        score[name, afs, end] = frechet(Patches()(pixels(x)), target)
    assert (row["grid"], row["afs"], row["end"]) == min(score, key=score.__getitem__)
    assert row["screened"]["score"] == pytest.approx(min(score.values()), rel=1e-3)


def test_a_model_without_a_mean_has_no_mean_first(tmp_path):
    plan = design(screen=4, screen_first=4, grids=("karras",), afs=("none", "mean"))
    row = compare(bench(tmp_path, Toy(mean=False)), plan, []).record["rows"][0]
    assert (row["afs"], row["screened"]["of"]) == ("none", 2)


@pytest.mark.parametrize("afs", ["none", "zero"])
def test_amed_runs_as_it_does_by_itself(tmp_path, afs):
    levels, nfe = tuple(float(sigma) for sigma in grid("karras", 4)), 6 - (afs != "none")
    setup = Setup(None, levels, afs, 0, 0, torch.device("cpu"))
    LearnedSolver(AMED.fresh(setup)).save(tmp_path / "amed")
    name = str(tmp_path / "amed")
    row = compare(bench(tmp_path), design(solvers=(name,), budgets=(nfe,)), []).record["rows"][0]
    x = solve(Bed(Toy()), torch.from_numpy(start(SEEDS)), solver=name, nfe=nfe)
    gap = x.double().numpy() - exact(SEEDS)
    want = np.sqrt(np.square(gap).reshape(20, -1).mean(1)).mean()
    assert row["error"] == pytest.approx(want, abs=5e-5)


def test_a_learned_solver_stands_beside_names_at_its_own_budget(tmp_path):
    levels = tuple(float(sigma) for sigma in grid("karras", 5))
    LearnedSolver(Tuned.start("ddim", levels, "none")).save(tmp_path / "solvers" / "mine")
    name = str(tmp_path / "solvers" / "mine")
    plan = design(solvers=("ddim", name), budgets=(3, 4), screen=4, screen_first=4)
    record = compare(bench(tmp_path), plan, []).record
    rows = {(row["sampler"], row["nfe"]): row for row in record["rows"]}
    assert (name, 3) not in rows
    assert "was trained for nfe=4" in record["left_out"][f"{name}@3"]
    ours = rows[name, 4]
    assert ours["screened"] is None
    gap = ddim(SEEDS, 4) - exact(SEEDS)  # an untrained table is its base solver
    want = np.sqrt(np.square(gap).reshape(20, -1).mean(1)).mean()
    assert ours["error"] == pytest.approx(want, abs=5e-5)
    page = comparison_html(record, {}, plots=False)
    assert "mine" in page
    assert name not in page


# Resuming and adding.


def whole(folder: Path, toy: Toy | None = None, **changes: Any) -> dict[str, Any]:
    plan = design(**{"solvers": ("ddim", "heun"), "screen": 16, "screen_first": 8, **changes})
    forgetful = replace(bench(folder, toy), memo=Memo(room=0))  # so that calls can be counted
    return timeless(compare(forgetful, plan, [Patches()]).record)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], int]:
    with pytest.MonkeyPatch.context() as patch:
        for one in (module, bench_module, references_module):
            patch.setattr(one, "CHUNK", 8)
        folder, toy = tmp_path_factory.mktemp("whole"), Toy()
        return folder, whole(folder, toy), toy.calls


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_an_interrupted_comparison_goes_on(tmp_path, undisturbed, share):
    _, record, calls = undisturbed
    toy = Toy(limit=int(share * calls))
    with pytest.raises(KeyboardInterrupt):
        whole(tmp_path, toy)
    again = Toy()
    assert whole(tmp_path, again) == record
    # of the block of seeds that it was in, all is lost: at most a reference solve of 61 or 180
    assert again.calls <= calls - toy.limit + 181


def timing(record):
    """Evaluations that the times cost: one batch in each of three rounds."""
    return 3 * sum(row["nfe"] for row in record["rows"])


@pytest.mark.parametrize("harm", ["deleted", "cut short", "overwritten"])
def test_damaged_files_are_made_again(tmp_path, undisturbed, harm):
    before, record, calls = undisturbed
    folder = tmp_path / "copy"
    shutil.copytree(before, folder)
    for i, path in enumerate(sorted(folder.rglob("*.np[yz]"))):
        if i % 2 == 0 and path.parent.name != "population":
            if harm == "deleted":
                path.unlink()
            else:
                data = path.read_bytes()
                path.write_bytes(data[: len(data) // 2] if harm == "cut short" else b"PK\3\4 no")
    toy = Toy()
    assert whole(folder, toy) == record
    assert 0 < toy.calls < calls


def test_a_solver_added_later_runs_nothing_again_but_the_times(tmp_path):
    record = whole(tmp_path, screen=0)
    toy = Toy()
    more = whole(tmp_path, toy, screen=0, solvers=("ddim", "heun", "dpmpp-2m"))
    # its evaluations, for the three files that 20 seeds are in, and the times of all rows
    assert toy.calls == 4 * 3 + timing(more)
    assert more["rows"][:2] == record["rows"]
    toy = Toy()
    assert whole(tmp_path, toy, screen=0) == record
    assert toy.calls == timing(record)


@pytest.mark.parametrize(
    ("solvers", "saved"),
    [
        (("ddim",), 4),  # two ends, one way there
        # and of ipndm-2: one end, the first two of the other, and of the three files of the test
        (("ddim", "ipndm-2"), 4 + 4 + 2 + 3 * 2),
    ],
)
def test_what_settings_and_solvers_share_is_evaluated_once(tmp_path, solvers, saved):
    plan = design(
        solvers=solvers, screen=8, screen_first=8, grids=("karras",), afs=("none",)
    )  # fmt: skip
    records, calls = [], []
    for memo in (Memo(room=0), Memo()):
        toy = Toy()
        one = replace(bench(tmp_path / str(memo.room), toy), memo=memo)
        records.append(timeless(compare(one, plan, []).record))
        calls.append(toy.calls)
    assert records[0] == records[1]
    assert calls[0] - calls[1] == saved


def test_a_students_evaluations_are_not_its_teachers(tmp_path):
    """At sigma_max both are asked the same."""

    class Other(Toy):
        def denoiser(self, *asked: Any, **more: Any) -> Any:
            return lambda x, sigma: Bed(self)(x, sigma) + 0.5

    def with_student(solvers: Sequence[str], folder: Path) -> Any:
        one = bench(folder, Toy(card=replace(Toy().card, weights_sha256="teacher")))
        other = Other(card=replace(Toy().card, weights_sha256="student"))
        one = replace(one, students={"student": other})
        runs = {}
        for solver in solvers:
            runs[solver] = one.of(solver).run(choose(other, Settings("ddim", 3)), SEEDS)
        return runs["student"].mse

    both, alone = (
        with_student(solvers, tmp_path / str(len(solvers)))
        for solvers in (("ddim", "student"), ("student",))
    )
    assert np.array_equal(both, alone)


def test_times_are_the_median_of_three_rounds():
    class Clock:
        def __init__(self, *times: float) -> None:
            self.times, self.order = iter(times), []

        def seconds(self, settings: Any, seeds: Sequence[int]) -> float:
            order.append(settings)
            return next(self.times)

        def report(self, what: str, done: int, total: int) -> None:
            assert (done, total) == (len(order), 6)

    order: list[str] = []
    ran: Any = [(Clock(9.0, 1.0, 2.0), "a"), (Clock(5.0, 7.0, 60.0), "b")]
    assert rows.times(ran, SEEDS) == [2.0, 7.0]
    assert order == ["a", "b"] * 3


def test_a_memo_hands_out_what_may_be_changed_and_forgets_the_oldest():
    asked = []

    def ask(value):
        asked.append(value)
        return torch.full((4,), float(value))

    memo = Memo(room=2 * 16)
    for value in (1, 2, 1, 3, 1, 2):  # 3 pushes out 2, which was longest not asked for
        found = memo.recall(bytes([value]), partial(ask, value))
        assert found.tolist() == [value] * 4
        found.zero_()
    assert asked == [1, 2, 3, 2]
    assert memo.size == 32


def test_a_remembering_denoiser_tells_questions_apart():
    class Counting:
        sigma_min = 0.1

        def __init__(self):
            self.calls = 0

        def __call__(self, x, sigma, *conditions):
            self.calls += 1
            return x / (1 + sigma[:, None] ** 2) + sum(conditions)

        def with_features(self, x, sigma):
            return self(x, sigma), x

    inner = Counting()
    memo = Memo()
    denoiser, other = Remembering(inner, memo, "one"), Remembering(inner, memo, "other")
    x, sigma = torch.arange(6.0).reshape(2, 3), torch.ones(1).expand(2)
    for _ in range(2):
        for asked in (x, x.double(), x + 1, -0.0 * x, x.reshape(3, 2).T, x[:, :2]):
            for level in (sigma, 2 * sigma):
                want = asked / (1 + level[:, None] ** 2)
                assert torch.equal(denoiser(asked, level), want)
    assert inner.calls == 12
    assert torch.equal(other(x, sigma), x / 2)
    assert inner.calls == 13
    assert torch.equal(denoiser(x, sigma, torch.tensor(1.0)), x / 2 + 1)
    assert torch.equal(denoiser.with_features(x, sigma)[1], x)
    assert inner.calls == 15
    assert denoiser.sigma_min == 0.1


def test_a_feature_network_added_later_samples_nothing_but_the_times(tmp_path, undisturbed):
    before, record, _ = undisturbed
    folder, toy = tmp_path / "copy", Toy()
    shutil.copytree(before, folder)
    plan = design(solvers=("ddim", "heun"), screen=16, screen_first=8)
    more = compare(bench(folder, toy), plan, [Patches(), Patches("other")]).record
    assert toy.calls == timing(more)
    assert [row["error"] for row in more["rows"]] == [row["error"] for row in record["rows"]]
    assert all(set(row["fd"]) == {"patches", "other"} for row in more["rows"])


# Merging.


def test_merged_rows_are_those_of_both_with_where_they_come_from(result):
    record = result.record
    old = json.loads(json.dumps(record))
    old["sources"] = [{"command": "x"}, {"command": "old"}, {"command": "y"}]
    for row in old["rows"]:
        row["source"] = 1
        row["error"] = 9.0
    old["rows"][0]["sampler"] = "another"
    old["left_out"] = {"ddim@4": "stale", "another@9": "kept"}
    merged = merge(record, old)
    assert merged["rows"][:-1] == record["rows"]
    last = merged["rows"][-1]
    assert (last["sampler"], last["error"]) == ("another", 9.0)
    assert merged["sources"][last["source"]] == {"command": "old"}
    assert len(merged["sources"]) == len(record["sources"]) + 1
    assert merged["left_out"] == {"another@9": "kept", **record["left_out"]}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), "fewstep-comparison/0"),
        (("model", "weights"), "f" * 64),
        (("condition", "guidance"), 2.0),
        (("seeds",), "0-9"),
        (("references", "nfe"), 41),
        (("references", "population"), "100000-100999"),
        (("features", "b"), "b pil-bicubic-299"),
    ],
)
def test_comparisons_of_different_protocols_do_not_merge(result, path, value):
    other = json.loads(json.dumps(result.record))
    place = other
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=rf"differ in {path[0]}: .*{value}"):
        merge(result.record, other)


def test_comparisons_that_chose_otherwise_do_not_merge_but_unchosen_ones_join(result):
    chosen = json.loads(json.dumps(result.record))
    chosen["screen"]["seeds"] = "1000000-1000009"
    assert merge(result.record, chosen)["screen"]["seeds"] == "1000000-1000009"
    other = json.loads(json.dumps(chosen))
    other["screen"]["by"] = "a"
    with pytest.raises(ValueError, match=r"differ in screen: {'by': 'error'} and {'by': 'a'}"):
        merge(chosen, other)


# Refusals.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"solvers": ()}, "solvers must name at least one"),
        ({"screen": -1}, "screen must be at least 0"),
        ({"budgets": (0,)}, "budgets must be from 1 to 10000, got 0"),
        ({"grids": ("karas",)}, "grids must be among karras, .*, got karas"),
        ({"afs": ()}, "afs must be among none, zero, mean, got none"),
        ({"ends": ("one",)}, "ends must be among sigma_min, zero, got one"),
        ({"seeds": (5, 100_003)}, "kept for population, got 100003"),
        ({"seeds": (1_000_001,), "screen": 5}, "kept for validation, got 1000001"),
        ({"screen": 5, "population": 900_001}, "population must be at most 900000"),
    ],
)
def test_a_design_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        design(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"solvers": ("ddim", "dimm")}, "dimm"),
        ({"solvers": ("heun",), "budgets": (3, 5)}, "none of the solvers can spend .*heun"),
        ({"choose_by": "eyes"}, "choose_by must be error or one of patches, got 'eyes'"),
        ({"seeds": (0,)}, "a distance needs at least 2 seeds"),
    ],
)
def test_refusals_come_before_any_work(tmp_path, changes, words):
    toy = Toy()
    with pytest.raises(ValueError, match=words):
        compare(bench(tmp_path, toy), design(**changes), [Patches()])
    assert (toy.calls, toy.drawn) == (0, [])


def test_a_sampler_that_breaks_is_named(tmp_path, monkeypatch):
    @dataclass
    class Broken(Bed):
        def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            d = super().__call__(x, sigma)
            return d * float("nan") if len(x) == 4 else d

    toy = Toy()
    monkeypatch.setattr(toy, "denoiser", lambda *_: Broken(toy), raising=False)
    work = replace(bench(tmp_path, toy), batch=4)
    with pytest.raises(FloatingPointError, match=r"ddim at 4 evaluations gave NaN .* for seed 0"):
        compare(work, design(), [])


# The report.


class Page(HTMLParser):
    """Tags balance; collects addresses and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.sources += [value for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in ("meta", "img", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def read(page: str) -> Page:
    parser = Page()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_needs_nothing_else_and_has_everything(result):
    pytest.importorskip("matplotlib")
    html = comparison_html(result.record, result.strips)
    page = read(html)
    assert page.sources
    assert all(source.startswith("data:image/") for source in page.sources)
    assert (
        html.count("--row: url(data:image/png") == 7
    )  # the strips, of two budgets the exact one too
    # two feature networks, the error and the ranking, each for a wide and a narrow screen
    assert sum(source.startswith("data:image/svg") for source in page.sources) == 8
    for row in result.record["rows"]:
        assert f"{row['error']:.4f}"[:5] in page.text
    for word in ("heun cannot spend exactly 3", "fewstep compare toy", "100000-100059", "0-19"):
        assert word in page.text


def synthetic(excess: dict[int, dict[str, tuple[float, float]]]) -> dict[str, Any]:
    """A record with these excess distances and standard errors, by budget and sampler."""
    rows = [
        {
            "sampler": name, "solver": name, "nfe": nfe, "grid": f"g-{name}", "afs": "none",
            "final": False, "end": "sigma_min", "network_calls": nfe, "error": 0.1,
            "error_se": 0.001, "psnr": 20.0, "seconds": 0.01 * nfe, "source": 0,
            "check": {}, "fd": {"j": {"value": v + 1, "se": s, "excess": v, "excess_se": s}},
            "fd_data": {}, "screened": None,
        }
        for nfe, samplers in excess.items()
        for name, (v, s) in samplers.items()
    ]  # fmt: skip
    machine = {"processor": "p", "cores": 2, "threads": 1, "gpu": None, "torch": "2", "python": "3"}
    return {
        "format": "fewstep-comparison/1",
        "sources": [{"command": "", "made": "today", "dtype": "float32", "machine": machine}],
        "model": {"name": "<toy>", "weights": "ab"},
        "condition": {"label": 3, "guidance": 2.0},
        "seeds": "0-99", "pictures": 100,
        "references": {"solver": "deis-4", "nfe": 40, "grid": "karras", "dtype": "float32",
                       "own_error": 1e-4, "population": "1-2"},
        "screen": {"seeds": None, "first_round": 8, "by": "error", "grids": [], "afs": [],
                   "ends": []},
        "features": {"j": "j native"}, "floor": {"j": {"fd": 1.0}}, "rows": rows,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("excess", "headline"),
    [
        ({5: {"a": (1, 0.1), "b": (2, 0.1)}}, "a leads at 5 evaluations"),
        ({1: {"a": (1, 0.1), "b": (2, 0.1)}}, "a leads at 1 evaluation"),
        ({5: {"a": (1, 0.1), "b": (1.2, 0.1)}}, "a and b share the lead at 5 evaluations"),
        (
            {n: {"a": (1, 0.1), "b": (2 - n / 4, 0.1)} for n in (1, 2, 7)},
            "a leads at 1 and 2 evaluations; b at 7",
        ),
        (
            {3: {"a": (1, 0.1), "b": (2, 0.1)}, 5: {"a": (1, 0.1), "b": (1, 0.1)}},
            "a leads at 3 evaluations; a and b share the lead at 5",
        ),
        ({3: {"a": (1, 0.1)}, 5: {"a": (0.5, 0.1)}}, "a at 3 and 5 evaluations"),
        (
            {2: dict.fromkeys("abcde", (1, 0.1))},
            "5 samplers share the lead at 2 evaluations",
        ),
    ],
)
def test_the_headline_says_who_leads_where(excess, headline):
    text = comparison_html(synthetic(excess), {}, plots=False)
    start = text.index("<h1>")
    assert read(text[start : text.index("</h1>") + 5]).text.strip() == headline


def test_auto_does_not_share_the_lead_with_itself():
    record = synthetic({5: {"auto": (1, 0.1), "b": (1, 0.1), "c": (3, 0.1)}})
    record["rows"][0] |= {"solver": "b", "grid": "g-b"}
    page = comparison_html(record, {}, plots=False)
    assert "b</span> leads at 5" in page
    assert (
        page.count('<span class="best">1.00\u00a0±\u00a00.10</span>') == 2
    )  # but its number is as good


@pytest.mark.slow
@pytest.mark.parametrize("least", [-0.05, 0.5])
def test_curves_are_drawn_for_excesses_on_both_sides_of_zero(least):
    pytest.importorskip("matplotlib")
    names = [f"solver-{i}" for i in range(15)]
    record = synthetic(
        {n: {name: (least + i * 0.3 / n, 0.02) for i, name in enumerate(names)} for n in (3, 5, 7)}
    )
    page = read(comparison_html(record, {}))
    assert sum(source.startswith("data:image/svg") for source in page.sources) == 6
    assert "<toy>" in page.text  # a name is text, never a tag


@pytest.mark.parametrize("size", [(300, 200, 3), (200, 300, 1), (100, 100, 3)])
def test_large_pictures_are_shown_small(size):
    record = synthetic({5: {"a": (1, 0.1)}})
    pictures = np.zeros((16, *size), np.uint8)
    page = comparison_html(record, {"": pictures, "a@5": pictures}, plots=False)
    for source in re.findall(r"url\(data:image/png;base64,([^)]*)\)", page):
        image = Image.open(io.BytesIO(base64.b64decode(source)))
        assert image.height <= 128
        assert 8 * 85 <= image.width <= 8 * 129


@pytest.mark.parametrize(
    ("size", "shown"), [((8, 8, 1), (72, 72)), ((32, 32, 3), (64, 64)), ((28, 20, 1), (40, 56))]
)
def test_small_pictures_are_enlarged_by_a_whole_factor(size, shown):
    pictures = np.zeros((3, *size), np.uint8)
    page = comparison_html(
        synthetic({5: {"a": (1, 0.1)}}), {"": pictures, "a@5": pictures}, plots=False
    )
    assert f"--w: {shown[0]}; --h: {shown[1]};" in page


def test_the_table_and_the_lines_have_every_row(result):
    record = result.record
    lines = list(csv.DictReader(io.StringIO(comparison_csv(record))))
    assert len(lines) == len(record["rows"])
    rows = {(row["sampler"], row["nfe"]): row for row in record["rows"]}
    for line in lines:
        row = rows[line["sampler"], int(line["nfe"])]
        assert float(line["error"]) == row["error"]
        assert float(line["fd-b excess"]) == row["fd"]["b"]["excess"]
        assert line["fd-a to data"] == ""
        assert float(line["fd-b to data"]) == row["fd_data"]["b"]
    excess = [float(line["fd-b excess"]) for line in lines if line["nfe"] == "4"]
    assert excess == sorted(excess)
    console = Console(file=io.StringIO(), width=200)
    console.print(comparison_table(record))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for row in record["rows"]:
        assert f"{row['error']:.3f}" in text
    assert "left out: heun cannot spend exactly 3" in text


def test_what_is_written_is_read_again(result, tmp_path):
    paths = write_comparison(result, tmp_path, plots=False)
    assert [path.name for path in paths] == ["comparison.json", "comparison.csv", "report.html"]
    assert read_comparison(paths[0]) == result.record


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "fewstep-plan/1", "rows": [1]}'])
def test_a_file_that_is_no_comparison_is_refused(tmp_path, text):
    path = tmp_path / "comparison.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"comparison\.json is not a comparison: "):
        read_comparison(path)


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [
        (14.3256, 0.3503, "14.3 ± 0.4"),
        (0.20889, 0.00109, "0.2089 ± 0.0011"),
        (1.4617, 0.098, "1.46 ± 0.10"),
        (0.13990, 0.00089, "0.1399 ± 0.0009"),
        (68.0, 12.0, "68 ± 12"),
        (0.13990, 0.0, "0.140"),
        (25.36, 0.0, "25.4"),
    ],
)
def test_numbers_have_the_digits_that_their_errors_bear_out(value, spread, text):
    assert with_error(value, spread).replace("\u00a0", " ") == text
