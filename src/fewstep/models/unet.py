"""Models of the built-in kind of network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fewstep.models.card import Card
from fewstep.models.network import NetworkModel, assembled
from fewstep.networks.unet import UNet
from fewstep.networks.unet_config import UNetConfig

__all__ = ["model", "parts"]

NEEDS = ("far_mean", "mean", "basis", "variances", "rest")  # statistics beside the weights
TENSORS = 10  # of one block of the network, at least


def parts(card: Card, tensors: int) -> dict[str, nn.Module]:
    """The network that the card describes, without memory.

    Raises:
        ValueError: where a file of so many tensors cannot hold it.
    """
    config = UNetConfig(**card.network)
    if 2 * TENSORS * config.blocks * len(config.widths) > tensors:
        raise ValueError(
            f"blocks is {config.blocks} at {len(config.widths)} widths, and the file has "
            f"{tensors} tensors"
        )
    if len(card.classes) != config.classes:
        raise ValueError(f"{len(card.classes)} class names for {config.classes} classes")
    with torch.device("meta"):  # takes no memory and draws no random numbers
        return {"": UNet(config)}


def model(
    card: Card,
    made: Mapping[str, nn.Module],
    stats: Mapping[str, Tensor],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
) -> NetworkModel:
    """The model that samples, of the network with its weights."""
    net = made[""].to(device).eval().requires_grad_(False)
    for value in net.parameters():  # the table of frequencies stays float32
        value.data = value.data.to(dtype)
    return assembled(card, net, stats, device, compile)
