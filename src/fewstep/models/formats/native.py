"""Our own folders: `card.json` and `model.safetensors`, for networks of the kind unet.

The weights file also has, for each class and last for no class, what solvers may use that costs
no evaluation:

    stats.far_mean     mean of D(sigma_max z; sigma_max) over z          [classes + 1, c, h, w]
    stats.mean         mean of the data                                  [classes + 1, c h w]
    stats.basis        leading principal directions of the data, rows    [classes + 1, k, c h w]
    stats.variances    variances along them                              [classes + 1, k]
    stats.rest         mean of the other variances                       [classes + 1]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from fewstep.files import file_hash, write_json, write_whole
from fewstep.models.card import CARD_FILE, WEIGHTS_FILE, Card
from fewstep.models.network import NetworkModel
from fewstep.networks.device import check_device, check_dtype
from fewstep.networks.taps import has_module
from fewstep.networks.unet import UNet
from fewstep.networks.unet_config import UNetConfig
from fewstep.tensors import Entry, load_tensors, read_header

__all__ = ["load_folder", "save_folder"]

KINDS = ("unet",)
TENSORS = 10  # of one block of the network, at least


def load_folder(
    folder: Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    compile: bool = False,
) -> NetworkModel:
    """Read a model folder. Nothing in it is executed: JSON and safetensors only.

    Raises:
        ValueError: where a file is missing, cut short, or does not go with the card.
    """
    kind, place = check_dtype(dtype), check_device(device)
    card = Card.read(folder)
    if card.kind not in KINDS:
        raise ValueError(
            f"{folder} holds a model of kind {card.kind!r}, this version knows: {', '.join(KINDS)}"
        )
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has a card but no {WEIGHTS_FILE}; fetch it again")
    if card.weights_sha256 and file_hash(path) != card.weights_sha256:
        raise ValueError(
            f"{path} is not the file that its card names (SHA-256 differs); fetch it again"
        )
    header = read_header(path)
    try:
        net = _network(card, header)
        config = net.config
        _check_statistics(header, config)
        if len(card.classes) != config.classes:
            raise ValueError(f"{len(card.classes)} class names for {config.classes} classes")
        if card.feature_module and not has_module(net, card.feature_module):
            raise ValueError(f"feature_module {card.feature_module!r} is no module of the network")
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not go with its card: {reason}") from None
    tensors = {name: tensor.float() for name, tensor in load_tensors(path).items()}
    stats = {n.removeprefix("stats."): t for n, t in tensors.items() if n.startswith("stats.")}
    # the table of frequencies stays float32
    weights = {n: t.to(kind) for n, t in tensors.items() if not n.startswith("stats.")}
    net.load_state_dict(weights, assign=True)
    net = net.to(place).eval().requires_grad_(False)
    # float16 in the file: orthonormal again
    stats["basis"] = torch.linalg.qr(stats["basis"].mT).Q.mT.contiguous()
    stats = {name: t.to(place) for name, t in stats.items()}
    compiled = torch.compile(net) if compile else None
    return NetworkModel(card, net, stats, net, net.image_shape, compiled=compiled)


def save_folder(folder: Path, card: Card, net: UNet, stats: Mapping[str, Tensor]) -> Card:
    """Write weights as float16 and the card, each whole; returns the card with the weights'
    hash."""
    tensors = {
        name: value.detach().half().contiguous().cpu() for name, value in net.state_dict().items()
    }
    tensors |= {f"stats.{name}": value.half().contiguous().cpu() for name, value in stats.items()}
    write_whole(folder / WEIGHTS_FILE, safetensors.torch.save(tensors))
    card = replace(card, weights_sha256=file_hash(folder / WEIGHTS_FILE), folder=folder)
    write_json(folder / CARD_FILE, card.to_dict())
    return card


def _network(card: Card, header: Mapping[str, Entry]) -> UNet:
    """The network that the card describes, without memory.

    Raises:
        ValueError: the weights file does not hold what it needs.
    """
    config = UNetConfig(**card.network)
    if 2 * TENSORS * config.blocks * len(config.widths) > len(header):
        raise ValueError(
            f"blocks is {config.blocks} at {len(config.widths)} widths, and the file has "
            f"{len(header)} tensors"
        )
    with torch.device("meta"):  # takes no memory and draws no random numbers
        net = UNet(config)
    wanted = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    found = {n: entry.shape for n, entry in header.items() if not n.startswith("stats.")}
    _check_shapes(wanted, found)
    return net


def _check_shapes(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"{name} must have shape {wanted.get(name, 'none, as there is no such tensor')}, "
                f"got {found.get(name, 'none')}"
            )


def _check_statistics(header: Mapping[str, Entry], config: UNetConfig) -> None:
    """Raise ValueError where a tensor named stats.* is missing or of another shape than the
    module's docstring says."""
    found = {name: entry.shape for name, entry in header.items() if name.startswith("stats.")}
    rows, picture = config.classes + 1, (config.channels, config.size, config.size)
    pixels, variances = math.prod(picture), found.get("stats.variances", ())
    k = min(variances[-1] if variances else 0, pixels)
    wanted = {
        "stats.far_mean": (rows, *picture),
        "stats.mean": (rows, pixels),
        "stats.basis": (rows, k, pixels),
        "stats.variances": (rows, k),
        "stats.rest": (rows,),
    }
    _check_shapes(wanted, {name: found[name] for name in wanted if name in found})
