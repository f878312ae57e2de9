"""What the trainer needs to know of a model, whatever its architecture and prediction."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewstep.denoiser import Condition
from fewstep.models import Model
from fewstep.models.card import CARD_FILE, WEIGHTS_FILE, Card
from fewstep.models.students import Boundary
from fewstep.schedule import Schedule

__all__ = ["Subject", "Training", "subject"]

# kind of a model's card: the module whose subject(model, told, seed) takes it apart
KINDS = {
    "unet": "fewstep.distillation.unet",
    **dict.fromkeys(("adm", "edm", "edm2"), "fewstep.distillation.paper"),
    "pipeline": "fewstep.distillation.pipelines",
}
PARTS = ("pipeline",)  # kinds of which a part of the network may be trained


@dataclass(frozen=True)
class Training:
    """What of a network is trained.

    train: full, or lora: adapters alone
    rank, targets: of adapters; None for those of the published LCM-LoRA
    checkpointing: compute activations again in the backward pass
    """

    train: str = "full"
    rank: int | None = None
    targets: tuple[str, ...] | None = None
    checkpointing: bool = False


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
    boundary_name: that of the boundary in cards
    usual: points and grid of training, where left out; None for those of the method
    defaults: settings of the recipe that are others for this kind, where left out
    results: names of what `save` writes
    in_memory: the finished student is the bound one, and not read back from its folder
    close: undoes what was done to the model
    noise: standard deviation of the noise that sampling starts from
    far_mean: of a condition, the mean of the teacher's D at sigma_max, where that is known
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
    boundary_name: str = "clean"
    usual: tuple[int, str] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    results: tuple[str, ...] = (CARD_FILE, WEIGHTS_FILE)
    in_memory: bool = False
    close: Callable[[], None] = lambda: None
    noise: float = 0.0
    far_mean: Callable[[Condition], Tensor | None] = lambda condition: None

    def __post_init__(self) -> None:
        if not self.noise:
            object.__setattr__(self, "noise", self.sigma_max)


def subject(model: Model, told: tuple[str, ...], seed: int, how: Training | None = None) -> Subject:
    """A model taken apart.

    Args:
        told: the further numbers that the student is told, of `fewstep.networks.conditioning.TOLD`
        seed: for new weights
        how: what is trained; the whole network where left out

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
    home = importlib.import_module(KINDS[card.kind])
    if card.kind in PARTS:
        return home.subject(model, told, seed, how or Training())
    if how not in (None, Training()):
        raise ValueError(
            f"train lora and checkpointing are for pipelines, {card.name} is of kind {card.kind!r}"
        )
    return home.subject(model, told, seed)
