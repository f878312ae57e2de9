"""What is to know of a network of EDM or EDM2 without building it: its Spec and its card.

It imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from fewstep.models.card import Card
from fewstep.networks.edm_config import EDM2Config, EDMConfig
from fewstep.records import Int, Real, Text, as_slug, record, shown

__all__ = ["Spec", "card_of", "guide_of", "spec_of"]

LOW, HIGH = 0.002, 80.0  # levels of the published sampling, as far as a network's range has them
TAP = 8  # side of the map whose encoder's block AMED reads: block 3, or 2 with classes
PIXELS_PER_LATENT = 8
LATENT_MEAN = (5.81, 3.25, 0.12, -2.15)  # of the latents that EDM2 was trained on
LATENT_STD = (4.17, 4.62, 3.71, 3.28)


@record
class Spec:
    """A network with its preconditioning, JSON-ready.

    unet: of the kind edm or edm2
    precondition: makes D of the raw network
    beta_d, beta_min, epsilon_t, count: of VP
    levels: of iDDPM's table
    sigma_min, sigma_max: the range of the network itself, as far as it is bounded
    half: whether the published sampling runs it in float16
    latent: whether states are latents, with this mean and spread of each channel before
    vae: the configuration of its autoencoder, where states are latents and it is there
    guide: of the second network, where guidance goes by one
    how: where its settings are from
    """

    unet: EDMConfig | EDM2Config
    precondition: Literal["edm", "vp", "ve", "iddpm"] = "edm"
    sigma_data: Real = 0.5
    sigma_min: Real = 0.0
    sigma_max: Real | None = None
    beta_d: Real = 19.9
    beta_min: Real = 0.1
    epsilon_t: Real = 1e-5
    count: Int = 1000
    levels: tuple[Real, ...] = ()
    half: bool = False
    latent: bool = False
    latent_mean: tuple[Real, ...] = LATENT_MEAN
    latent_std: tuple[Real, ...] = LATENT_STD
    vae: dict[str, Any] | None = None
    guide: dict[str, Any] | None = None
    how: Text = ""

    def __post_init__(self) -> None:
        if not (self.sigma_data > 0 and self.beta_d > 0 and self.count > 1):
            raise ValueError("sigma_data and beta_d must be positive, and count at least 2")
        if self.precondition == "iddpm":
            falls = all(a > b >= 0 for a, b in zip(self.levels, self.levels[1:], strict=False))
            if not (3 <= len(self.levels) <= 100_001 and falls):
                raise ValueError("levels must strictly decrease to 0, at least 3 of them")
        channels = {self.unet.img_channels}
        if self.latent and {len(self.latent_mean), len(self.latent_std)} != channels:
            raise ValueError(f"latents have {self.unet.img_channels} channels")
        if self.latent and not min(self.latent_std) > 0:
            raise ValueError(f"latent_std must be positive, got {self.latent_std}")
        low, high = self.range
        if not 0 < low < high:
            raise ValueError(f"it has no level between {LOW} and {HIGH}: its own are {low}, {high}")

    @property
    def kind(self) -> str:
        return "edm" if isinstance(self.unet, EDMConfig) else "edm2"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of a state."""
        return self.unet.img_channels, self.unet.img_resolution, self.unet.img_resolution

    @property
    def range(self) -> tuple[float, float]:
        """The levels that sampling uses: those of the published sampling that the network has."""
        low, high = self.sigma_min, self.sigma_max
        if self.precondition == "vp":
            low, high = (
                math.expm1(0.5 * self.beta_d * t**2 + self.beta_min * t) ** 0.5
                for t in (self.epsilon_t, 1.0)
            )
        elif self.precondition == "iddpm":
            low, high = self.levels[-2], self.levels[0]
        return max(low, LOW), HIGH if high is None else min(high, HIGH)


def card_of(spec: Spec, name: str, weights_sha256: str = "", **about: Any) -> Card:
    """The card of such a model."""
    unet, latent = spec.unet, spec.latent
    size = unet.img_resolution * (PIXELS_PER_LATENT if latent else 1)
    what = "EDM2" if spec.kind == "edm2" else getattr(unet, "model_type", "")
    low, high = spec.range
    return Card(
        name=as_slug(name),
        network={"size": size, "channels": 3 if latent else unet.img_channels, **asdict(spec)},
        summary=f"{what} with {spec.precondition} preconditioning; settings: {spec.how}",
        classes=tuple(map(str, range(unet.label_dim))),
        sigma_min=low,
        sigma_max=high,
        sigma_data=spec.sigma_data,
        feature_module=tap(unet),
        weights_sha256=weights_sha256,
        about=about,
        kind=spec.kind,
    )


def tap(unet: EDMConfig | EDM2Config) -> str:
    """The encoder's block at 8 x 8, whose output AMED reads, as far as there is one; else its
    last."""
    prefix = "" if isinstance(unet, EDMConfig) else "unet."
    sides = [side for side, _ in unet.levels]
    side = TAP if TAP in sides else sides[-1]
    block = min(2 if unet.label_dim else 3, unet.num_blocks - 1)
    last = f"block{block}" if unet.num_blocks else "conv" if side == sides[0] else "down"
    return f"{prefix}enc.{side}x{side}_{last}"


def spec_of(card: Card) -> Spec:
    """What the card of such a model says of it.

    Raises:
        ValueError: that names the field, where it is none of this kind.
    """
    values = {name: v for name, v in card.network.items() if name not in ("size", "channels")}
    spec = _spec(card.kind, values)
    wanted = card_of(spec, "x").network
    if any(wanted[name] != card.network.get(name) for name in ("size", "channels")):
        raise ValueError(f"size and channels do not go with the network of {shown(card.name)}")
    return spec


def _spec(kind: str, values: Mapping[str, Any]) -> Spec:
    unet = values.get("unet")
    if not isinstance(unet, dict):
        raise ValueError("network.unet must be a table")
    make: Any = EDMConfig if kind == "edm" else EDM2Config
    try:
        return Spec(**{**values, "unet": make(**unet)})
    except TypeError as error:
        raise ValueError(f"network: {error}") from None


def guide_of(spec: Spec) -> Spec:
    """The Spec of the second network."""
    assert spec.guide is not None
    values = dict(spec.guide)
    guide = _spec(values.pop("kind", spec.kind), values)
    theirs, ours = (one.shape for one in (guide, spec))
    if theirs != ours:
        raise ValueError(f"a guide's states must have shape {ours}, got {theirs}")
    if guide.unet.label_dim not in (0, spec.unet.label_dim):
        raise ValueError(
            f"a guide must have no classes, or the network's {spec.unet.label_dim}, got "
            f"{guide.unet.label_dim}"
        )
    return guide
