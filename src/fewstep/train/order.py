"""Which pictures a step sees: a function of (seed, step), so a resumed run needs no state."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.noise import generator

__all__ = ["batch_indices"]


def batch_indices(
    count: int, batch: int, seed: int, step: int, *, name: str = "epoch", whole: bool = False
) -> Tensor:
    """Indices of one step: walks through one fresh permutation of the data after another.

    Args:
        count: of the data.
        name: of the stream of permutations.
        whole: leave out the rest of a permutation that is less than a batch.

    Returns:
        int64, [batch].
    """
    parts, found = [], 0
    each = count - count % batch if whole else count
    while found < batch:
        epoch, offset = divmod(step * batch + found, each)
        order = torch.randperm(count, generator=generator(seed, name, epoch))[:each]
        parts.append(order[offset : offset + batch - found])
        found += len(parts[-1])
    return torch.cat(parts)
