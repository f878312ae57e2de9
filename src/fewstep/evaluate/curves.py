"""The shape of sampling trajectories: how nearly each one lies on a line, in a plane, in a space.

A trajectory is the solution x_0 .. x_N of the probability flow from noise at sigma_0 down to a
picture at sigma_N, on many points. Each seed's is taken by itself: the principal components of its
own points, every point with the same weight,

    Y = R Q                               y_i = x_i - x_N, [points, pixels];  Q Q^T = 1
    H R = U S V^T                         H = 1 - 1 1^T/points takes the mean off
    share of the first k components       sum_{j<k} S_j^2 / sum_j S_j^2
    distance from their span at point i   sqrt(sum_{j>=k} (U S)_ij^2)
    distance from the straight line       |y_i - y_0 <y_i, y_0> / |y_0|^2|

R is the same curve in as many dimensions as it has points, so nothing depends on the size of a
picture but the making of it, and no distance is squared on the way: the noise at sigma_0 is 10^4
times longer than what is looked for. The same is done with D(x_i; sigma_i), the denoised
trajectory.

That a plane is nearly enough is the observation behind AMED: Zhou et al. 2024, arXiv:2312.00094;
the distance from the straight line is the deviation of Chen et al. 2024, arXiv:2405.11326. A share
of the variance says little by itself, for x is mostly noise and the noise shrinks along a line: the
distances, in pixels, are what a picture would notice.

What is exact, and tested: trajectories of an isotropic Gaussian are straight; those of a Gaussian
with k distinct variances have k components; a data set of n points gives n, of which its denoised
trajectory has n - 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.solving import iterate

__all__ = ["COMPONENTS", "Curves", "measure", "positive", "trace"]

COMPONENTS = 3  # line, plane, space: as far as distances and coordinates go
SPECTRUM = 8  # shares are kept of so many
COLUMNS = 2**14  # pixels taken together, in float64


@dataclass(frozen=True, eq=False)
class Curves:
    """n curves of p points each, and their shapes.

    points: relative to the last one and in an orthonormal basis of each curve's own, [n, p, p],
        float64
    norms: |x_i| of the points themselves, [n, p]
    size: d, the numbers in a point as it was

    All distances are Euclidean; over sqrt(size) they are root mean squares per pixel.
    """

    points: np.ndarray
    norms: np.ndarray
    size: int

    @cached_property
    def _components(self) -> tuple[np.ndarray, np.ndarray]:
        """(variances [n, p], falling; coordinates along them about the mean [n, p, p])."""
        u, s, _ = np.linalg.svd(self.points - self.points.mean(1, keepdims=True))
        return s**2, u * s[:, None]

    @property
    def shares(self) -> np.ndarray:
        """Shares of the variance, [n, k], k up to 8; a curve that stays where it is has all of it
        in its first."""
        values = self._components[0]
        total = values.sum(1, keepdims=True)
        still = np.eye(1, values.shape[1])
        return np.where(total > 0, values / positive(total), still)[:, :SPECTRUM]

    @property
    def cumulative(self) -> np.ndarray:
        """Shares of the first component, the first two, ..., [n, k]."""
        return self.shares.cumsum(1).clip(max=1)

    @property
    def coordinates(self) -> np.ndarray:
        """Along the first 3 components, from the last point, [n, p, 3].

        An axis points to where the curve reaches out farthest, for the sign of a component means
        nothing.
        """
        along = self._components[1][:, :, :COMPONENTS]
        along = along - along[:, -1:]
        farthest = np.abs(along).argmax(1)[:, None]
        return along * np.where(np.take_along_axis(along, farthest, 1) < 0, -1, 1)

    @property
    def from_span(self) -> np.ndarray:
        """Distances from the mean plus the span of the first 1, 2 and 3 components, [n, 3, p]."""
        along = self._components[1]
        return np.stack(
            [np.linalg.norm(along[:, :, k:], axis=2) for k in range(1, COMPONENTS + 1)], axis=1
        )

    @property
    def from_line(self) -> np.ndarray:
        """Distances from the straight line through the two ends, [n, p]."""
        way = self.points[:, 0] / positive(self.chord)[:, None]
        along = np.einsum("npq,nq->np", self.points, way)
        return np.linalg.norm(self.points - along[:, :, None] * way[:, None], axis=2)

    @property
    def chord(self) -> np.ndarray:
        """Distance between the two ends, [n]."""
        return np.linalg.norm(self.points[:, 0], axis=1)

    @property
    def length(self) -> np.ndarray:
        """Along the points, [n]."""
        return np.linalg.norm(np.diff(self.points, axis=1), axis=2).sum(1)

    @property
    def distances(self) -> np.ndarray:
        """Root mean squares per pixel, [n, 4, p]: from the straight line, then as `from_span`."""
        both = np.concatenate([self.from_line[:, None], self.from_span], axis=1)
        return both / math.sqrt(self.size)

    @property
    def relative(self) -> np.ndarray:
        """The same distances over |x_i|, [n, 4, p]: a relative projection error, after that of
        AMED's authors, who look at the span of two components."""
        return self.distances * math.sqrt(self.size) / positive(self.norms)[:, None]


def positive(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, 1)


def trace(
    denoiser: Denoiser,
    x_T: Tensor,
    solver: str,
    sigmas: Sequence[float],
    report: Callable[[int], None] = lambda points: None,
) -> tuple[Tensor, Tensor]:
    """Whole trajectories: x and D(x; sigma) at every level, each [b, points, d] on the CPU.

    D costs nothing where the solver evaluates at its accepted states, except at the last.
    Runs in the caller's grad mode.

    Args:
        x_T: the start at sigmas[0], [b, ...]
        sigmas: strictly decreasing, all > 0
        report: called with the number of points done after each
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def watched(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append((x, denoiser(x, sigma)))
        return seen[-1][1]

    def denoised(x: Tensor, sigma: float) -> Tensor:
        known = [output for state, output in seen if state is x]
        return known[0] if known else denoiser(x, x.new_full((len(x),), sigma))

    x = x_T if x_T.dtype == torch.float64 else x_T.float()
    shape = (len(x), len(sigmas), math.prod(x.shape[1:]))
    states, outputs = torch.empty(shape, dtype=x.dtype), torch.empty(shape, dtype=x.dtype)
    states[:, 0] = x.flatten(1)
    for i, state in enumerate(iterate(watched, x, solver, grid=sigmas)):
        outputs[:, i] = denoised(x, sigmas[i]).flatten(1)
        seen.clear()
        x = state.x
        states[:, i + 1] = x.flatten(1)
        report(i + 1)
    outputs[:, -1] = denoised(x, sigmas[-1]).flatten(1)
    report(len(sigmas))
    return states, outputs


@torch.no_grad()
def measure(points: Tensor) -> Curves:
    """The shapes of curves given point by point, [n, p, ...]; the memory it takes is a constant and
    n p^2 numbers."""
    if points.ndim < 3 or points.shape[1] < 2:
        raise ValueError(f"points must be [n, 2 or more, ...], got {list(points.shape)}")
    rows = points.flatten(2)
    n, p, size = rows.shape
    square = torch.zeros(n, p, dtype=torch.float64)
    triangle = torch.zeros(n, p, p, dtype=torch.float64)  # R^T, of the columns so far
    for part in rows.split(COLUMNS, dim=2):
        part = part.double()
        square += part.square().sum(2)
        both = torch.cat([triangle, (part - part[:, -1:]).mT], dim=1)
        triangle = torch.linalg.qr(both, mode="r").R
    return Curves(triangle.mT.numpy(), square.sqrt().numpy(), size)
