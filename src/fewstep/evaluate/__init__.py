"""Features, statistics and distances between sets of pictures."""

from __future__ import annotations

from fewstep.evaluate.statistics import (
    Estimate,
    Rows,
    Statistics,
    frechet_distance,
    kid,
    paired_frechet,
    precision_recall,
)

__all__ = [
    "Estimate",
    "Rows",
    "Statistics",
    "frechet_distance",
    "kid",
    "paired_frechet",
    "precision_recall",
]
