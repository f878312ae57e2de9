"""Randomness as a pure function of named keys.

Every draw is addressed by (seed, stream, index): picture i depends on its own seed alone, never on
its batch, its neighbours or what was drawn before, and a resumed run needs no generator state.
Draws are made on the CPU, so every device sees the same bits.

The Brownian path of a seed lives on a dyadic tree over log2(sigma) in [-20, 20]: the value at a
point comes from the bridges down to its leaf, so increments over nested or neighbouring intervals
belong to one path, whatever the grid. Source: the virtual Brownian tree of Li et al. 2020,
arXiv:2001.01328.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

__all__ = ["brownian", "generator", "key", "normal"]

LOW, HIGH = -20.0, 20.0  # log2(sigma): 1e-6 to 1e6
LEVELS = 20  # leaves 4e-5 wide


def key(*parts: SupportsIndex | str) -> int:
    """A 63-bit integer from any sequence of integers and names, the same on every machine."""
    plain = tuple(part if isinstance(part, str) else operator.index(part) for part in parts)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: SupportsIndex | str) -> torch.Generator:
    """A fresh CPU generator at the key of `parts`."""
    return torch.Generator().manual_seed(key(*parts))


def normal(
    seeds: Sequence[int],
    shape: Sequence[int],
    stream: str,
    index: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise, drawn in float32 at (seed, stream, index).

    Args:
        seeds: one per picture
        shape: of one picture
        stream: a name; each stream of a seed is independent of the others ("prior" is the start)
        index: the number of the draw in its stream
        dtype: of the result

    Returns:
        [len(seeds), *shape], on the CPU.
    """
    out = torch.empty(len(seeds), *shape, dtype=torch.float32)
    for row, seed in zip(out, seeds, strict=True):
        row.normal_(generator=generator(seed, stream, index))
    return out.to(dtype)


def brownian(
    seeds: Sequence[int],
    shape: Sequence[int],
    interval: tuple[float, float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Increment of each seed's Brownian path between two noise levels, scaled to unit variance.

    Args:
        seeds: one per picture
        shape: of one picture
        interval: (sigma_from, sigma_to), sigma_from > sigma_to >= 0; the path's clock is
            log2(sigma), held inside [-20, 20]
        dtype: of the result; the path itself is float64

    Returns:
        [len(seeds), *shape], on the CPU.

    Raises:
        ValueError: where the interval does not go from more to less noise
    """
    start, end = (_clock(sigma) for sigma in interval)
    if not start > end:
        raise ValueError(f"interval must go from more to less noise, got {interval}")
    out = torch.stack([_path(seed, shape, start) - _path(seed, shape, end) for seed in seeds])
    return (out / math.sqrt(start - end)).to(dtype)


def _clock(sigma: float) -> float:
    return min(max(math.log2(sigma), LOW), HIGH) if sigma > 0 else LOW


def _path(seed: int, shape: Sequence[int], time: float) -> Tensor:
    """W(time) of one seed, W(LOW) = 0, by bridges down to the leaf and a line across it;
    float64."""

    def draw(*node: int) -> Tensor:
        gen = generator(seed, "brownian", *node)
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    low, high, index = LOW, HIGH, 0
    at_low = torch.zeros(*shape, dtype=torch.float64)
    at_high = math.sqrt(HIGH - LOW) * draw(0, 0)
    for level in range(1, LEVELS + 1):
        middle = (low + high) / 2
        at_middle = (at_low + at_high) / 2 + math.sqrt((high - low) / 4) * draw(level, index)
        if time < middle:
            high, at_high, index = middle, at_middle, 2 * index
        else:
            low, at_low, index = middle, at_middle, 2 * index + 1
    return torch.lerp(at_low, at_high, (time - low) / (high - low))
