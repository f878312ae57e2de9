"""Adam over named weights, with its state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["Adam", "check_finite"]


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
        return torch.nn.utils.clip_grad_norm_(list(self.weights.values()), largest).item()

    def step(self, lr: float) -> None:
        """Move the weights by their gradients, and forget these."""
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()
        self.inner.zero_grad()


def check_finite(step: int, loss: float, gradient: float = 0.0) -> None:
    """Raises: FloatingPointError where a loss, or the norm of its gradient, is not finite."""
    if not math.isfinite(loss + gradient):
        raise FloatingPointError(
            f"the loss is {loss:g} and its gradient {gradient:g} at step {step + 1}; the last "
            "checkpoint stays, try a lower lr or dtype float32 in another folder"
        )
