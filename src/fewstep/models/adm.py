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

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.denoiser import PREDICTIONS, per_sample
from fewstep.models.card import Card, Choice
from fewstep.models.network import NetworkModel, Precondition
from fewstep.networks.adm import ADM, ADMConfig, Encoder, cast_torso
from fewstep.networks.autoencoder import Autoencoder, AutoencoderConfig
from fewstep.networks.preconditioning import denoise
from fewstep.records import Int, Real, Slug, Text, as_slug, record, shown
from fewstep.schedule import VP

__all__ = [
    "GUIDE",
    "STAGE",
    "Classifier",
    "Spec",
    "card_of",
    "model",
    "parts",
    "schedule_of",
    "spec_of",
]

TIME_SCALE = 1000.0  # consistency models are told 1000 log(sigma) / 4
NULL_CLASS = 1001  # rows of a class embedding whose last one stands for no class
STAGE, GUIDE = "first_stage.", "classifier."  # prefixes of weights
LEAST = 9  # tensors of one block, at least
ROLES = {"eps": "eps prediction", "edm": "EDM's process", "consistency": "a consistency model"}
RHO, POINTS, INDICES = 7, 40, (0, 22, 39)  # of the published sampling of consistency models


@record
class Spec:
    """A network of the family with its process, JSON-ready.

    kind: of the file that it was read from
    role: of the raw output, see the module's docstring
    schedule: ("linear", count, first, last), ("scaled_linear", ...), ("cosine", count), or
        ("betas", ...); empty for networks of EDM's process
    clip: D is held in [-clip, clip]; None where it is free
    scale: a state is `scale` times the first stage's latents
    first_stage: of a latent diffusion
    classifier: of noisy pictures, by which guidance goes then
    how: where the settings that shapes do not say are from
    points, indices: of a consistency model: the Karras grid of so many points, and where on it the
        published sampling stands
    """

    kind: Slug
    unet: ADMConfig
    role: Literal["eps", "edm", "consistency"]
    schedule: tuple[str | float, ...] = ()
    sigma_min: Real = 0.002
    sigma_max: Real = 80.0
    clip: Real | None = None
    scale: Real = 1.0
    first_stage: AutoencoderConfig | None = None
    classifier: ADMConfig | None = None
    how: Text = ""
    points: Int = POINTS
    indices: tuple[Int, ...] = INDICES

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"need 0 < sigma_min < sigma_max, got {self.sigma_min}, {self.sigma_max}"
            )
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")
        if self.classifier is not None and (self.role != "eps" or self.first_stage is not None):
            raise ValueError("classifier goes with guided-diffusion, of pixels and of eps")
        if (self.role == "eps") != bool(self.schedule):
            raise ValueError(f"a schedule goes with role eps, got {self.role!r}")
        rising = all(a < b for a, b in pairwise(self.indices))
        if not (rising and self.points >= 2 and self.indices[0] >= 0):
            raise ValueError(f"indices must rise from 0, got {self.indices} of {self.points}")
        if not len(self.indices) >= 2 or self.indices[-1] >= self.points:
            raise ValueError(f"indices must be below {self.points}, got {self.indices}")

    @property
    def classes(self) -> int:
        """How many classes it knows, no class not counted; else its classifier."""
        if self.classifier is not None and not self.unet.classes:
            return self.classifier.outputs
        rows = self.unet.context_rows
        return rows - (rows == NULL_CLASS) if rows else self.unet.classes

    @property
    def needs_label(self) -> bool:
        """Whether it cannot be used without a class."""
        rows = self.unet.context_rows
        return rows != NULL_CLASS if rows else self.unet.classes > 0


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


def schedule_of(spec: tuple[str | float, ...]) -> VP | None:
    """The table that a Spec names; None where it names none. Errors: ValueError for another."""
    if not spec:
        return None
    name, *numbers = spec
    values = [float(number) for number in numbers]
    if name == "betas":
        return VP.from_betas(values)
    kinds = {"linear": VP.linear, "scaled_linear": VP.scaled_linear, "cosine": VP.cosine}
    if name not in kinds or not values or not 2 <= values[0] <= 100_000:
        raise ValueError(f"schedule must be one of {', '.join(kinds)}, betas, got {spec[:4]!r}")
    return kinds[name](int(values[0]), *values[1:])


def preconditions(spec: Spec) -> Precondition:
    """What makes D of the network."""
    schedule, channels = schedule_of(spec.schedule), spec.unet.channels

    def eps(
        forward: Callable[..., Tensor],
        x: Tensor,
        sigma: Tensor,
        label: Tensor,
        sigma_data: float,
        dtype: torch.dtype,
    ) -> Tensor:
        assert schedule is not None
        x_t = x * per_sample(schedule.alpha(sigma), x)
        out = forward(x_t.to(dtype), schedule.t(sigma).float(), label)[:, :channels]
        return PREDICTIONS["eps"](out.to(x.dtype), x, per_sample(sigma, x))

    def edm(forward: Callable[..., Tensor], x: Tensor, sigma: Tensor, *rest: Any) -> Tensor:
        return denoise(lambda z, c, label: forward(z, TIME_SCALE * c, label), x, sigma, *rest)

    def boundary(
        forward: Callable[..., Tensor],
        x: Tensor,
        sigma: Tensor,
        label: Tensor,
        sigma_data: float,
        dtype: torch.dtype,
    ) -> Tensor:
        level = per_sample(sigma, x)
        above = level - spec.sigma_min
        c_in = torch.rsqrt(level**2 + sigma_data**2)
        c_skip, c_out = sigma_data**2 / (above**2 + sigma_data**2), above * sigma_data * c_in
        t = TIME_SCALE * (sigma.log().float() / 4)
        raw = forward((c_in * x).to(dtype), t, label)
        return torch.addcmul(c_skip * x, c_out, raw.to(x.dtype))

    plain: Any = {"eps": eps, "edm": edm, "consistency": boundary}[spec.role]
    if spec.clip is None:
        return plain
    return lambda *args: plain(*args).clamp(-spec.clip, spec.clip)  # type: ignore[operator]


def card_of(spec: Spec, name: str, weights_sha256: str = "", **about: Any) -> Card:
    """The card of such a model."""
    schedule, stage = schedule_of(spec.schedule), spec.first_stage
    low, high = spec.sigma_min, spec.sigma_max
    if schedule is not None:
        low, high = schedule.sigma_min, schedule.sigma_max
    picture = {
        "size": spec.unet.size * (stage.factor if stage else 1),
        "channels": stage.channels if stage else spec.unet.channels,
    }
    card = Card(
        name=as_slug(name),
        network={**picture, **asdict(spec)},
        summary=f"{spec.kind.replace('-', ' ')}, {ROLES[spec.role]}; settings: {spec.how}",
        classes=tuple(map(str, range(spec.classes))),
        sigma_min=low,
        sigma_max=high,
        sigma_data=1.0 if stage else 0.5,
        feature_module="middle_block",
        weights_sha256=weights_sha256,
        grid="karras" if schedule is None else "trailing",
        end="sigma_min" if schedule is None else "zero",
        about=about,
        kind="adm",
    )
    return replace(card, **_as_published(spec)) if spec.role == "consistency" else card


def spec_of(card: Card) -> Spec:
    """What the card of such a model says of it.

    Raises:
        ValueError: that names the field, where it is none of this kind.
    """
    values = dict(card.network)
    picture = {name: values.pop(name, None) for name in ("size", "channels")}
    try:
        spec = Spec(**values)
        schedule_of(spec.schedule)
    except TypeError as error:
        raise ValueError(f"network: {error}") from None
    if {name: card_of(spec, "x").network[name] for name in picture} != picture:
        raise ValueError(f"size and channels do not go with the network, got {shown(picture)}")
    return spec


def _as_published(spec: Spec) -> dict[str, Any]:
    """How a consistency model is sampled: in one evaluation, or where the published indices stand;
    the last of these is the end of the grid, from which there is no step."""
    high, low = spec.sigma_max ** (1 / RHO), spec.sigma_min ** (1 / RHO)
    grid = [(high + i / (spec.points - 1) * (low - high)) ** RHO for i in spec.indices]
    ways = {"1": (spec.sigma_max, 0.0), str(len(grid) - 1): (*grid[:-1], 0.0)}
    chosen = {nfe: Choice("consistency", grid=levels) for nfe, levels in ways.items()}
    return {"auto": chosen, "screened": {nfe: (choice,) for nfe, choice in chosen.items()}}


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
    schedule = schedule_of(spec.schedule)
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
    return NetworkModel(
        card,
        net,
        {name: value.to(device) for name, value in stats.items()},
        net,
        net.image_shape,
        preconditions(spec),
        torch.compile(net) if compile else None,
        schedule=schedule,
        first_stage=None if stage is None else Latents(stage, spec.scale),
        needs_label=spec.needs_label,
        classifier=classifier,
    )
