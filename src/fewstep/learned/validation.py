"""Validation of a learned solver, and what is asked of a denoiser before any work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.learned.predictor import feature_count
from fewstep.loop import starts_at
from fewstep.noise import normal
from fewstep.solving import solve

__all__ = [
    "Conditions",
    "Imitated",
    "Noise",
    "Prior",
    "Ruler",
    "count_features",
    "look_at",
    "split",
]

Conditions = Callable[[Sequence[int]], Denoiser]
Prior = Callable[[Sequence[int]], Tensor]
Exact = Callable[[Denoiser, Tensor, range], Tensor]  # where the ODE ends from these starts


@dataclass(frozen=True)
class Noise:
    """Starts by seed, in float32 on the device."""

    shape: tuple[int, ...]
    sigma: float
    device: torch.device
    prior: Prior | None

    def __call__(self, seeds: Sequence[int]) -> Tensor:
        if self.prior is None:
            return (self.sigma * normal(seeds, self.shape, "prior")).to(self.device)
        x = self.prior(seeds).to(self.device)
        if x.shape != (len(seeds), *self.shape):
            raise ValueError(f"prior must return {[len(seeds), *self.shape]}, got {list(x.shape)}")
        return x


@dataclass(frozen=True)
class Imitated:
    """What the denoiser of a student's solver imitates: a consistency function follows no ODE of
    its own, so the target is the end of its teacher's.

    teacher: from seeds to the teacher's denoiser with their conditions
    levels: on which the student spends the budget without a solver of its own
    """

    teacher: Conditions
    levels: tuple[float, ...]


class Ruler:
    """Validation: the distance of a solver's ends to fine solves of the same seeds."""

    @torch.no_grad()
    def __init__(
        self,
        bound: Conditions,
        noise: Noise,
        seeds: range,
        exact: Exact,
        batch: int,
        features: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.features = features
        self.parts: list[tuple[Denoiser, Tensor, Tensor]] = []
        for part in split(seeds, batch):
            denoiser, x_T = bound(part), noise(part)
            try:
                end = exact(denoiser, x_T, part)
            except FloatingPointError as error:
                raise FloatingPointError(
                    f"{error}; try dtype float32, or another guidance"
                ) from None
            self.parts.append((denoiser, x_T, end.to(x_T.device)))

    def mean_at(self, sigma: float) -> bool:
        """Whether the mean of D is known there, as the analytic first step "mean" needs it."""
        denoiser = self.parts[0][0]
        top = getattr(denoiser, "sigma_max", None)
        known = getattr(denoiser, "far_mean", None) is not None
        return known and (top is None or starts_at(sigma, top))

    @torch.no_grad()
    def measure(self, method: Any) -> dict[str, float]:
        """Distances of a solver's ends to the fine solves; the solver by name, plan or method.

        Returns:
            "error", the mean over the seeds of each one's root mean square distance, and, where the
            loss is taken in features, "features", the same there; infinite where not a number.
        """
        spaces = {"error": lambda x: x, **({"features": self.features} if self.features else {})}
        found = {name: [] for name in spaces}
        for denoiser, x_T, exact in self.parts:
            x = solve(denoiser, x_T, method)
            for name, space in spaces.items():
                gap = (space(x) - space(exact)).double().square().flatten(1)
                found[name].append(gap.mean(1).sqrt())
        means = {name: torch.cat(each).mean().item() for name, each in found.items()}
        return {name: mean if math.isfinite(mean) else math.inf for name, mean in means.items()}


def split(seeds: range, size: int) -> list[range]:
    return [seeds[start : start + size] for start in range(0, len(seeds), size)]


@torch.no_grad()
def count_features(denoiser: Denoiser, x: Tensor, sigma: float) -> int:
    """Evaluate once; how many features there are.

    Raises:
        ValueError: for what is no denoiser.
    """
    level, count = x.new_full((len(x),), sigma), 0
    with_features = getattr(denoiser, "with_features", None)
    if with_features is not None:
        denoised, features = with_features(x, level)
        count = feature_count(features)
    else:
        denoised = denoiser(x, level)
    if not isinstance(denoised, Tensor) or denoised.shape != x.shape:
        got = list(denoised.shape) if isinstance(denoised, Tensor) else type(denoised).__name__
        raise ValueError(
            f"the denoiser must return D of the shape of x, {list(x.shape)}, got {got}"
        )
    if not torch.isfinite(denoised).all():
        raise ValueError(f"the denoiser returns NaN or infinity at sigma {sigma:g}")
    return count


@torch.enable_grad()
def look_at(denoiser: Denoiser, x: Tensor, sigma: float, slope: bool) -> Tensor:
    """D, in float32 on the CPU. slope: whether its gradient is needed.

    Raises:
        ValueError: no gradient goes through.
    """
    x = x.detach().clone().requires_grad_(slope)
    denoised = denoiser(x, x.new_full((len(x),), sigma))
    if slope:
        graph = denoised.requires_grad
        found = torch.autograd.grad(denoised.sum(), x, allow_unused=True) if graph else (None,)
        if found[0] is None:
            raise ValueError(
                "no gradient goes through the denoiser: it must run outside torch.no_grad and "
                "torch.inference_mode, and detach neither x nor D"
            )
    return denoised.detach().float().cpu().clone()
