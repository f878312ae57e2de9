"""Features, statistics and distances between sets of pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewstep._lazy import lazily

if TYPE_CHECKING:
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

__getattr__ = lazily(__name__, {"fewstep.evaluate.statistics": __all__})
