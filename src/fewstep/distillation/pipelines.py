"""Pipelines of diffusers, taken apart for distillation: the whole network, or adapters (LoRA).

A whole student is a copy of the network, and its folder is the pipeline's with that network. Of
adapters, teacher, target and student share the network of the model: what is trained, averaged and
kept is the adapters alone.

A network with an input for the guidance scale (time_cond_proj_dim, as published latent consistency
models have) is told a number there. A network of that class without the input gets one, whose
weights start at zero.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.training import mapped
from fewstep.denoiser import Clipped, Condition, Predicted
from fewstep.distillation.notes import write_notes
from fewstep.distillation.subject import Subject, Training
from fewstep.models.card import CARD_FILE, Card
from fewstep.models.components import Network, guidance_embedding, quiet
from fewstep.models.formats.loras import DIFFUSERS, KOHYA, save_lora
from fewstep.models.formats.saved import save_pipeline
from fewstep.models.formats.sources import INDEX_FILE
from fewstep.models.pipeline import PipelineModel
from fewstep.models.students import CleanEnd, DiscreteEnd
from fewstep.networks.lora import TARGETS, Adapters

__all__ = ["subject"]

EMBEDDED = 256  # numbers of the input for the guidance scale, as published
POINTS, GRID = 11, "trailing"  # ten sub-paths of 100 times each, of 1000
RATES = {"full": 1e-5, "lora": 1e-4}
RANK = 64  # that of the published LCM-LoRA
EMPTY = 0.1  # share of pictures without text


def subject(model: PipelineModel, told: tuple[str, ...], seed: int, how: Training) -> Subject:
    """A pipeline taken apart.

    Raises:
        ValueError: where the student is to be told what its network has no input for, or targets
            name no layer.
    """
    adapters = how.train == "lora"
    if model.net.config.get("time_cond_proj_dim"):
        raise ValueError(
            f"{model.card.name} takes the guidance scale as an input, so it was distilled already; "
            "give the model that it came from"
        )
    if adapters and told:
        raise ValueError(
            "adapters cannot be told numbers; set tell to level, and guidance to one scale, or "
            "train the whole network"
        )
    process = model.process
    student: Any
    if adapters:
        student = Adapters(model.net, how.rank or RANK, how.targets or TARGETS, seed)
        teacher_net: Any = student.plain
    else:
        student = whole(model.net, told).float().train().requires_grad_(True)
        teacher_net = model.forward
    if how.checkpointing:
        one: Any = model.net if adapters else student
        one.enable_gradient_checkpointing(student.checkpointed if adapters else None)
    taken = Taken(model, student, told, model.dtype if adapters else torch.float32)
    plain: Any = _denoiser(model, teacher_net, model.dtype)
    if process.clip is not None:
        plain = Clipped(plain, -process.clip, process.clip)
    discrete = process.prediction != "flow"
    texts = model.family.encode is not None
    return Subject(
        student=student,
        denoise=taken.denoise,
        teacher=lambda x, sigma, condition: plain(x, sigma, _cast(condition, model.dtype)),
        none=_cast(model.condition([None]), torch.float32) if texts else None,
        boundary=DiscreteEnd(process.schedule) if discrete else CleanEnd(process.sigma_min),
        boundary_name="discrete" if discrete else "clean",
        sigma_min=process.sigma_min,
        sigma_max=process.sigma_max,
        noise=1 / float(process.schedule.alpha(process.sigma_max)),
        schedule=process.grid_schedule,
        card=replace(
            model.card,
            network={**model.card.network, "told": list(told)},
            weights_sha256="",
            feature_module="" if adapters else model.card.feature_module,
        ),
        bind=taken.bind_adapters if adapters else taken.bind,
        save=taken.save_adapters if adapters else taken.save,
        usual=(POINTS, GRID),
        defaults={"lr": RATES[how.train], **({"label_dropout": EMPTY} if texts else {})},
        results=(DIFFUSERS,) if adapters else (INDEX_FILE, CARD_FILE),
        in_memory=adapters,
        close=taken.close if adapters else lambda: None,
    )


def whole(net: Any, told: tuple[str, ...]) -> nn.Module:
    """A copy of the network, with an input for what it is told.

    Raises:
        ValueError: its class has no such input, or it is to be told two numbers.
    """
    if not told:
        return copy.deepcopy(net)
    known = "time_cond_proj_dim" in net.config
    if len(told) > 1 or not known:
        raise ValueError(
            f"a {type(net).__name__} has {'one' if known else 'no'} input for {', '.join(told)}; "
            "set tell to level, and guidance to one scale"
        )
    with torch.random.fork_rng(devices=[]), quiet():
        other = type(net).from_config(net.config, time_cond_proj_dim=EMBEDDED)
    new, unknown = other.load_state_dict(net.state_dict(), strict=False)
    assert not unknown
    assert all("cond_proj" in name for name in new)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if name in new:
                weight.zero_()
    return other.to(next(net.parameters()).device)


@dataclass(frozen=True, eq=False)
class Taken:
    """A pipeline and the student that was made of it, whose network computes in dtype where
    autocast does not choose."""

    model: PipelineModel
    student: Any
    told: tuple[str, ...]
    dtype: torch.dtype

    def denoise(
        self, net: Any, x: Tensor, sigma: Tensor, condition: Condition, told: Tensor | None
    ) -> Tensor:
        dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else self.dtype
        rows = _cast(condition, dtype)
        if told is not None:
            rows = rows | guidance_embedding(net, told[:, 0])
        return _denoiser(self.model, net, dtype)(x, sigma, rows)

    def bind(self, net: Any, card: Card) -> PipelineModel:
        """The pipeline with that network in place of its own; the other parts are shared."""
        still = copy.deepcopy(net).eval().requires_grad_(False)
        if getattr(still, "is_gradient_checkpointing", False):
            still.disable_gradient_checkpointing()
        pipe = copy.copy(self.model.pipe)
        pipe.register_modules(**{self.model.family.network: still})
        return replace(self.model, card=card, pipe=pipe, forward=still)

    def bind_adapters(self, net: Adapters, card: Card) -> PipelineModel:
        still = copy.deepcopy(net).eval().requires_grad_(False)
        return replace(self.model, card=card, forward=still)

    def close(self) -> None:
        self.student.remove()
        if self.model.net.is_gradient_checkpointing:
            self.model.net.disable_gradient_checkpointing()

    def save(self, folder: Path, net: Any, card: Card) -> Card:
        card = save_pipeline(self.bind(net, card), folder)
        write_notes(folder, card, self.model.process.schedule, adapters=False)
        return card

    def save_adapters(self, folder: Path, net: Adapters, card: Card) -> Card:
        kohya = (KOHYA,) if card.about.get("lora_format") == "kohya" else ()
        for name in (DIFFUSERS, *kohya):
            save_lora(folder / name, net.tensors(), self.model.family.network, card)
        write_notes(folder, card, self.model.process.schedule, adapters=True)
        return card


def _denoiser(model: PipelineModel, forward: Any, dtype: torch.dtype) -> Predicted:
    """D of a network in the place of the model's, (x, sigma, condition)."""
    process = model.process
    return Predicted(
        Network(forward), process.schedule, process.prediction, process.time_scale, dtype=dtype
    )


def _cast(condition: Condition, dtype: torch.dtype) -> Any:
    """The condition in the dtype of a network; {} where there is none."""
    if not isinstance(condition, Mapping):
        return {}
    return mapped(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, condition)
