"""Guidance by something beside the network: a classifier of noisy states, or a second network.

Sources: Dhariwal and Nichol 2021, arXiv:2105.05233; Karras et al. 2024 (autoguidance),
arXiv:2406.02507.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fewstep.denoiser import Evaluation, Wrapper, calls_per_eval, per_sample

__all__ = ["ByNetwork", "ClassGradient", "ClassGuided"]


class ClassGradient(Protocol):
    """grad_x log p(label | x, sigma) by a classifier of noisy states."""

    def gradient(self, x: Tensor, sigma: Tensor, label: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class ClassGuided(Wrapper):
    """D + scale sigma^2 grad_x log p(label | x, sigma), which asks the classifier at each call.

    Attributes:
        scale: a float, or one number per sample, [b]
        label: [b], or [1] for all
    """

    denoiser: Any
    classifier: ClassGradient
    scale: float | Tensor
    label: Tensor

    @property
    def calls_per_eval(self) -> int:
        return 1 + calls_per_eval(self.denoiser)

    @property
    def far_mean(self) -> None:
        return None

    def evaluate(
        self, inner: Evaluation, x: Tensor, sigma: Tensor, *conditions: Any
    ) -> tuple[Tensor, Any]:
        denoised, features = inner(x, sigma, *conditions)
        slope = self.classifier.gradient(x, sigma, self.label.expand(len(x)))
        level = per_sample(sigma, x) ** 2 * per_sample(self.scale, x)
        return denoised + level * slope.to(denoised), features


@dataclass(frozen=True, eq=False)
class ByNetwork(Wrapper):
    """Guidance by a second network: ref + scale (D - ref), ref what the second one says.

    Attributes:
        denoiser: D(x, sigma)
        guide: the second network's, which has its condition bound
        scale: a float, or one number per sample, [b]
    """

    denoiser: Any
    guide: Any
    scale: float | Tensor

    @property
    def calls_per_eval(self) -> int:
        return calls_per_eval(self.denoiser) + calls_per_eval(self.guide)

    @property
    def far_mean(self) -> None:
        return None

    def evaluate(self, inner: Evaluation, x: Tensor, sigma: Tensor) -> tuple[Tensor, Any]:
        denoised, features = inner(x, sigma)
        ref = self.guide(x, sigma)
        return ref + per_sample(self.scale, x) * (denoised - ref), features
