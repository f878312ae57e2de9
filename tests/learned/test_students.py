"""Solvers that are learned for a student: its teacher's solutions are the target."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.denoiser import Counted, Covariance
from fewstep.evaluate.compare import load_students, read_comparison
from fewstep.learned import Imitated, LearnedSolver, train
from fewstep.learned.on_model import train_on_model
from fewstep.learned.rivals import OF_STUDENTS, best_sampler
from fewstep.learned.solver import trained_on
from fewstep.models import teacher_of
from fewstep.models.card import Card, Distilled
from fewstep.models.exact import Gaussian
from fewstep.models.students import choices, own_levels
from fewstep.solver import get
from tests.support.command import in_process

TEACHER = Gaussian(
    torch.tensor([0.5, -0.2, 0.0, 1.0]),
    torch.eye(4)[:2],
    torch.tensor([4.0, 0.5]),
    0.01,
    sigma_max=20.0,
)
LEVELS = (20.0, 6.0, 2.0, 0.7, 0.2, 0.05, 0.01, 0.002)
SHORT: dict[str, Any] = {"trajectories": 64, "batch": 16, "validation_seeds": 16}
SHORT |= {"validate_every": 1, "sigma_max": None}


class Student:
    """The end of the path, off by a part: f = mean + (1 + off) (end - mean)."""

    sigma_min, sigma_max = 0.002, 20.0

    def __init__(self, off: float = 0.1) -> None:
        self.off = off
        self.covariance = None if off else known()

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        end = TEACHER.exact(x.double(), sigma, 0.0)
        return (TEACHER.mean + (1 + self.off) * (end - TEACHER.mean)).to(x)


def known() -> Covariance:
    return Covariance(TEACHER.basis[None], TEACHER.variances[None], torch.tensor([TEACHER.rest]))


def fit(method: str = "tuned", nfe: int = 2, off: float = 0.1, **changes: Any) -> LearnedSolver:
    base = {"tuned": "consistency-kappa", "amed-plugin": "consistency-ode"}.get(method)
    grid = (*LEVELS[:1], 3.0, 0.0) if method == "tuned" else (20.0, 0.002)
    given = {**SHORT, "method": method, "nfe": nfe, "base": base, "grid": grid, **changes}
    imitated = Imitated(lambda seeds: TEACHER, (20.0, 3.0, 0.0))
    return train(Student(off), (4,), imitated=imitated, **given)


def gap(solver: Any, off: float = 0.1) -> float:
    """Root mean square distance to the teacher's exact ends, mean over seeds of no training."""
    x = 20.0 * fewstep.noise.normal(range(64), (4,), "prior")
    ends = TEACHER.exact(x.double(), 20.0, 0.0)
    ours = fewstep.solve(Student(off), x, solver)
    return float((ours - ends).square().mean(1).sqrt().mean())


def test_a_table_learns_the_teachers_end_and_not_the_students() -> None:
    solver = fit(fallback=False, trajectories=256)
    levels = (20.0, 3.0, 0.0)
    own = [gap(get(name).on(levels)) for name in OF_STUDENTS[:2]]
    assert gap(solver) < 0.7 * min(own)
    assert solver.validation["training_free"]["solver"] == OF_STUDENTS[own.index(min(own))]
    assert solver.validation["error"] == pytest.approx(gap(solver), rel=0.5)


@pytest.mark.parametrize("method", ["amed", "amed-plugin"])
def test_amed_learns_on_a_student(method: str) -> None:
    solver = fit(method, fallback=False, trajectories=128, scale_dir=0.3, inner=20)
    assert solver.nfe == 2
    assert solver.validation["error"] < solver.validation["error_untrained"]
    still = fit(method, fallback=False, trajectories=1, batch=1, lr=1e-9, inner=20)
    assert gap(solver) < gap(still)


def test_what_the_teacher_saw_does_not_stand_for_the_students_evaluation() -> None:
    """An AMED step whose start were recalled would be the teacher's, not the student's."""
    counted = Counted(Student())
    imitated = Imitated(lambda seeds: TEACHER, (20.0, 3.0, 0.0))
    given = {**SHORT, "trajectories": 16, "validation_seeds": 1, "fallback": False}
    train(counted, (4,), imitated=imitated, method="amed", nfe=2, grid=(20.0, 0.002), **given)
    once = counted.evaluations
    given["trajectories"] = 32
    train(counted, (4,), imitated=imitated, method="amed", nfe=2, grid=(20.0, 0.002), **given)
    # a batch more: two evaluations of the losses, two of its validation
    assert counted.evaluations - once == once + 4


def test_of_a_perfect_student_its_own_sampler_is_the_result() -> None:
    solver = fit(off=0.0, trajectories=16)
    assert solver.method.kind == "grid"
    assert solver.validation["training_free"]["solver"] == "consistency-pca"
    assert gap(solver, 0.0) < 1e-5


def test_a_student_has_no_grid_to_search() -> None:
    for method in ("tuned", "grid"):
        with pytest.raises(ValueError, match="a student has none; take tuned on its own levels"):
            fit(method, grid=None)


def test_the_best_sampler_is_among_those_that_the_denoiser_knows() -> None:
    seen = []

    def measure(program: Any) -> dict[str, float]:
        seen.append(program.name)
        return {"error": 1.0 / len(seen)}

    levels = own_levels(MODEL.card, 4)
    best = best_sampler(measure, levels, Student())
    assert len(seen) == 2  # of the three, pca needs a covariance
    assert best["solver"] == "consistency-kappa"
    assert best["sigmas"] == list(levels)
    assert best_sampler(lambda program: {"error": float("inf")}, levels, Student()) == {}


def model(denoiser: Any, name: str, **card: Any) -> Any:
    made = fewstep.models.of(denoiser, name=name, shape=(4,), sigma_max=20.0)
    return replace(made, card=replace(made.card, **card))


KNOWN = Distilled("splam", LEVELS, "teacher", "a" * 64)
MODEL = model(
    Student(),
    "student",
    weights_sha256="b" * 64,
    distilled=KNOWN,
    auto=choices(LEVELS, "consistency"),
)
TAUGHT = model(TEACHER, "teacher", weights_sha256="a" * 64)


@pytest.mark.parametrize(
    ("method", "nfe", "grid", "base"),
    [
        ("tuned", 4, own_levels(MODEL.card, 4), "consistency-kappa"),
        ("amed", 4, (*own_levels(MODEL.card, 2)[:-1], 0.002), None),
        ("amed-plugin", 5, (*own_levels(MODEL.card, 3)[:-1], 0.002), "consistency-ode"),
    ],
)
def test_the_card_gives_grid_and_base(method, nfe, grid, base, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    given = {**SHORT, "trajectories": 4, "batch": 4, "validation_seeds": 4, "fallback": False}
    out = tmp_path / "solver"
    solver = train_on_model(MODEL, teacher_model=TAUGHT, method=method, nfe=nfe, out=out, **given)
    assert (solver.nfe, solver.sigmas, solver.method.base) == (nfe, tuple(grid), base)
    assert trained_on(out) == ("b" * 64, "a" * 64)
    x = fewstep.solve(MODEL.denoiser(), MODEL.prior([0]), str(out))
    assert torch.isfinite(x).all()


def test_a_student_needs_its_teacher() -> None:
    with pytest.raises(ValueError, match="student is a student; name its teacher too"):
        train_on_model(MODEL, nfe=2)


def test_the_teacher_is_found_by_the_card_or_by_name(tmp_path) -> None:
    splam = fewstep.load("fashion-mnist-splam").card
    assert splam.distilled is not None
    assert teacher_of(splam).card.name == "fashion-mnist"
    assert teacher_of(splam, "fashion-mnist", dtype="bfloat16").dtype == torch.bfloat16
    other = replace(splam, distilled=replace(splam.distilled, teacher="mine"))
    with pytest.raises(ValueError, match="does not come with fewstep; name its folder"):
        teacher_of(other)
    changed = replace(splam, distilled=replace(splam.distilled, teacher_weights="c" * 64))
    for name in (None, "fashion-mnist"):
        with pytest.raises(ValueError, match=r"--teacher-model"):
            teacher_of(changed, name)
    with pytest.raises(ValueError, match="plain is no student"):
        teacher_of(Card("plain"))


def test_a_learned_solver_is_a_row_of_the_teachers_comparison(tmp_path) -> None:
    on: dict[str, Any] = {"weights": fewstep.load("fashion-mnist-splam").card.weights_sha256}
    teacher = fewstep.load("fashion-mnist")
    on["teacher"] = {"weights": teacher.card.weights_sha256}
    table = replace(fit(trajectories=1, batch=1, fallback=False), model=on)
    table.save(tmp_path / "table" / "2")
    names = ["ddim", "auto", str(tmp_path / "table")]
    assert list(load_students(teacher, names)) == [str(tmp_path / "table")]
    assert load_students(teacher, names)[names[-1]].card.name == "fashion-mnist-splam"
    replace(table, model={**on, "weights": "d" * 64}).save(tmp_path / "strange")
    with pytest.raises(ValueError, match="name its folder beside it: --solvers STUDENT,SOLVER"):
        load_students(teacher, [str(tmp_path / "strange")])
    for odd in ({}, {"teacher": "x"}, {"teacher": {"weights": ["a"]}, "weights": None}):
        replace(table, model=odd).save(tmp_path / "odd")
        assert load_students(teacher, [str(tmp_path / "odd")]) == {}


@pytest.mark.slow
def test_the_command_trains_and_the_teachers_comparison_has_the_row(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    table, compared = tmp_path / "tables" / "2", tmp_path / "compared"
    student, short = "fashion-mnist-splam", {"trajectories": 4, "batch": 2, "validation-seeds": 2}
    runs = [
        (("train", "solver", student), {**short, "nfe": 2, "out": table}, ("--not-fallback",)),
        (("sample", student), {"solver": table, "seeds": 0, "out": tmp_path / "x"}, ()),
        (
            ("compare", "fashion-mnist"),
            {"solvers": table.parent, "nfe": 2, "features": "none", "seeds": "0-1", "screen": 0},
            ("--population", "2", "--out", compared),
        ),
    ]
    for names, options, more in runs:
        given = [part for name, value in options.items() for part in (f"--{name}", value)]
        assert in_process(*names, *given, *more) == 0
    [row] = read_comparison(compared / "comparison.json")["rows"]
    assert row["student"]["weights"] == fewstep.load("fashion-mnist-splam").card.weights_sha256
    assert row["nfe"] == row["network_calls"] == 2
