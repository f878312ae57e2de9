"""Our own folders: `card.json` and `model.safetensors`, for networks of every kind.

The weights file also has, for each class and last for no class, what solvers may use that costs
no evaluation:

    stats.far_mean     mean of D(sigma_max z; sigma_max) over z          [classes + 1, c, h, w]
    stats.mean         mean of the data                                  [classes + 1, c h w]
    stats.basis        leading principal directions of the data, rows    [classes + 1, k, c h w]
    stats.variances    variances along them                              [classes + 1, k]
    stats.rest         mean of the other variances                       [classes + 1]
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.files import file_hash, write_json
from fewstep.models.card import CARD_FILE, WEIGHTS_FILE, Card
from fewstep.models.network import NetworkModel
from fewstep.networks.device import check_device, check_dtype
from fewstep.networks.taps import has_module
from fewstep.tensors import Entry, load_tensors, read_header, write_tensors

__all__ = [
    "KINDS",
    "STATISTICS",
    "check_shapes",
    "fill",
    "kind_of",
    "laid_out",
    "load_folder",
    "save_folder",
    "shapes_of",
    "write_folder",
]

# kind of a card: the module with
#     parts(card, tensors)    its networks on the meta device, by what the names of their weights
#                             begin with; "" is the network, whose `image_shape` is a sample's
#     model(card, parts, stats, device, dtype, compile)    the model, once they have their weights
KINDS = {
    "unet": "fewstep.models.unet",
    "adm": "fewstep.models.adm",
    "edm": "fewstep.models.edm",
    "edm2": "fewstep.models.edm",
}
STATISTICS = "stats."


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
    arithmetic, place = check_dtype(dtype), check_device(device)
    card = Card.read(folder)
    try:
        kind = kind_of(card)
    except ValueError as error:
        raise ValueError(f"{folder} {error}") from None
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has a card but no {WEIGHTS_FILE}; fetch it again")
    if card.weights_sha256 and file_hash(path) != card.weights_sha256:
        raise ValueError(
            f"{path} is not the file that its card names (SHA-256 differs); fetch it again"
        )
    header = read_header(path)
    try:
        parts = kind.parts(card, len(header))
        check_shapes(shapes_of(parts), {n: e.shape for n, e in header.items() if not _is_stat(n)})
        _check_statistics(
            header, parts[""].image_shape, len(card.classes), getattr(kind, "NEEDS", ())
        )
        if card.feature_module and not has_module(parts[""], card.feature_module):
            raise ValueError(f"feature_module {card.feature_module!r} is no module of the network")
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not go with its card: {reason}") from None
    # file by file float32, then the kind's own arithmetic
    tensors = {name: tensor.float() for name, tensor in load_tensors(path).items()}
    fill(parts, tensors)
    stats = {n.removeprefix(STATISTICS): t for n, t in tensors.items() if _is_stat(n)}
    if "basis" in stats:  # float16 in the file: orthonormal again
        stats["basis"] = torch.linalg.qr(stats["basis"].mT).Q.mT.contiguous()
    return kind.model(card, parts, stats, place, arithmetic, compile)


def save_folder(
    folder: Path,
    card: Card,
    net: nn.Module | Mapping[str, nn.Module],
    stats: Mapping[str, Tensor],
) -> Card:
    """Write weights as float16 and the card, each whole; returns the card with the weights' hash.

    Args:
        folder: of the model
        card: of the model
        net: the network, or the networks by what the names of their weights begin with
        stats: the statistics that the module's docstring lists
    """
    parts = net if isinstance(net, Mapping) else {"": net}
    values = {
        prefix + name: value
        for prefix, one in parts.items()
        for name, value in one.state_dict().items()
    }
    values |= {STATISTICS + name: value for name, value in stats.items()}
    values = dict(sorted(values.items()))
    layout = {name: Entry("F16", tuple(value.shape)) for name, value in values.items()}
    return write_folder(folder, card, layout, values.items)


def write_folder(
    folder: Path,
    card: Card,
    layout: Mapping[str, Entry],
    values: Callable[[], Iterable[tuple[str, Tensor]]],
) -> Card:
    """Write weights one at a time, and the card; returns it with the weights' hash.

    Raises:
        OSError: where the folder cannot be written.
        ValueError: as `fewstep.tensors.write_tensors`.
    """
    write_tensors(folder / WEIGHTS_FILE, layout, values)
    card = replace(card, weights_sha256=file_hash(folder / WEIGHTS_FILE), folder=folder)
    write_json(folder / CARD_FILE, card.to_dict())
    return card


def fill(parts: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Give networks their weights, which are in `tensors` by prefix and name."""
    for prefix, net in parts.items():
        net.load_state_dict({n: tensors[prefix + n] for n in net.state_dict()}, assign=True)


def laid_out(value: Tensor) -> Tensor:
    """A weight as networks keep it, float32 and channels last, so that none is there twice."""
    value = value.float()
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value


def kind_of(card: Card) -> Any:
    """The module of a card's kind.

    Raises:
        ValueError: where this version knows none.
    """
    if card.kind not in KINDS:
        raise ValueError(
            f"holds a model of kind {card.kind!r}, this version knows: {', '.join(KINDS)}"
        )
    return importlib.import_module(KINDS[card.kind])


def _is_stat(name: str) -> bool:
    return name.startswith(STATISTICS)


def shapes_of(parts: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights of some networks, by prefix and name."""
    return {
        prefix + name: tuple(value.shape)
        for prefix, net in parts.items()
        for name, value in net.state_dict().items()
    }


def check_shapes(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ValueError that names the first tensor whose shape is not as it must be."""
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"{name} must have shape {wanted.get(name, 'none, as there is no such tensor')}, "
                f"got {found.get(name, 'none')}"
            )


def _check_statistics(
    header: Mapping[str, Entry], shape: tuple[int, ...], classes: int, needs: Sequence[str]
) -> None:
    """Raise ValueError where a tensor named stats.* is unknown, or of another shape than the
    module's docstring says, and where one of those that the kind needs is missing."""
    found = {name: entry.shape for name, entry in header.items() if _is_stat(name)}
    rows, pixels, variances = classes + 1, math.prod(shape), found.get("stats.variances", ())
    k = min(variances[-1] if variances else 0, pixels)
    wanted = {
        "stats.far_mean": (rows, *shape),
        "stats.mean": (rows, pixels),
        "stats.basis": (rows, k, pixels),
        "stats.variances": (rows, k),
        "stats.rest": (rows,),
    }
    names = {*found, *(STATISTICS + name for name in needs)}
    check_shapes({name: wanted.get(name, ()) for name in names}, found)
