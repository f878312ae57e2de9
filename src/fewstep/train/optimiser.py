"""Adam over named weights, with its state as named tensors, in 32 bits or in 8."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.extras import needs

__all__ = ["Adam", "Adam8bit", "bitsandbytes", "check_finite", "optimiser"]


class Adam:
    """torch.optim.Adam, or AdamW where there is a weight decay.

    weights: what it moves, by name
    weight_decay: of the weights of two dimensions and more
    fused: its steps are one kernel, which rounds otherwise than several
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        fused: bool = True,
    ) -> None:
        self.weights = dict(weights)
        every = list(self.weights.values())
        parts = [[w for w in every if w.ndim > 1], [w for w in every if w.ndim < 2]]
        groups = [{"params": every}]
        if weight_decay:
            decays = (weight_decay, 0.0)
            groups = [{"params": p, "weight_decay": d} for p, d in zip(parts, decays, strict=True)]
        kind = torch.optim.AdamW if weight_decay else torch.optim.Adam
        self.inner = kind(groups, betas=betas, fused=fused or None)
        for w in every:
            place = w.device if fused else "cpu"
            self.inner.state[w] = {
                "step": torch.zeros((), dtype=torch.float32, device=place),
                "exp_avg": torch.zeros_like(w),
                "exp_avg_sq": torch.zeros_like(w),
            }

    def tensors(self) -> dict[str, Tensor]:
        """The moments and the counters, by name."""
        return {
            f"{kind}.{name}": value
            for name, w in self.weights.items()
            for kind, value in self.inner.state[w].items()
        }

    def clip(self, largest: float) -> float:
        """Scale the gradients to a norm of at most `largest`; returns what it was."""
        return _clip(self.weights, largest)

    def step(self, lr: float) -> None:
        """Move the weights by their gradients, and forget these."""
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()
        self.inner.zero_grad()


class Adam8bit:
    """AdamW of the library bitsandbytes, without decay: both moments in 8 bits, by blocks of 256.

    Weights of fewer than 4,096 numbers have moments in float32. Source: Dettmers et al. 2021,
    arXiv:2110.02861.

    weights: what it moves, by name
    """

    def __init__(
        self, weights: Mapping[str, Tensor], *, betas: tuple[float, float] = (0.9, 0.99)
    ) -> None:
        self.weights = dict(weights)
        every = list(self.weights.values())
        self.inner = bitsandbytes().optim.AdamW8bit(every, betas=betas, weight_decay=0.0)
        (group,) = self.inner.param_groups
        for i, w in enumerate(every):
            self.inner.init_state(group, w, 0, i)
        self.count = torch.zeros((), dtype=torch.int64)

    def tensors(self) -> dict[str, Tensor]:
        """The moments with their scales, and the counter, by name."""
        return {"step": self.count} | {
            f"{kind}.{name}": value
            for name, w in self.weights.items()
            for kind, value in self.inner.state[w].items()
            if kind.startswith(("state", "absmax"))
        }

    def clip(self, largest: float) -> float:
        """As `Adam.clip`."""
        return _clip(self.weights, largest)

    def step(self, lr: float) -> None:
        """As `Adam.step`."""
        for group in self.inner.param_groups:
            group["lr"] = lr
        for w in self.weights.values():
            self.inner.state[w]["step"] = int(self.count)
        self.inner.step()
        self.inner.zero_grad()
        self.count += 1


def optimiser(name: str, weights: Mapping[str, Tensor]) -> Adam | Adam8bit:
    """adam or adamw8bit. Raises: MissingExtra, a ValueError."""
    return Adam8bit(weights) if name == "adamw8bit" else Adam(weights)


def bitsandbytes() -> Any:
    """The library. Raises: MissingExtra where it is not there."""
    with needs("adamw8bit", "optimizer adamw8bit"):
        return importlib.import_module("bitsandbytes")


def _clip(weights: Mapping[str, Tensor], largest: float) -> float:
    return torch.nn.utils.clip_grad_norm_(list(weights.values()), largest).item()


def check_finite(step: int, loss: float, gradient: float = 0.0) -> None:
    """Raises: FloatingPointError where a loss, or the norm of its gradient, is not finite."""
    if not math.isfinite(loss + gradient):
        raise FloatingPointError(
            f"the loss is {loss:g} and its gradient {gradient:g} at step {step + 1}; the last "
            "checkpoint stays, try a lower lr or dtype float32 in another folder"
        )
