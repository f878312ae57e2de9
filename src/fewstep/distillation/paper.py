"""Networks of papers, in our folders, taken apart for distillation."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.distillation.subject import Subject
from fewstep.models.card import Card
from fewstep.models.formats.native import save_folder
from fewstep.models.network import Conditional, NetworkModel
from fewstep.models.students import CleanEnd
from fewstep.networks.edm2 import EDM2UNet

__all__ = ["subject"]

STAGES = {"adm": "first_stage.", "edm2": "vae."}  # names of a first stage's weights, by kind
BESIDE = ("guide", "classifier")  # what guidance goes by, which a student does not have


def subject(model: NetworkModel, told: tuple[str, ...], seed: int) -> Subject:
    """A model taken apart; what makes pictures of its states is the student's too.

    Raises:
        ValueError: where the student is to be told numbers, for which these networks have no input.
    """
    card = model.card
    if told:
        raise ValueError(
            f"a network of kind {card.kind!r} has no input for {', '.join(told)}; set tell to "
            "level, and guidance to one scale"
        )
    student = _weights(copy.deepcopy(model.net)).float().train().requires_grad_(True)

    def answer(net: nn.Module, x: Tensor, sigma: Tensor, label: Tensor, told: None) -> Tensor:
        return model.precondition(net, x, sigma, label, card.sigma_data, torch.float32)

    def bind(net: nn.Module, card: Card) -> NetworkModel:
        still = copy.deepcopy(net).eval().requires_grad_(False)
        beside = {"guide": None, "classifier": None, "compiled": None}
        return replace(model, card=card, net=still, forward=still, **beside)

    def save(folder: Path, net: nn.Module, card: Card) -> Card:
        parts = {"": net}
        if (stage := getattr(model.first_stage, "net", None)) is not None:
            parts[STAGES[card.kind]] = stage
        return save_folder(folder, card, parts, model.stats)

    network = {name: value for name, value in card.network.items() if name not in BESIDE}
    rows = partial(torch.tensor, device=model.device)
    return Subject(
        student=student,
        denoise=answer,
        teacher=Conditional(model),
        none=rows([len(card.classes)]) if card.classes and not model.needs_label else None,
        boundary=CleanEnd(card.sigma_min),
        sigma_min=card.sigma_min,
        sigma_max=card.sigma_max,
        schedule=model.schedule,
        card=replace(card, network=network, weights_sha256=""),
        bind=bind,
        save=save,
    )


def _weights(net: nn.Module) -> nn.Module:
    """The network with weights that can be trained and stored."""
    return net.restore() if isinstance(net, EDM2UNet) else net
