"""Denoisers: the protocol that every solver sees, and the wrappers that make them of networks.

A denoiser is any callable D(x, sigma) = E[x_0 | x], x = x_0 + sigma eps in EDM space. With x_t =
alpha x and t the network's own time for sigma, the published kinds of prediction give

    eps     D = x - sigma eps_net(x_t, t)
    v       D = x / (1 + sigma^2) - v_net(x_t, t) sigma / sqrt(1 + sigma^2)
    x0      D = x0_net(x_t, t)
    flow    D = x_t - t v_net(x_t, t)

Wrappers go from the inside out: prediction, guidance (one batched call), thresholding, counter:

    Counted(Thresholded(Guided(Predicted(net, schedule, "eps"), 7.5, cond, uncond)))

Sources: Karras et al. 2022 (EDM), arXiv:2206.00364; v by Salimans & Ho 2022, arXiv:2202.00512;
guidance by Ho & Salimans 2022, arXiv:2207.12598; dynamic thresholding by Saharia et al. 2022
(Imagen), arXiv:2205.11487.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, overload

import torch
from torch import Tensor

from fewstep.arguments import function, number
from fewstep.schedule import Schedule

__all__ = [
    "Condition",
    "Covariance",
    "Denoiser",
    "Evaluation",
    "Wrapper",
    "Predicted",
    "Bound",
    "Guided",
    "Thresholded",
    "threshold",
    "Clipped",
    "Counted",
    "OPTIONAL",
    "PREDICTIONS",
    "calls_per_eval",
    "per_sample",
]

Level = float | Tensor
Condition = Any  # a tensor batched along dim 0, or a tuple, list or dict of conditions
Evaluation = Callable[..., tuple[Tensor, Any]]  # (x, sigma, *conditions) -> (D, features)


class Denoiser(Protocol):
    """The role: D(x, sigma). A plain function fills it.

    It is called with noisy images x in EDM units, [b, ...], and their noise level sigma, [b], above
    0. It returns D, [b, ...]. It may also have the attributes below. Each is absent where it is not
    known, and far_mean may be None.

    Attributes:
        sigma_min (float): the lowest level at which it may be called
        sigma_max (float): the highest level at which it may be called
        schedule (Schedule): the network's schedule
        far_mean (Tensor): the mean of D at sigma_max over x, which is the mean of the data; [1,
            ...] or [b, ...]
        with_features (Callable): (x, sigma) -> (D, features), at the cost of one evaluation
        covariance (Covariance): of the data, along its leading principal directions
        calls_per_eval (int): how often the network sees each sample in one evaluation; 1 where
            absent
    """

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor: ...


OPTIONAL = (
    *("sigma_min", "sigma_max", "schedule", "far_mean", "covariance", "with_features"),
    "calls_per_eval",
)


@dataclass(frozen=True, eq=False)
class Covariance:
    """That of the data: variances along some directions, and one across them.

    basis: orthonormal rows, [r, k, d] with d the size of a sample; r is 1, or the batch
    variances: along these rows, [r, k]
    rest: along every other direction, [r]
    """

    basis: Tensor
    variances: Tensor
    rest: Tensor

    def __getitem__(self, rows: slice) -> Covariance:
        """That of some samples of the batch."""
        if len(self.basis) == 1:
            return self
        return Covariance(self.basis[rows], self.variances[rows], self.rest[rows])

    def between(self, x: Tensor, end: Tensor, sigma: Level, to: Level) -> Tensor:
        """The state at `to` on the path that goes through x at sigma and ends in `end`.

            x_to = end + sum_i u_i kept_i <u_i, x - end>
            kept_i = (root(to) - c) / (root(sigma) - c)      root(s)^2 = c^2 + s^2

        with c^2 the i-th variance, and so on across the directions with rest. Exact on Gaussian
        data of this covariance.

        Args:
            x, end: [b, ...]
            sigma, to: floats or [b]; sigma > 0

        Returns:
            Like x.
        """
        gap = (x - end).flatten(1)  # [b, d]
        basis = self.basis.to(gap)
        along, across = (
            _kept(variances.to(x.device), *(_column(level) for level in (sigma, to)))
            for variances in (self.variances, self.rest[:, None])
        )
        parts = torch.einsum("rkd,bd->bk" if len(basis) == 1 else "bkd,bd->bk", basis, gap)
        parts = (along - across).to(gap) * parts
        back = torch.einsum("bk,rkd->bd" if len(basis) == 1 else "bk,bkd->bd", parts, basis)
        return end + (across.to(gap) * gap + back).reshape(x.shape)


def _kept(variances: Tensor, sigma: Any, to: Any) -> Tensor:
    """(root(to) - c) / (root(sigma) - c) without the differences, [r, k], float64."""
    v = variances.double()
    c = v.sqrt()
    low = (v + to**2).sqrt() + c
    # where the data have no spread it is the chord, to / sigma, and 0 at 0
    return (to / sigma) ** 2 * ((v + sigma**2).sqrt() + c) / torch.where(low > 0, low, 1.0)


def _column(level: Level) -> Any:
    """A float as it is; [b] -> [b, 1], float64."""
    return level.double().reshape(-1, 1) if isinstance(level, Tensor) else level


class Wrapper(ABC):
    """Abstract: a denoiser around `self.denoiser`, with the optional attributes of that.

    A wrapper says once what it does to an evaluation, with features or without: in `change`, where
    it turns D into another D, or in `evaluate` in general. Further arguments of a call, the
    conditions, go to the wrapped denoiser.
    """

    denoiser: Any

    def evaluate(
        self, inner: Evaluation, x: Tensor, sigma: Tensor, *conditions: Condition
    ) -> tuple[Tensor, Any]:
        """(D, features), by way of `inner`, which is called as the wrapped denoiser is."""
        denoised, features = inner(x, sigma, *conditions)
        return self.change(denoised), features

    def change(self, denoised: Tensor) -> Tensor:
        """D as seen from outside; far_mean changes with it."""
        return denoised

    def __call__(self, x: Tensor, sigma: Tensor, /, *conditions: Condition) -> Tensor:
        def inner(*args: Any) -> tuple[Tensor, Any]:
            return self.denoiser(*args), None

        return self.evaluate(inner, x, sigma, *conditions)[0]

    def __getattr__(self, name: str) -> Any:
        """Only for what the wrapper itself lacks: the inner attribute as seen from outside."""
        if name not in OPTIONAL:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = getattr(self.denoiser, name)
        if value is None:
            return None
        if name == "with_features":
            return partial(self.evaluate, value)
        return self.change(value) if name == "far_mean" else value


PREDICTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    # (network output, x, sigma [b, 1, ...]) -> D;   for flow x_t - t v = (x - sigma v)/(1 + sigma)
    "eps": lambda out, x, sigma: x - sigma * out,
    "v": lambda out, x, sigma: x / (1 + sigma**2) - out * (sigma / torch.sqrt(1 + sigma**2)),
    "x0": lambda out, x, sigma: out,
    "flow": lambda out, x, sigma: (x - sigma * out) / (1 + sigma),
}

ALPHA_AT_ONE = {"v": math.sqrt(0.5), "flow": 0.5}  # what these formulas take alpha(sigma = 1) to be


@dataclass(frozen=True, eq=False)
class Predicted(Wrapper):
    """A denoiser from a raw network, denoiser(x_t, t) -> prediction.

    Attributes:
        denoiser: the network, called with x_t = alpha x, [b, ...], its own time t, float [b], and
            any further arguments of the call, such as a condition. Where it has with_features(x_t,
            t) -> (prediction, features), so has the result.
        schedule: t <-> sigma and alpha; also gives sigma_min and sigma_max
        prediction: "eps", "v", "x0" or "flow"; v needs a VP schedule, flow a flow schedule
        time_scale: the network is told time_scale * t; 1000 for Stable Diffusion 3 and similar
        round_time: tell it the nearest integer instead, as int64. The noise level is not rounded,
            so D changes in jumps with it. Use this with fixed plans only.
        dtype: cast x_t to this dtype for the network, whose answer comes back in the dtype of x. t
            keeps that of sigma: bfloat16 cannot count to 1000.
        far_mean: see Denoiser
    """

    denoiser: Any
    schedule: Schedule
    prediction: str
    time_scale: float = 1.0
    round_time: bool = False
    dtype: torch.dtype | None = None
    far_mean: Tensor | None = None

    def __post_init__(self) -> None:
        function("denoiser", self.denoiser, "denoiser(x_t, t)")
        if not hasattr(self.schedule, "alpha"):
            raise ValueError(
                f"schedule must be one of fewstep.schedule, such as VP.linear(), got "
                f"{self.schedule!r:.80}"
            )
        if self.prediction not in tuple(PREDICTIONS):
            raise ValueError(
                f"prediction must be one of {', '.join(PREDICTIONS)}, got {self.prediction!r}"
            )
        alpha = self.schedule.alpha(1.0)
        if not math.isclose(ALPHA_AT_ONE.get(self.prediction, alpha), alpha, rel_tol=1e-6):
            raise ValueError(
                f"prediction={self.prediction!r} does not go with {self.schedule!r}: v belongs to "
                "VP schedules, flow to flow schedules"
            )

    @property
    def sigma_min(self) -> float:
        return self.schedule.sigma_min

    @property
    def sigma_max(self) -> float:
        return self.schedule.sigma_max

    def evaluate(
        self, inner: Evaluation, x: Tensor, sigma: Tensor, *conditions: Condition
    ) -> tuple[Tensor, Any]:
        x_t = x * per_sample(self.schedule.alpha(sigma), x)
        t = self.schedule.t(sigma) * self.time_scale
        t = t.round().long() if self.round_time else t
        out, features = inner(x_t if self.dtype is None else x_t.to(self.dtype), t, *conditions)
        return PREDICTIONS[self.prediction](out.to(x.dtype), x, per_sample(sigma, x)), features


@dataclass(frozen=True, eq=False)
class Bound(Wrapper):
    """A conditional denoiser, denoiser(x, sigma, condition), with its condition filled in.

    Attributes:
        far_mean: the mean of D at sigma_max under that condition, where known
        covariance: of the data under that condition, where known
    """

    denoiser: Any
    condition: Condition
    far_mean: Tensor | None = None
    covariance: Covariance | None = None

    def evaluate(self, inner: Evaluation, x: Tensor, sigma: Tensor) -> tuple[Tensor, Any]:
        return inner(x, sigma, self.condition)


@dataclass(frozen=True, eq=False)
class Guided(Wrapper):
    """Classifier-free guidance, D_u + scale (D_c - D_u), in one batched call of 2b samples.

    Features are those of the conditional half.

    Attributes:
        denoiser: called as denoiser(x, sigma, condition); the conditional half comes first
        scale: a float, or one number per sample, [b]; 1 is the conditional denoiser at twice its
            price
        cond: the two conditions, alike in structure: a tensor batched along dim 0 (b rows, or one
            for all), or a tuple, list or dict of these
        uncond: see `cond`
        far_means: the means of D_c and D_u at sigma_max, where known; far_mean is then guided like
            D. Without them it is the inner denoiser's, for every condition.
    """

    denoiser: Any
    scale: float | Tensor
    cond: Condition
    uncond: Condition
    far_means: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        function("denoiser", self.denoiser, "denoiser(x, sigma, condition)")
        if not isinstance(self.scale, Tensor):
            number("scale", self.scale)
        _check_conditions(self.cond, self.uncond)

    @property
    def calls_per_eval(self) -> int:
        return 2 * calls_per_eval(self.denoiser)

    @property
    def far_mean(self) -> Tensor | None:
        if self.far_means is None:
            return getattr(self.denoiser, "far_mean", None)
        return self._guide(*self.far_means)

    def evaluate(
        self, inner: Evaluation, x: Tensor, sigma: Tensor, *conditions: Condition
    ) -> tuple[Tensor, Any]:
        count = x.shape[0]
        both = _join(self.cond, self.uncond, count)
        out, features = inner(torch.cat([x, x]), torch.cat([sigma, sigma]), both, *conditions)
        return self._guide(out[:count], out[count:]), _first(features, count)

    def _guide(self, cond: Tensor, uncond: Tensor) -> Tensor:
        scale = self.scale
        if isinstance(scale, Tensor):
            scale = per_sample(scale.to(cond.device), cond)
        return uncond + scale * (cond - uncond)


@dataclass(frozen=True, eq=False)
class Thresholded(Wrapper):
    """Dynamic thresholding of D, per sample: clip to [-s, s] and scale by limit / s.

    s is the quantile of |D| over a sample, or `limit` where that is larger, so that a sample
    within the limit is left alone. The quantile lies linearly between order statistics. Where
    limit is not 1, published code divides by s alone, which also shrinks or swells samples within
    the limit; ours does not.

    far_mean is thresholded too, with its dim 0 read as the batch.
    """

    denoiser: Any
    quantile: float = 0.995  # default of LuChengTHU/dpm-solver
    limit: float = 1.0

    def __post_init__(self) -> None:
        function("denoiser", self.denoiser, "D(x, sigma)")
        if not 0 < number("quantile", self.quantile) <= 1:
            raise ValueError(f"quantile must lie in (0, 1], got {self.quantile}")
        if not number("limit", self.limit) > 0:
            raise ValueError(f"limit must be > 0, got {self.limit}")

    def change(self, denoised: Tensor) -> Tensor:
        return threshold(denoised, self.quantile, self.limit)


def threshold(denoised: Tensor, quantile: float, limit: float = 1.0) -> Tensor:
    """D [b, ...], thresholded as `Thresholded` says."""
    size = denoised.abs().flatten(1)  # [b, d]
    place = quantile * (size.shape[1] - 1)
    rank, weight = int(place), place % 1
    # the largest few only: torch.quantile sorts everything, and refuses more than 2^24 numbers
    largest = size.topk(size.shape[1] - rank, dim=1).values
    above = largest[:, -2] if largest.shape[1] > 1 else largest[:, -1]
    s = per_sample(torch.lerp(largest[:, -1], above, weight).clamp(min=limit), denoised)
    return denoised.clamp(-s, s) * (limit / s)


@dataclass(frozen=True, eq=False)
class Clipped(Wrapper):
    """D held in [low, high], element by element; far_mean too."""

    denoiser: Any
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        function("denoiser", self.denoiser, "D(x, sigma)")
        if not number("low", self.low) < number("high", self.high):
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")

    def change(self, denoised: Tensor) -> Tensor:
        return denoised.clamp(self.low, self.high)


class Counted(Wrapper):
    """Counts what goes through it, with features or without; the outermost wrapper.

    evaluations: calls of this denoiser
    network_calls: the same times calls_per_eval, so two per evaluation under guidance
    """

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = function("denoiser", denoiser, "D(x, sigma)")
        self.evaluations = 0
        self.network_calls = 0

    def evaluate(
        self, inner: Evaluation, x: Tensor, sigma: Tensor, *conditions: Condition
    ) -> tuple[Tensor, Any]:
        self.evaluations += 1
        self.network_calls += calls_per_eval(self.denoiser)
        return inner(x, sigma, *conditions)


def calls_per_eval(denoiser: Any) -> int:
    """Network calls, as samples, that one evaluation costs."""
    return getattr(denoiser, "calls_per_eval", None) or 1


@overload
def per_sample(value: Tensor, x: Tensor) -> Tensor: ...
@overload
def per_sample(value: float | Tensor, x: Tensor) -> float | Tensor: ...
def per_sample(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number for each sample, [b], shaped to multiply x and in its dtype; a float stays one."""
    return value.to(x).reshape(-1, *[1] * (x.ndim - 1)) if isinstance(value, Tensor) else value


def _check_conditions(cond: Condition, uncond: Condition) -> None:
    """Raise ValueError unless both are tensors, or tuples, lists or dicts of them, alike."""
    kinds = (Mapping, tuple | list, Tensor)
    kind = next((kind for kind in kinds if isinstance(cond, kind)), None)
    if kind is None or not isinstance(uncond, kind):
        raise ValueError(
            "cond and uncond must be tensors, or tuples, lists or dicts of tensors, alike in "
            f"structure, got {type(cond).__name__} and {type(uncond).__name__}"
        )
    if isinstance(cond, Mapping):
        if cond.keys() != uncond.keys():
            raise ValueError(f"cond has keys {list(cond)}, uncond {list(uncond)}: they must agree")
        pairs = [(cond[key], uncond[key]) for key in cond]
    elif isinstance(cond, tuple | list):
        if len(cond) != len(uncond):
            raise ValueError(f"cond has {len(cond)} parts, uncond {len(uncond)}: they must agree")
        pairs = list(zip(cond, uncond, strict=True))
    else:
        return
    for pair in pairs:
        _check_conditions(*pair)


def _join(cond: Condition, uncond: Condition, count: int) -> Condition:
    """Two conditions of `count` rows as one of twice as many, leaf by leaf."""
    if isinstance(cond, Mapping):
        return {key: _join(cond[key], uncond[key], count) for key in cond}
    if isinstance(cond, tuple | list):
        return tuple(_join(c, u, count) for c, u in zip(cond, uncond, strict=True))
    return torch.cat([_rows(cond, count), _rows(uncond, count)])


def _rows(condition: Tensor, count: int) -> Tensor:
    if condition.shape[0] not in (1, count):
        raise ValueError(
            f"a condition needs one row, or one for each of {count} samples, got "
            f"{condition.shape[0]}"
        )
    return condition.expand(count, *condition.shape[1:])


def _first(features: Any, count: int) -> Any:
    """The first `count` rows of every tensor in a tree of features; None has none."""
    if features is None:
        return None
    if isinstance(features, Mapping):
        return {key: _first(value, count) for key, value in features.items()}
    if isinstance(features, tuple | list):
        return tuple(_first(value, count) for value in features)
    return features[:count]
