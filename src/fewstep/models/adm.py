"""Models of the ADM family: what makes D(x, sigma) of the raw network, and pictures of states.

    role           D
    eps            x - sigma eps(alpha x, t(sigma)), of a table of betas; a learned variance is
                   dropped
    edm            EDM's preconditioning, the network being told 250 log sigma
    consistency    the same with sigma - sigma_min in c_skip and in the numerator of c_out, so that
                   D(x, sigma_min) = x

Guidance by a classifier p(y | x, sigma) adds scale sigma^2 grad_x log p to D, which is the
published eps - scale sqrt(1 - abar) grad log p in EDM units.

Sources: Dhariwal and Nichol 2021, arXiv:2105.05233; Song et al. 2023 (consistency models),
arXiv:2303.01469; Rombach et al. 2022, arXiv:2112.10752.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fewstep.denoiser import per_sample
from fewstep.models.adm_spec import GUIDE, STAGE, Spec, spec_of
from fewstep.models.card import Card
from fewstep.models.network import NetworkModel, Precondition, assembled
from fewstep.networks.adm import ADM, Encoder, cast_torso
from fewstep.networks.autoencoder import Autoencoder
from fewstep.networks.preconditioning import EDM, Preconditioned
from fewstep.schedule import VP

__all__ = ["Classifier", "Latents", "model", "parts"]

TIME_SCALE = 1000.0  # consistency models are told 1000 log(sigma) / 4
LEAST = 9  # tensors of one block, at least


@dataclass(frozen=True, eq=False)
class Classifier:
    """A noisy classifier, and the schedule on whose time it was trained."""

    net: Encoder
    schedule: VP

    def gradient(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """grad_x log p(label | x, sigma), of noisy pictures in EDM units."""
        with torch.inference_mode(False), torch.enable_grad():
            moved = x.detach().clone().requires_grad_()
            level, rows = sigma.detach().clone(), label.detach().clone()
            x_t = moved * per_sample(self.schedule.alpha(level), moved)
            logits = self.net(x_t, self.schedule.t(level).float()).float()
            log_p = torch.log_softmax(logits, dim=-1)[range(len(rows)), rows]
            return torch.autograd.grad(log_p.sum(), moved)[0]


@dataclass(frozen=True, eq=False)
class Latents:
    """A first stage whose latents, times `scale`, are the states."""

    net: Autoencoder
    scale: float

    def picture(self, height: int, width: int) -> tuple[int, int, int]:
        config = self.net.config
        return height * config.factor, width * config.factor, config.channels

    def encode(self, pictures: Tensor) -> Tensor:
        return self.scale * self.net.encode(pictures)

    def decode(self, x: Tensor) -> Tensor:
        return self.net.decode(x / self.scale)


@dataclass(frozen=True)
class Discrete:
    """Scalings of a network that predicts eps and is told the time of a table."""

    schedule: VP

    def __call__(self, sigma: Tensor, sigma_data: float) -> tuple[float, Tensor, Tensor, Tensor]:
        t = self.schedule.t(sigma.flatten()).float()
        return 1.0, -sigma, self.schedule.alpha(sigma), t


def schedule_of(spec: Spec) -> VP | None:
    """The table of a network of eps; None for the others."""
    if not spec.schedule:
        return None
    name, *numbers = spec.schedule
    values = [float(number) for number in numbers]
    if name == "betas":
        return VP.from_betas(values)
    kinds = {"linear": VP.linear, "scaled_linear": VP.scaled_linear, "cosine": VP.cosine}
    return kinds[str(name)](int(values[0]), *values[1:])


def _precondition(spec: Spec, schedule: VP | None) -> Precondition:
    """What makes D of the raw network."""
    boundary = spec.sigma_min if spec.role == "consistency" else 0.0
    scalings = EDM(boundary, TIME_SCALE) if schedule is None else Discrete(schedule)
    plain = Preconditioned(scalings)
    if spec.clip is None:
        return plain
    return lambda *args: plain(*args).clamp(-spec.clip, spec.clip)  # type: ignore[operator]


def parts(card: Card, tensors: int) -> dict[str, nn.Module]:
    """The modules of such a model by the prefix of their weights, on the meta device.

    Raises:
        ValueError: where a file of so many tensors cannot hold them.
    """
    spec = spec_of(card)
    if len(card.classes) != spec.classes:
        raise ValueError(f"{len(card.classes)} class names for {spec.classes} classes")
    for config in (spec.unet, spec.first_stage, spec.classifier):
        if config is not None and config.blocks * len(config.widths) * LEAST > tensors:
            raise ValueError(f"the file has {tensors} tensors, too few for {config}")
    with torch.device("meta"):  # takes no memory and draws no random numbers
        made: dict[str, nn.Module] = {"": ADM(spec.unet)}
        if spec.first_stage is not None:
            made[STAGE] = Autoencoder(spec.first_stage)
        if spec.classifier is not None:
            made[GUIDE] = Encoder(spec.classifier)
    return made


def model(
    card: Card,
    made: Mapping[str, nn.Module],
    stats: Mapping[str, Tensor],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
) -> NetworkModel:
    """The model that samples, of modules with their weights, which are moved and cast in place."""
    spec = spec_of(card)
    schedule = schedule_of(spec)
    card = card if schedule is None else _to_the_bit(card, schedule)
    ready = {
        name: module.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
        for name, module in made.items()
    }
    net = ready[""]
    assert isinstance(net, ADM)
    if dtype is not torch.float32:
        cast_torso(net, dtype)
    stage, guide = ready.get(STAGE), ready.get(GUIDE)
    assert stage is None or isinstance(stage, Autoencoder)
    classifier = None
    if guide is not None:
        assert isinstance(guide, Encoder)
        assert schedule is not None
        classifier = Classifier(guide, schedule)
    return assembled(
        card,
        net,
        stats,
        device,
        compile,
        precondition=_precondition(spec, schedule),
        schedule=schedule,
        first_stage=None if stage is None else Latents(stage, spec.scale),
        needs_label=spec.needs_label,
        classifier=classifier,
    )


def _to_the_bit(card: Card, schedule: VP) -> Card:
    """The card with the ends of the table itself, where it has them but for the last digits."""
    ends = {name: getattr(schedule, name) for name in ("sigma_min", "sigma_max")}
    near = {n: end for n, end in ends.items() if math.isclose(end, getattr(card, n))}
    return replace(card, **near)
