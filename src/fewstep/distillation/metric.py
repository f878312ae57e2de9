"""How far a student's clean picture is from its target.

    huber, l2    of pixels or latents
    features     pseudo-Huber of pixels, and on each scale of a feature network the distance of its
                 maps, root mean square, with the channels of a place at unit length

Distances in features are not squared: where the target is one of several good pictures, a few
samples would decide the loss. A network that averages places sees what pixels do not: a blurred
picture is near in pixels and far in features.

Sources: Song & Dhariwal 2023, arXiv:2310.14189, for the pseudo-Huber metric; Zhang et al. 2018
(LPIPS), arXiv:1801.03924, for unit length on several scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.distillation.subpath import LOSSES
from fewstep.models import Model
from fewstep.models.components import latent_scale
from fewstep.networks.features import FeatureNetwork, load_feature_folder, load_feature_network

__all__ = ["Elementwise", "InFeatures", "metric"]

DECODER = "decoder"
PART = 0.1  # of one scale in features, beside pixels
SHIFT = 2.0  # of the means, beside the distance of each picture

Maps = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Elementwise:
    """The mean over a picture of a function of each difference; (estimate, goal) -> [b]."""

    name: str
    digest: str = ""

    def __call__(self, estimate: Tensor, goal: Tensor) -> Tensor:
        return LOSSES[self.name](estimate - goal).flatten(1).mean(1)


@dataclass(frozen=True, eq=False)
class InFeatures:
    """Distances of maps, and pixels beside them; (estimate, goal) -> [b].

    maps: of pictures or latents [b, ...], each [b, c, h, w], or [b, d] of features; differentiable
    digest: a hash of the network's weights
    """

    maps: Maps
    digest: str = ""

    def __call__(self, estimate: Tensor, goal: Tensor) -> Tensor:
        return _apart(estimate, goal, *self._maps(estimate, goal))

    def of_ends(self, estimate: Tensor, goal: Tensor) -> Tensor:
        """The same of ends of paths, [b], and to each the distance of the batch's means on the last
        scale: what all pictures share is little to each of them, and counts in full in a Frechet
        distance."""
        found, wanted = self._maps(estimate, goal)
        shift = _unit(found[-1]).mean(0) - _unit(wanted[-1]).mean(0)
        return _apart(estimate, goal, found, wanted) + SHIFT * PART * _rms(shift.flatten()[None])

    def _maps(self, estimate: Tensor, goal: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        with torch.no_grad():
            wanted = self.maps(goal)
        return self.maps(estimate), wanted


def _apart(
    estimate: Tensor, goal: Tensor, found: Sequence[Tensor], wanted: Sequence[Tensor]
) -> Tensor:
    """[b] of each picture."""
    total = LOSSES["huber"](estimate - goal).flatten(1).mean(1)
    for one, aim in zip(found, wanted, strict=True):
        total = total + PART * _rms((_unit(one) - _unit(aim)).flatten(1))
    return total


def metric(loss: str, model: Model) -> Elementwise | InFeatures:
    """The distance by its name.

    Args:
        loss: huber, l2, decoder, or a feature network by its name or folder
        model: the teacher, whose decoder and pictures are meant

    Raises:
        ValueError: there is no such network, or it does not see the model's states.
        OSError: its folder cannot be read.
    """
    if loss in LOSSES:
        return Elementwise(loss)
    if loss == DECODER:
        return _of_decoder(model)
    start = model.prior([0])
    folder = "/" in loss or Path(loss).is_dir()
    try:
        read = load_feature_folder if folder else load_feature_network
        network = read(loss, str(start.device))
    except ValueError as error:
        raise ValueError(
            f"loss must be huber, l2, decoder, or a feature network by name or folder; {error}"
        ) from None
    try:
        with torch.no_grad():
            network(torch.zeros_like(start))
    except ValueError as error:
        raise ValueError(f"loss {loss} does not go with {model.card.name}: {error}") from None
    return InFeatures(_scales(network), network.card.weights_sha256)


def _scales(network: FeatureNetwork) -> Maps:
    """Its maps and its features."""

    def maps(x: Tensor) -> list[Tensor]:
        return network.scales(x.clamp(-1, 1))

    return maps


def _of_decoder(model: Any) -> InFeatures:
    """The maps that the decoder of a pipeline begins with."""
    vae: Any = getattr(model, "autoencoder", None)
    decoder = getattr(vae, "decoder", None)
    if decoder is None or not hasattr(decoder, "mid_block"):
        raise ValueError(f"{model.card.name} has no decoder of latents; take huber, or a network")
    factor, shift = latent_scale(vae)
    before = vae.post_quant_conv if getattr(vae, "post_quant_conv", None) is not None else _same

    def maps(x: Tensor) -> list[Tensor]:
        latents = (x / factor + shift).to(next(decoder.parameters()).dtype)
        first = decoder.conv_in(before(latents))
        return [first, decoder.mid_block(first)]

    return InFeatures(maps, f"decoder of {model.card.weights_sha256}")


def _unit(maps: Tensor) -> Tensor:
    """Channels of each place at root mean square 1; features as they are."""
    maps = maps.float()
    if maps.ndim == 2:
        return maps
    return maps * torch.rsqrt(maps.square().mean(1, keepdim=True) + 1e-6)


def _rms(gap: Tensor) -> Tensor:
    """[b] of gaps [b, n]; smooth at 0."""
    return gap.square().mean(1).add(1e-8).sqrt()


def _same(x: Tensor) -> Tensor:
    return x
