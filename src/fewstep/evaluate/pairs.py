"""Two sets of feature vectors compared row with row, with error bars; numpy in float64 only.

    KID     MMD^2 with k(x, y) = (x.y / d + 1)^3, unbiased: it may be negative
    precision, recall     the share of one set inside the k-nearest-neighbour balls of the other

They see at most MOST_ROWS rows of a set, chosen by a hash of the picture's index.

Sources: Binkowski et al. 2018, arXiv:1801.01401 (KID); Kynkaanniemi et al. 2019, arXiv:1904.06991
(precision and recall).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fewstep.evaluate.statistics import MOST_ROWS, Estimate, Rows, check_features

__all__ = ["kid", "precision_recall"]

TILE = 1000  # rows of a kernel or distance matrix at a time


def kid(features_a: ArrayLike, features_b: ArrayLike) -> Estimate:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3, over all pairs, and its standard error.

    features: [n, d] and [m, d], n and m >= 3; of more than MOST_ROWS rows, a keyed choice
    The error is the delete-one jackknife's over both sets; where the two sets are of one
    distribution it is too large by about sqrt(2). Published KIDs are often means over subsets of
    1000 pictures: the same quantity with more noise.
    """
    x, y = _some(features_a), _some(features_b)
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < 3:
        raise ValueError(
            f"KID takes features [n, d] and [m, d], n and m at least 3, got {x.shape}, {y.shape}"
        )
    n, m = len(x), len(y)
    xx, yy, xy, yx = _kernel_sums(x, x), _kernel_sums(y, y), _kernel_sums(x, y), np.zeros(m)
    xx -= _kernel(np.square(x).sum(axis=1), x.shape[1])
    yy -= _kernel(np.square(y).sum(axis=1), x.shape[1])
    yx += _kernel_sums(y, x)
    value = _mmd(xx.sum(), yy.sum(), xy.sum(), n, m)
    without_x = _mmd(xx.sum() - 2 * xx, yy.sum(), xy.sum() - xy, n - 1, m)
    without_y = _mmd(xx.sum(), yy.sum() - 2 * yy, xy.sum() - yx, n, m - 1)
    variance = sum(
        (len(left) - 1) / len(left) * np.square(left - left.mean()).sum()
        for left in (without_x, without_y)
    )
    return Estimate(float(value), float(np.sqrt(variance)))


def _mmd(xx: Any, yy: Any, xy: Any, n: int, m: int) -> Any:
    return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)


def _kernel(dots: np.ndarray, dim: int) -> np.ndarray:
    base = dots / dim + 1
    return base * base * base


def _kernel_sums(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """sum_j k(x_i, y_j) for each i."""
    tiles = (_kernel(x[rows] @ y.T, x.shape[1]).sum(axis=1) for rows in _tiles(len(x)))
    return np.concatenate(list(tiles))


def precision_recall(
    features: ArrayLike, reference: ArrayLike, k: int = 3
) -> tuple[Estimate, Estimate]:
    """Precision: the share of pictures inside the reference's manifold. Recall: the share of the
    reference inside the pictures' manifold.

    A manifold is the union of balls around its points that reach to the k-th nearest other point.
    The errors are those of a share, sqrt(p (1 - p) / n), with the manifolds as they are. Numbers
    depend on n and m: compare them at the same counts only.

    Args:
        features: [n, d] and [m, d], n and m > k; of more than MOST_ROWS rows, a keyed choice
    """
    x, y = _some(features), _some(reference)
    if x.shape[1] != y.shape[1] or k < 1 or min(len(x), len(y)) <= k:
        raise ValueError(
            f"precision and recall take features [n, d] and [m, d] with more than k={k} rows, "
            f"got {x.shape}, {y.shape}"
        )
    return _share_inside(x, y, k), _share_inside(y, x, k)


def _share_inside(points: np.ndarray, manifold: np.ndarray, k: int) -> Estimate:
    radii = np.concatenate([_radii(manifold, tile, k) for tile in _tiles(len(manifold))])
    inside = [
        (_squared_distances(points[tile], manifold) <= radii).any(axis=1)
        for tile in _tiles(len(points))
    ]
    share = float(np.concatenate(inside).mean())
    return Estimate(share, float(np.sqrt(share * (1 - share) / len(points))))


def _radii(points: np.ndarray, tile: slice, k: int) -> np.ndarray:
    squared = _squared_distances(points[tile], points)
    squared[np.arange(len(squared)), np.arange(len(points))[tile]] = np.inf  # not its own neighbour
    return np.partition(squared, k - 1, axis=1)[:, k - 1]


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    squared = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * x @ y.T
    return np.maximum(squared, 0.0)


def _tiles(count: int) -> Iterator[slice]:
    for start in range(0, count, TILE):
        yield slice(start, min(start + TILE, count))


def _some(features: ArrayLike) -> np.ndarray:
    """At most MOST_ROWS rows, float64."""
    rows = check_features(features)
    if len(rows) > MOST_ROWS:
        rows = Rows.of(rows).features
    return rows.astype(np.float64)
