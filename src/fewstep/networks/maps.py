"""What networks do with maps [b, c, h, w] beside convolutions: halve, double, and mix channels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["double", "grid_of", "halve", "is_box", "pointwise"]


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1 x 1 convolution, as a product of matrices: on one thread of a CPU, torch's own goes by a
    copy of the map."""
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def halve(x: Tensor, taps: Tensor, pad: int, box: bool) -> Tensor:
    """A map of half the side by a filter [1, 1, k, k]; box: of two equal taps."""
    if box and not pad:
        return F.avg_pool2d(x, 2)
    kernel = taps.to(x.dtype).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(x, kernel, groups=x.shape[1], stride=2, padding=pad)


def double(x: Tensor, taps: Tensor, pad: int, box: bool) -> Tensor:
    """A map of twice the side, as `halve`."""
    if box:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    kernel = (4 * taps).to(x.dtype).expand(x.shape[1], 1, -1, -1)
    return F.conv_transpose2d(x, kernel, groups=x.shape[1], stride=2, padding=pad)


def is_box(taps: tuple[float, ...]) -> bool:
    """Whether a filter is the mean of two neighbours."""
    return len(taps) == 2 and len(set(taps)) == 1


def grid_of(taps: tuple[float, ...]) -> Tensor:
    """The filter of a plane, [1, 1, k, k], whose sum is 1."""
    f = torch.tensor(taps)
    return (f.outer(f) / f.sum() ** 2)[None, None]
