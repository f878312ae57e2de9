"""One denoiser for samples that were asked for apart: each row has its own condition and guidance.

With B samples, G of them guided, the network sees B + G rows in one call:

    D_i = D(x_i, sigma_i, c_i)                      without guidance
    D_i = D_u + w_i (D(x_i, sigma_i, c_i) - D_u)    with it; D_u from the rows behind the first B
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.denoiser import Bound, Denoiser, Evaluation, Guided, Wrapper, per_sample

__all__ = ["Share", "rows_per_sample", "together"]


class Share(NamedTuple):
    """Some samples of a request.

    denoiser: of the whole request, conditions filled in
    start, count: which of its samples
    """

    denoiser: Any
    start: int
    count: int


@dataclass(frozen=True, eq=False)
class Joint(Wrapper):
    """Samples with unlike conditions, some of them guided.

    Attributes:
        denoiser: called as denoiser(x, sigma, condition)
        condition: of B samples, then the unconditional ones of the guided samples
        guided: which samples are guided, [G]; None where none is
        scale: their guidance, [G]
    """

    denoiser: Any
    condition: Any
    guided: Tensor | None = None
    scale: Tensor | None = None

    def evaluate(self, inner: Evaluation, x: Tensor, sigma: Tensor) -> tuple[Tensor, Any]:
        if self.guided is None or self.scale is None:
            return inner(x, sigma, self.condition)
        rows = torch.cat([x, x[self.guided]])
        levels = torch.cat([sigma, sigma[self.guided]])
        out, features = inner(rows, levels, self.condition)
        cond, uncond = out[: len(x)], out[len(x) :]
        scale = per_sample(self.scale, x)
        guided = uncond + scale * (cond[self.guided] - uncond)
        features = features[: len(x)] if isinstance(features, Tensor) else features
        return cond.index_copy(0, self.guided, guided), features


def rows_per_sample(denoiser: Denoiser) -> int:
    """Rows of the network's batch that a sample takes: 2 under guidance."""
    return 2 if isinstance(_peeled(denoiser)[1], Guided) else 1


def together(shares: Sequence[Share]) -> Any:
    """D(x, sigma) of all samples, the first share's first.

    Args:
        shares: of requests to one model
    """
    wrappers, _ = _peeled(shares[0].denoiser)
    leaves = [_peeled(share.denoiser)[1] for share in shares]
    if not all(isinstance(leaf, Bound | Guided) for leaf in leaves):
        return shares[0].denoiser  # a network without conditions: the same for all
    conds = [
        _part(leaf.cond if isinstance(leaf, Guided) else leaf.condition, share)
        for leaf, share in zip(leaves, shares, strict=True)
    ]
    unconds, places, scales, place = [], [], [], 0
    device = _device(conds[0])  # a scale may be a plain number
    for leaf, share in zip(leaves, shares, strict=True):
        if isinstance(leaf, Guided):
            unconds.append(_part(leaf.uncond, share))
            places += range(place, place + share.count)
            scale = torch.as_tensor(leaf.scale, dtype=torch.float32).reshape(-1)
            scales.append(_rows(scale.to(device, non_blocking=True), share))
        place += share.count
    joint = Joint(_network([leaf.denoiser for leaf in leaves], shares), _joined(conds + unconds))
    if places:
        rows = torch.tensor(places).to(device, non_blocking=True)
        joint = replace(joint, guided=rows, scale=torch.cat(scales))
    found: Any = joint
    for wrapper in reversed(wrappers):
        found = replace(wrapper, denoiser=found)
    return found


def _peeled(denoiser: Any) -> tuple[list[Any], Any]:
    """The wrappers around what binds the condition, outermost first, and that."""
    wrappers: list[Any] = []
    while isinstance(denoiser, Wrapper) and not isinstance(denoiser, Bound | Guided):
        wrappers.append(denoiser)
        denoiser = denoiser.denoiser  # type: ignore[attr-defined]
    return wrappers, denoiser


def _network(networks: Sequence[Any], shares: Sequence[Share]) -> Any:
    """The conditional denoiser of all; a network that is told numbers is told each sample's."""
    first: Any = networks[0]
    tapped = isinstance(first, Wrapper) and hasattr(first.denoiser, "told")
    inner: list[Any] = [one.denoiser for one in networks] if tapped else list(networks)
    told = [getattr(one, "told", None) for one in inner]
    if told[0] is None:
        return first
    rows = [_rows(one, share) for one, share in zip(told, shares, strict=True)]  # type: ignore[arg-type]
    all_told: Any = replace(inner[0], told=torch.cat(rows))
    return replace(first, denoiser=all_told) if tapped else all_told  # type: ignore[arg-type]


def _part(condition: Any, share: Share) -> Any:
    """The rows of a share, of every tensor in a condition."""
    if isinstance(condition, Mapping):
        return {name: _part(leaf, share) for name, leaf in condition.items()}
    if isinstance(condition, tuple | list):
        return tuple(_part(leaf, share) for leaf in condition)
    return _rows(condition, share)


def _rows(leaf: Tensor, share: Share) -> Tensor:
    if len(leaf) == 1:
        return leaf.expand(share.count, *leaf.shape[1:])
    return leaf[share.start : share.start + share.count]


def _device(condition: Any) -> torch.device | None:
    """Of the first tensor in a condition; None where there is none."""
    while not isinstance(condition, Tensor):
        leaves = list(condition.values()) if isinstance(condition, Mapping) else condition
        if not leaves:
            return None
        condition = leaves[0]
    return condition.device


def _joined(conditions: Sequence[Any]) -> Any:
    """Conditions that are alike in structure as one, row after row."""
    first = conditions[0]
    if isinstance(first, Mapping):
        return {name: _joined([one[name] for one in conditions]) for name in first}
    if isinstance(first, tuple):
        return tuple(_joined(leaves) for leaves in zip(*conditions, strict=True))
    return torch.cat(list(conditions))
