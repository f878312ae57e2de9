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
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.denoiser import PREDICTIONS, per_sample
from fewstep.models.card import Card, Choice
from fewstep.models.network import NetworkModel, Precondition
from fewstep.networks.adm import ADM, ADMConfig, Encoder, cast_torso
from fewstep.networks.autoencoder import Autoencoder
from fewstep.networks.preconditioning import denoise
from fewstep.records import Int, Real, Slug, as_slug, record
from fewstep.schedule import VP

__all__ = ["Classifier", "Network", "Spec", "as_model", "card_of", "schedule_of"]

TIME_SCALE = 1000.0  # consistency models are told 1000 log(sigma) / 4
NULL_CLASS = 1001  # rows of a class embedding whose last one stands for no class
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
    points: Int = POINTS
    indices: tuple[Int, ...] = INDICES


@dataclass(frozen=True, eq=False)
class Network:
    """What a file of the family holds.

    first_stage: of a latent diffusion
    embedder: rows for each class, the context of a class-conditional latent diffusion
    how: where the settings that shapes do not say are from
    """

    spec: Spec
    net: ADM = field(repr=False)
    first_stage: Autoencoder | None = field(default=None, repr=False)
    embedder: Tensor | None = field(default=None, repr=False)
    how: str = ""

    @property
    def classes(self) -> int:
        """How many classes it knows, no class not counted."""
        if self.embedder is not None:
            return len(self.embedder) - (len(self.embedder) == NULL_CLASS)
        return self.spec.unet.classes

    @property
    def has_null(self) -> bool:
        """Whether it can be used without a class."""
        if self.embedder is not None:
            return len(self.embedder) == NULL_CLASS
        return self.spec.unet.classes == 0


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


def card_of(network: Network, name: str, weights_sha256: str = "", **about: Any) -> Card:
    """The card of such a model."""
    spec, schedule = network.spec, schedule_of(network.spec.schedule)
    stage = network.first_stage
    side = spec.unet.size * (stage.config.factor if stage else 1)
    channels = stage.config.channels if stage else spec.unet.channels
    low, high = spec.sigma_min, spec.sigma_max
    if schedule is not None:
        low, high = schedule.sigma_min, schedule.sigma_max
    values = asdict(spec)
    first = {"first_stage": asdict(stage.config)} if stage else {}
    rows = {"embedder": list(network.embedder.shape)} if network.embedder is not None else {}
    card = Card(
        name=as_slug(name),
        network={"size": side, "channels": channels, **values, **first, **rows},
        summary=f"{spec.kind.replace('-', ' ')}, {spec.role}, {network.how}",
        classes=tuple(map(str, range(network.classes))),
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


def _as_published(spec: Spec) -> dict[str, Any]:
    """How a consistency model is sampled: in one evaluation, or where the published indices stand;
    the last of these is the end of the grid, from which there is no step."""
    high, low = spec.sigma_max ** (1 / RHO), spec.sigma_min ** (1 / RHO)
    grid = [(high + i / (spec.points - 1) * (low - high)) ** RHO for i in spec.indices]
    ways = {"1": (spec.sigma_max, 0.0), str(len(grid) - 1): (*grid[:-1], 0.0)}
    chosen = {nfe: Choice("consistency", grid=levels) for nfe, levels in ways.items()}
    return {"auto": chosen, "screened": {nfe: (choice,) for nfe, choice in chosen.items()}}


def as_model(
    network: Network,
    card: Card,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    classifier: Classifier | None = None,
    stats: Mapping[str, Tensor] | None = None,
) -> NetworkModel:
    """The model that samples; the network is moved and cast in place."""
    spec, net = network.spec, network.net.to(device)
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if dtype is not torch.float32:
        cast_torso(net, dtype)
    forward: Callable[..., Tensor] = partial(_plain, net)
    called = torch.compile(net) if compile else None
    compiled = None if called is None else partial(_plain, called)
    if network.embedder is not None:
        table = network.embedder.to(device)
        forward = partial(_in_context, net, table)
        compiled = None if called is None else partial(_in_context, called, table)
    elif spec.unet.classes:
        forward, compiled = net, called
    latents = None
    if (stage := network.first_stage) is not None:
        latents = Latents(stage.to(device), spec.scale)
    unet = spec.unet
    return NetworkModel(
        card,
        net,
        dict(stats or {}),
        forward,
        (unet.channels, unet.size, unet.size),
        preconditions(spec),
        compiled,
        schedule=schedule_of(spec.schedule),
        first_stage=latents,
        needs_label=not network.has_null,
        classifier=classifier,
    )


def _plain(net: Callable[..., Tensor], x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """A network without classes."""
    return net(x, t)


def _in_context(
    net: Callable[..., Tensor], table: Tensor, x: Tensor, t: Tensor, label: Tensor
) -> Tensor:
    """A network whose context is one token, the row of the class."""
    return net(x, t, None, table[label][:, None])
