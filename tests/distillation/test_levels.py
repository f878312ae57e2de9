"""Which levels a student visits for each budget."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.distillation.levels import best_of, choose_levels, family, write_levels
from fewstep.models.card import Card, Distilled
from fewstep.models.exact import Gaussian
from fewstep.models.students import choices, student_levels
from tests.support.command import in_process

SHAPE = (1, 4, 4)
TEACHER = Gaussian(torch.zeros(SHAPE), rest=0.09, sigma_min=0.002, sigma_max=20.0)
TRAINED = (20.0, 4.0, 1.0, 0.3, 0.1, 0.05, 0.02, 0.01, 0.002)


class Flat:
    """The picture itself for its features."""

    name = "flat"

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def student(off: float) -> Any:
    def f(x: Tensor, sigma: Tensor) -> Tensor:
        return (1 - off) * TEACHER.exact(x, sigma, 0.0)

    return made(f, "student", distilled=KNOWN, auto=choices(TRAINED, "consistency"))


def made(denoiser: Any, name: str, **card: Any) -> Any:
    model = fewstep.models.of(denoiser, name=name, shape=SHAPE, sigma_max=20.0, sigma_data=0.3)
    return replace(model, card=replace(model.card, **card))


KNOWN = Distilled("splam", TRAINED, "teacher", "a" * 64)
HOW: dict[str, Any] = {"features": Flat(), "seeds": 250}


def test_the_family_goes_from_the_first_level_to_multiples_of_the_spread() -> None:
    card = student(0.0).card
    found = family(card, 3, (1.0, 4.0, 100.0))
    assert found["trained"] == student_levels(TRAINED, 3)
    assert list(found) == ["trained", "lowest=0.3", "lowest=1.2"]  # 30 is above the first level
    for low in (0.3, 1.2):
        assert found[f"lowest={low:g}"] == pytest.approx((20.0, (20 * low) ** 0.5, low, 0.0))
    assert list(family(card, 1)) == ["trained"]


def test_a_student_that_shrinks_does_not_go_far_below_the_spread() -> None:
    """Each visit to a low level shrinks the variance again, e' = 2 off + e c^2 / (c^2 + s^2)."""
    told = []
    teacher = made(TEACHER, "teacher")
    tries = choose_levels(student(0.1), teacher, budgets=[8], report=told.append, **HOW)
    assert told == tries
    assert {one.sampler for one in tries} == {"consistency"}
    best = best_of(tries)[8]
    assert best.excess == min(one.excess for one in tries)
    assert best.levels[-2] >= 0.3
    trained = next(one for one in tries if one.name == "trained")
    assert best.excess < 0.5 * trained.excess


def test_samplers_are_chosen_too() -> None:
    names = ("consistency-ode", "consistency-kappa:c=0.3")
    how = {**HOW, "samplers": names, "multiples": [1.0]}
    tries = choose_levels(student(0.0), made(TEACHER, "teacher"), budgets=[1, 4], **how)
    assert len(tries) == 2 + 4
    assert best_of(tries)[4].sampler == "consistency-kappa:c=0.3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samplers": ["consistency-pca"]}, "take consistency-kappa"),
        ({"samplers": ["nope"]}, "there is no solver"),
        ({"seeds": 249}, "seeds must be at least 250"),
        ({"features": None}, "name a feature network"),
        ({"budgets": [9], "multiples": []}, "student has no levels for 9 evaluations"),
    ],
)
def test_what_cannot_be_chosen_is_refused_before_any_work(changes, message, monkeypatch) -> None:
    monkeypatch.setattr("fewstep.distillation.levels.sample", None)
    with pytest.raises(ValueError, match=message):
        choose_levels(student(0.0), made(TEACHER, "teacher"), **{**HOW, **changes})


def test_a_model_that_is_no_student_has_no_levels() -> None:
    plain = made(TEACHER, "teacher")
    with pytest.raises(ValueError, match="teacher is no student"):
        choose_levels(plain, plain, **HOW)


def test_the_card_has_the_choice_and_its_figures(tmp_path) -> None:
    card = student(0.0).card
    (tmp_path / "card.json").write_text("{}")
    tries = choose_levels(
        student(0.1), made(TEACHER, "teacher"), budgets=[2, 8], multiples=[2.0], **HOW
    )
    write_levels(tmp_path, card, tries, {"features": "flat"})
    again = Card.read(tmp_path)
    for nfe, best in best_of(tries).items():
        assert tuple(again.auto[str(nfe)].grid) == pytest.approx(best.levels)
    assert again.auto["4"] == card.auto["4"]
    assert list(again.auto) == list(card.auto)
    about = json.loads((tmp_path / "card.json").read_text())["about"]["levels"]
    assert about["excess"]["8"] == {
        f"consistency, {one.name}": round(one.excess, 4) for one in tries if one.nfe == 8
    }


@pytest.mark.parametrize(
    ("scale", "theirs", "ours"),
    [
        (3.0, {"labels": (0, 1), "guidance": 3.0}, {"label": [0, 1] * 125}),
        ((1.0, 5.0), {"labels": (0, 1), "guidance": 3.0}, {"label": [0, 1] * 125, "guidance": 3.0}),
        (None, {}, {}),
    ],
)
def test_both_are_seen_under_the_guidance_of_the_student(
    scale, theirs, ours, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(Exception):
        pass

    given: list[dict[str, Any]] = []

    def examination(teacher: Any, seeds: int, **how: Any) -> Any:
        given.append(how)
        return type("Exact", (), {"seeds": range(250), "reference": 0, "distance": float})

    def sample(student: Any, **how: Any) -> Any:
        given.append(how)
        raise Seen

    monkeypatch.setattr("fewstep.distillation.levels.Examination", examination)
    monkeypatch.setattr("fewstep.distillation.levels.sample", sample)
    known = student(0.0)
    distilled = replace(KNOWN, guidance=scale)
    known = replace(known, card=replace(known.card, classes=("a", "b"), distilled=distilled))
    with pytest.raises(Seen):
        choose_levels(known, made(TEACHER, "teacher"), budgets=[2], **HOW)
    assert given[0] == {"features": HOW["features"], **theirs}
    assert {k: v for k, v in given[1].items() if k not in ("solver", "seeds", "grid")} == ours


def test_the_command_takes_the_folder_of_a_feature_network(tmp_path, monkeypatch) -> None:
    from fewstep.networks.features import BUILTIN

    found: list[Any] = []
    monkeypatch.setattr(
        "fewstep.distillation.levels.choose_levels", lambda *args, **how: found.append(how) or []
    )
    folder = BUILTIN / "fashion-a"
    assert in_process("distill", "levels", "fashion-mnist-splam", "--features", str(folder)) == 0
    assert found[0]["features"].name == "fashion-a"


def test_a_model_that_comes_with_fewstep_is_not_written_to(capsys) -> None:
    assert in_process("distill", "levels", "fashion-mnist-splam", "--write") == 2
    assert "copy its folder" in capsys.readouterr().err
