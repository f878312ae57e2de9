"""Models of the networks of EDM and EDM2: what makes D(x, sigma) of them, and pictures of states.

The 512-pixel models of EDM2 act on latents of Stable Diffusion's autoencoder, each channel moved to
mean 0 and standard deviation 0.5. Guidance by a second network is ref + g (D - ref), where ref is
the second network's D: one without classes, or a weaker one (autoguidance).

Sources: Karras et al. 2022 (EDM), arXiv:2206.00364; Karras et al. 2024 (EDM2), arXiv:2312.02696,
and for autoguidance arXiv:2406.02507.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.card import Card
from fewstep.models.edm_spec import PIXELS_PER_LATENT, Spec, card_of, guide_of, spec_of
from fewstep.models.network import NetworkModel, Precondition, assembled
from fewstep.networks.edm import EDMUNet, narrow
from fewstep.networks.edm2 import EDM2UNet
from fewstep.networks.edm_config import EDMConfig
from fewstep.networks.preconditioning import EDM, IDDPM, VE, VP, Preconditioned

__all__ = ["Latents", "model", "parts"]


@dataclass(frozen=True, eq=False)
class Latents:
    """Latents of Stable Diffusion's autoencoder, each channel moved to mean 0 and spread 0.5.

    net: of diffusers, AutoencoderKL; None where there is none
    """

    net: Any = field(repr=False)
    spec: Spec

    def picture(self, height: int, width: int) -> tuple[int, int, int]:
        return height * PIXELS_PER_LATENT, width * PIXELS_PER_LATENT, 3

    def _whiten(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(values, device=like.device)[:, None, None]
            for values in (self.spec.latent_mean, self.spec.latent_std)
        )
        return mean, self.spec.sigma_data / std

    def _check(self) -> None:
        if self.net is None:
            raise ValueError("its states are latents: give the autoencoder (sd-vae) too, as vae")

    def encode(self, pictures: Tensor) -> Tensor:
        self._check()
        mean, scale = self._whiten(pictures)
        return (self.net.encode(pictures).latent_dist.mean - mean) * scale

    def decode(self, x: Tensor) -> Tensor:
        self._check()
        mean, scale = self._whiten(x)
        return self.net.decode(x / scale + mean).sample


def parts(card: Card, tensors: int) -> dict[str, nn.Module]:
    """The modules of such a model by the prefix of their weights, on the meta device."""
    spec = spec_of(card)
    if len(card.classes) != spec.unet.label_dim:
        raise ValueError(f"{len(card.classes)} class names for {spec.unet.label_dim} classes")
    made: dict[str, nn.Module] = {"": _net(spec)}
    if spec.guide is not None:
        made["guide."] = _net(guide_of(spec))
    if spec.vae is not None:
        made["vae."] = _autoencoder(spec.vae)
    return made


def _net(spec: Spec) -> EDMUNet | EDM2UNet:
    with torch.device("meta"):
        return EDMUNet(spec.unet) if isinstance(spec.unet, EDMConfig) else EDM2UNet(spec.unet)


def _autoencoder(config: Mapping[str, Any]) -> nn.Module:
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError as error:
        raise ValueError(f"an autoencoder needs diffusers: {error}") from None
    with torch.device("meta"):
        return AutoencoderKL.from_config(dict(config))  # type: ignore[return-value]


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
    net = _ready(made[""], spec, device, dtype)
    guide = None
    if spec.guide is not None:
        theirs = guide_of(spec)
        ready = _ready(made["guide."], theirs, device, dtype)
        of_guide = card_of(theirs, f"{card.name}-guide")
        guide = assembled(of_guide, ready, {}, precondition=_precondition(theirs))
    vae = made.get("vae.")
    return assembled(
        card,
        net,
        stats,
        device,
        compile,
        precondition=_precondition(spec),
        first_stage=Latents(vae and vae.to(device).eval(), spec) if spec.latent else None,
        guide=guide,
    )


def _precondition(spec: Spec) -> Precondition:
    """What makes D of the raw network."""
    made: dict[str, Any] = {
        "edm": EDM(),
        "vp": VP(spec.beta_d, spec.beta_min, spec.count),
        "ve": VE(),
        "iddpm": IDDPM(spec.levels),
    }
    return Preconditioned(made[spec.precondition])


def _ready(net: nn.Module, spec: Spec, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    net = net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    net = net.eval().requires_grad_(False)
    if isinstance(net, EDM2UNet):
        return net.prepare(dtype)
    return net if dtype is torch.float32 else narrow(net, dtype)
