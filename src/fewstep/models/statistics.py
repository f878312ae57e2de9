"""What solvers may use of the data without an evaluation, computed once, when a model is made."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.data.idx import to_unit
from fewstep.noise import generator

__all__ = ["data_statistics", "far_means"]

DIRECTIONS = 16  # principal directions kept per class
PART = 256 * 32**2  # numbers of a batch
FAR_DRAWS = 512  # draws behind far_mean: its error is the spread of D at sigma_max over 22


@torch.no_grad()
def far_means(
    denoise: Callable[[Tensor, Tensor, Tensor], Tensor],
    shape: tuple[int, ...],
    classes: int,
    sigma_max: float,
    draws: int = FAR_DRAWS,
    device: torch.device | str = "cpu",
    report: Callable[[int, int], None] = lambda done, count: None,
    none: bool = True,
) -> Tensor:
    """Mean over z of D(sigma_max z; sigma_max), for each class and for none, [classes + 1, *shape].

    Args:
        denoise: D(x, sigma, label)
        shape: of one sample
        classes: how many there are
        sigma_max: the level
        draws: of z
        device: where the denoiser computes
        report: called after each class with what is done, of how many
        none: whether the denoiser knows no class; else the mean of all classes stands there
    """
    z = torch.randn(draws, *shape, generator=generator("far means")).to(device)
    most = max(1, PART // math.prod(shape))
    means, rows = [], classes + 1 if none else classes
    for row in range(rows):
        total = torch.zeros(shape, dtype=torch.float64, device=device)
        for part in z.split(most):
            sigma = part.new_full((len(part),), sigma_max)
            label = torch.full((len(part),), row, device=device)
            total += denoise(sigma_max * part, sigma, label).double().sum(0)
        means.append(total / draws)
        report(row + 1, rows)
    if not none:
        means.append(torch.stack(means).mean(0))
    return torch.stack(means).float()


def data_statistics(images: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
    """Mean, leading principal directions and variances of the data, for each class and for all
    together.

    Keys mean, basis, variances, rest, as in the module's docstring.

    Args:
        images: uint8 [n, c, h, w]
        labels: [n]
    """
    rows: dict[str, list[Tensor]] = {"mean": [], "basis": [], "variances": [], "rest": []}
    for row in range(classes + 1):
        chosen = images if row == classes else images[labels == row]
        x = to_unit(chosen).flatten(1).double()
        values, vectors = torch.linalg.eigh(torch.cov(x.T))
        rows["mean"].append(x.mean(0))
        rows["basis"].append(vectors[:, -DIRECTIONS:].T.flip(0))
        rows["variances"].append(values[-DIRECTIONS:].flip(0))
        rows["rest"].append(values[:-DIRECTIONS].mean())
    return {name: torch.stack(parts).float() for name, parts in rows.items()}
