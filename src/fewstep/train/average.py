"""The average of the weights: a power-function EMA, whose window grows with the run.

    average += (1 - decay) (weight - average),   decay = (1 - 1 / step)^(gamma + 1)

Source: Karras et al. 2024 (EDM2), arXiv:2312.02696, section 3.1.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Average"]

GAMMA = 16.97  # a window of 5 % of the run so far
Net = TypeVar("Net", bound=nn.Module)


class Average:
    """weights: what is averaged, by name."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = dict(weights)
        self.values = {name: w.detach().clone() for name, w in self.weights.items()}

    def tensors(self) -> dict[str, Tensor]:
        return {f"ema.{name}": value for name, value in self.values.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After update number `step`, counted from 1."""
        decay = (1 - 1 / step) ** (GAMMA + 1)
        for name, value in self.values.items():
            value.lerp_(self.weights[name], 1 - decay)

    def of(self, net: Net) -> Net:
        """A copy of a network with the averages in it, for evaluation."""
        net = copy.deepcopy(net)
        net.load_state_dict(self.values, strict=False)
        return net.eval().requires_grad_(False)
