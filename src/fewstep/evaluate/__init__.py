"""Features, statistics and distances between sets of pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewstep._lazy import lazily

if TYPE_CHECKING:
    from fewstep.evaluate.pairs import kid, precision_recall
    from fewstep.evaluate.statistics import (
        Estimate,
        Rows,
        Statistics,
        frechet_distance,
        paired_frechet,
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

PAIRS = ("kid", "precision_recall")
__getattr__ = lazily(
    __name__,
    {
        "fewstep.evaluate.pairs": PAIRS,
        "fewstep.evaluate.statistics": [name for name in __all__ if name not in PAIRS],
    },
)
