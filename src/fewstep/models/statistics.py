"""What solvers may use of the data without an evaluation, computed once, when a model is made."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.data.idx import to_unit
from fewstep.networks.preconditioning import denoise
from fewstep.networks.unet import UNet
from fewstep.noise import generator

__all__ = ["data_statistics", "far_means"]

DIRECTIONS = 16  # principal directions kept per class
FAR_DRAWS = 512  # draws behind far_mean: its error is the spread of D at sigma_max over 22


@torch.no_grad()
def far_means(net: UNet, sigma_max: float, sigma_data: float, draws: int = FAR_DRAWS) -> Tensor:
    """Mean over z of D(sigma_max z; sigma_max), for each class and for none, [classes + 1, c, h,
    w]."""
    config, device = net.config, next(net.parameters()).device
    shape = (config.channels, config.size, config.size)
    z = torch.randn(draws, *shape, generator=generator("far means")).to(device)
    means = []
    for row in range(config.classes + 1):
        total = torch.zeros(shape, dtype=torch.float64, device=device)
        for part in z.split(256):
            sigma = part.new_full((len(part),), sigma_max)
            label = torch.full((len(part),), row, device=device)
            total += denoise(net, sigma_max * part, sigma, label, sigma_data).double().sum(0)
        means.append(total / draws)
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
