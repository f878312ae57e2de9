"""What the trainer needs to know of a model, whatever its architecture and prediction."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewstep.denoiser import Condition
from fewstep.models import Model
from fewstep.models.card import Card
from fewstep.models.students import Boundary
from fewstep.schedule import Schedule

__all__ = ["Subject", "subject"]

# kind of a model's card: the module whose subject(model, told, seed) takes it apart
KINDS = {
    "unet": "fewstep.distillation.unet",
    **dict.fromkeys(("adm", "edm", "edm2"), "fewstep.distillation.paper"),
}


@dataclass(frozen=True, eq=False)
class Subject:
    """A model taken apart for distillation.

    student: the network to train, equal to the teacher; what requires no gradient stays as it is
    denoise: (network, x, sigma, condition, told) -> D of the student or of a copy of it; told is
        what `fewstep.networks.conditioning.indices` returns
    teacher: (x, sigma, condition) -> D, frozen
    none: the condition, of one row, that stands for none; None where the model has no such thing
    boundary: makes a consistency function of D
    sigma_min, sigma_max, schedule: of the denoiser
    card: of the student's model
    bind: (network, card) -> the student as a model
    save: (folder, network, card) -> the card as written
    """

    student: nn.Module
    denoise: Callable[..., Tensor]
    teacher: Callable[[Tensor, Tensor, Condition], Tensor]
    none: Condition
    boundary: Boundary
    sigma_min: float
    sigma_max: float
    schedule: Schedule | None
    card: Card
    bind: Callable[[Any, Card], Model]
    save: Callable[[Path, Any, Card], Card]


def subject(model: Model, told: tuple[str, ...], seed: int) -> Subject:
    """A model taken apart.

    Args:
        told: the further numbers that the student is told, of `fewstep.networks.conditioning.TOLD`
        seed: for the new weights of their embeddings

    Raises:
        ValueError: for a kind of model that cannot be distilled, or one that was already.
    """
    card = model.card
    if card.distilled:
        raise ValueError(f"{card.name} is distilled already; give the model that it came from")
    if card.kind not in KINDS:
        raise ValueError(
            f"a model of kind {card.kind!r} cannot be distilled yet; these can: {', '.join(KINDS)}"
        )
    return importlib.import_module(KINDS[card.kind]).subject(model, told, seed)
