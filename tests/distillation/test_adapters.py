"""What holds for every adapter, the function that takes a kind of model apart for distillation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.data.training import mapped
from fewstep.distillation.recipe import Recipe
from fewstep.distillation.subject import KINDS, subject
from tests.distillation.test_distill import tiny_model
from tests.networks.test_adm import GD
from tests.support import pipelines
from tests.support.adm_files import tensors
from tests.support.edm_files import write_edm, write_edm2


def adm(folder: Path) -> Any:
    torch.save(tensors({**GD, "legacy": True}), folder / "net.pt")
    said = {"num_head_channels": 16, "noise_schedule": "linear", "use_new_attention_order": False}
    return fewstep.load(folder / "net.pt", config=said)


def pipeline(name: str, folder: Path) -> Any:
    return fewstep.load(pipelines.saved(name, folder / "pipeline"))


# A model of each kind that can be distilled, made in an empty folder. A new kind has its line here.
ADAPTED: dict[str, Callable[[Path], Any]] = {
    "unet": lambda folder: tiny_model(),
    "adm": adm,
    "edm": lambda folder: fewstep.load(write_edm(folder / "net.pkl", label_dim=3)[0]),
    "edm2": lambda folder: fewstep.load(write_edm2(folder / "net.pkl", label_dim=3)[0]),
    **{f"pipeline {name}": partial(pipeline, name) for name in ("ddim", "ldm", *pipelines.TEXT)},
}
TOLD: dict[str, list[tuple[str, ...]]] = {  # what students of a kind can be told
    "unet": [("gamma",), ("guidance",), ("gamma", "guidance")],
    "pipeline sd": [("gamma",)],
    "pipeline sdxl": [("guidance",)],
}


def test_every_adapter_is_tried() -> None:
    assert {name.partition(" ")[0] for name in ADAPTED} == set(KINDS)


@pytest.mark.parametrize(
    ("kind", "told"), [(kind, told) for kind in ADAPTED for told in [(), *TOLD.get(kind, ())]]
)
def test_an_adapter_starts_at_its_teacher_and_its_students_come_back(
    kind: str, told: tuple[str, ...], tmp_path: Path
) -> None:
    model = ADAPTED[kind](tmp_path)
    assert model.card.kind == kind.partition(" ")[0]
    known = subject(model, told, seed=0)
    sigma = torch.tensor([known.sigma_max, 0.5])
    x = model.prior(range(2)) * (sigma / known.sigma_max).reshape(2, 1, 1, 1)
    numbers = torch.tensor([[3.0] * len(told), [1.0] * len(told)]) if told else None
    conditions = [known.none] if known.none is not None else []
    if model.card.kind == "pipeline":
        conditions.append(model.condition(["cat", "mat"]))
    if model.card.classes:
        conditions.append(torch.tensor([0, len(model.card.classes) - 1]))
    for one in conditions or [torch.zeros(1, dtype=torch.int64)]:
        rows = mapped(lambda value: value.expand(2, *value.shape[1:]), one)
        with torch.no_grad():
            ours = known.denoise(known.student, x, sigma, rows, numbers)
            theirs = known.teacher(x, sigma, rows)
        tolerance = 1e-6 * max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    assert any(weight.requires_grad for weight in known.student.parameters())
    bound: Any = known.bind(known.student, known.card)
    assert not any(weight.requires_grad for weight in bound.net.parameters())
    saved = known.save(tmp_path / "student", known.student, known.card)
    again = fewstep.load(tmp_path / "student")
    assert again.card.weights_sha256 == saved.weights_sha256 != ""
    assert (again.card.kind, again.shape, again.card.told) == (model.card.kind, model.shape, told)
    with torch.no_grad():
        ours, theirs = (model.denoiser()(x, sigma) for model in (bound, again))
    # float16 in the file: 2^-11 of each weight, and D is as large as the noise at most
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01 * float(ours.abs().max()))


@pytest.mark.parametrize("kind", ["adm", "edm", "edm2", "pipeline ddim"])
def test_a_network_without_an_input_for_numbers_names_settings_that_there_are(
    kind: str, tmp_path: Path
) -> None:
    model = ADAPTED[kind](tmp_path)
    with pytest.raises(ValueError, match="no input for gamma, guidance; set tell to level") as told:
        subject(model, ("gamma", "guidance"), seed=0)
    assert hasattr(Recipe(), "tell")
    assert "\n" not in str(told.value)
