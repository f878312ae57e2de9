"""The built-in kind of network, taken apart for distillation."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fewstep.denoiser import Condition
from fewstep.distillation.subject import Subject
from fewstep.models.card import Card
from fewstep.models.formats.native import save_folder
from fewstep.models.network import Conditional, NetworkModel
from fewstep.models.students import CleanEnd
from fewstep.networks.preconditioning import denoise
from fewstep.networks.unet import UNet

__all__ = ["subject"]


def subject(model: NetworkModel, told: tuple[str, ...], seed: int) -> Subject:
    """A model of the kind unet taken apart; its statistics are the student's too."""
    card, config = model.card, replace(model.net.config, told=told)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = UNet(config)
    missing, unknown = student.load_state_dict(model.net.state_dict(), strict=False)
    assert not unknown
    assert all(name.startswith("embed_told.") for name in missing)
    student = student.to(model.device, torch.float32).train().requires_grad_(True)

    def answer(net: UNet, x: Tensor, sigma: Tensor, label: Tensor, told: Tensor | None) -> Tensor:
        return denoise(partial(net, told=told), x, sigma, label, card.sigma_data)

    def bind(net: UNet, card: Card) -> NetworkModel:
        still = copy.deepcopy(net).eval().requires_grad_(False)
        return NetworkModel(card, still, model.stats, still, model.shape)

    def save(folder: Path, net: UNet, card: Card) -> Card:
        return save_folder(folder, card, net, model.stats)

    def far_mean(rows: Condition) -> Tensor | None:
        known = model.stats.get("far_mean")
        return None if known is None or not isinstance(rows, Tensor) else known[rows]

    return Subject(
        far_mean=far_mean,
        student=student,
        denoise=answer,
        teacher=Conditional(model),
        none=torch.tensor([len(card.classes)], device=model.device) if card.classes else None,
        boundary=CleanEnd(card.sigma_min),
        sigma_min=card.sigma_min,
        sigma_max=card.sigma_max,
        schedule=None,
        card=replace(card, network=asdict(config), weights_sha256=""),
        bind=bind,
        save=save,
    )
