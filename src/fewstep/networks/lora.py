"""Low-rank adapters of a network that stays as it is (LoRA).

    y = W x + scale up(down(x))        down: to `rank` numbers, up: back, at first zero

Several sets of adapters share one network: a call through one of them runs with it, and a call of
the network itself runs without any. So a teacher, a target and a student need one set of frozen
weights. Names, shapes and arithmetic are those of the library peft, which loads what is written.

Source: Hu et al. 2021 (LoRA), arXiv:2106.09685.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["TARGETS", "Adapters", "adapted_modules"]

# the layers of the published LCM-LoRA, and those of transformers; a name ends in one of them
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
    "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip


@dataclass(eq=False)
class Switch:
    """The adapters that are on, if any, and the hooks by which layers ask."""

    active: Adapters | None = None
    hooks: list[Any] = field(default_factory=list)

    @contextmanager
    def on(self, adapters: Adapters | None) -> Iterator[None]:
        before, self.active = self.active, adapters
        try:
            yield
        finally:
            self.active = before


class Adapters(nn.Module):
    """One set of adapters; called as the network is. A copy shares the network.

    Args:
        net: the network, whose weights are not changed
        rank: of the adapters
        targets: ends of the names of the layers that get one
        seed: decides the weights of `down`

    Raises:
        ValueError: a target is the name of no linear or convolutional layer.
    """

    def __init__(self, net: nn.Module, rank: int, targets: Sequence[str], seed: int) -> None:
        super().__init__()
        self.net: Any
        self.__dict__["net"] = net  # not a part: its weights are not those of the adapters
        self.switch, self.rank, self.scale = Switch(), rank, 1.0
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        gen = torch.Generator().manual_seed(seed)
        for name, layer in adapted_modules(net, targets):
            down, up = _shapes(layer, rank)
            bound = 1 / math.sqrt(math.prod(down[1:]))  # that of peft: kaiming uniform, a = sqrt 5
            first = (torch.rand(down, generator=gen) * 2 - 1) * bound
            key = name.replace(".", "/")
            place = next(layer.parameters()).device
            self.down[key] = nn.Parameter(first.to(place))
            self.up[key] = nn.Parameter(torch.zeros(up, device=place))
            hook = layer.register_forward_hook(partial(_add, self.switch, key))
            self.switch.hooks.append(hook)

    def forward(self, *args: Any, **options: Any) -> Any:
        with self.switch.on(self):
            return self.net(*args, **options)

    def plain(self, *args: Any, **options: Any) -> Any:
        """The network's answer without adapters."""
        with self.switch.on(None):
            return self.net(*args, **options)

    def checkpointed(self, module: nn.Module, *args: Any) -> Any:
        """A part of the network, computed again in the backward pass with the same adapters."""
        active = self.switch.active
        return torch.utils.checkpoint.checkpoint(
            module.__call__,
            *args,
            use_reentrant=False,
            context_fn=lambda: (self.switch.on(active), self.switch.on(active)),
        )

    def tensors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(down, up) by the layer's name."""
        keys = list(self.down)
        return {key.replace("/", "."): (self.down[key], self.up[key]) for key in keys}

    def remove(self) -> None:
        """Take the hooks off the network, also for the copies."""
        for hook in self.switch.hooks:
            hook.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        other = self.__class__.__new__(self.__class__)
        nn.Module.__init__(other)
        other.__dict__["net"] = self.net
        other.switch, other.rank, other.scale = self.switch, self.rank, self.scale
        other.down, other.up = copy.deepcopy(self.down, memo), copy.deepcopy(self.up, memo)
        other.training = self.training
        return other


def adapted_modules(net: nn.Module, targets: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The layers whose names end in a target. Raises: ValueError where a given one has none."""
    found, used = [], set()
    for name, layer in net.named_modules():
        ends = [one for one in targets if name == one or name.endswith("." + one)]
        if ends and isinstance(layer, nn.Linear | nn.Conv2d) and getattr(layer, "groups", 1) == 1:
            found.append((name, layer))
            used.update(ends)
    absent = [one for one in targets if one not in used]
    if not found or (absent and tuple(targets) != TARGETS):
        some = ", ".join(sorted({name.rpartition(".")[2] for name, _ in _layers(net)})[:12])
        raise ValueError(
            f"targets must end the names of linear or convolutional layers, got "
            f"{', '.join(absent)}; the network has layers such as {some}"
        )
    return found


def _layers(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    kinds = (nn.Linear, nn.Conv2d)
    return ((name, layer) for name, layer in net.named_modules() if isinstance(layer, kinds))


def _shapes(layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of down and up."""
    if isinstance(layer, nn.Linear):
        return (rank, layer.in_features), (layer.out_features, rank)
    assert isinstance(layer, nn.Conv2d)
    inner = (layer.in_channels, *layer.kernel_size)
    return (rank, *inner), (layer.out_channels, rank, 1, 1)


def _add(switch: Switch, key: str, layer: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
    """What a layer returns, with what the active adapters add."""
    if (active := switch.active) is None:
        return out
    x = args[0]
    down, up = active.down[key].to(x.dtype), active.up[key].to(x.dtype)
    if isinstance(layer, nn.Linear):
        more = F.linear(F.linear(x, down), up)
    else:
        more = F.conv2d(F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation), up)
    return out + active.scale * more.to(out.dtype)
