"""A row of a comparison: one sampler at one budget, in numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from fewstep.denoiser import calls_per_eval
from fewstep.evaluate.compare.bench import Run, Workbench
from fewstep.evaluate.compare.design import Design, seeds_text
from fewstep.sampling.choose import draws_noise
from fewstep.sampling.settings import Filled

__all__ = ["CHECKED", "agreements", "make_row", "times"]

CHECKED = 32  # seeds whose error stands in the row by itself, for a quick recomputation
ROUNDS = 3  # of timing


def make_row(
    workbench: Workbench, solver: str, settings: Filled, run: Run, design: Design
) -> dict[str, Any]:
    error = np.sqrt(run.mse)
    denoiser, card = workbench.denoiser(), workbench.model.card
    recipe = card.about.get("recipe", {})
    how = asdict(card.distilled) if card.distilled else {}
    student = {**how, "weights": card.weights_sha256, "recipe": recipe}
    return {
        "sampler": solver,
        **({"student": student} if solver in workbench.students else {}),
        **settings.record(),
        "stochastic": draws_noise(settings),
        "network_calls": settings.nfe * calls_per_eval(denoiser),
        "error": float(error.mean()),
        "error_se": float(error.std(ddof=1) / len(error) ** 0.5) if len(error) > 1 else None,
        "psnr": float(10 * np.log10(4 / max(run.mse.mean(), 1e-30))),
        "check": {
            "seeds": seeds_text(design.seeds[:CHECKED]),
            "error": float(error[:CHECKED].mean()),
        },
        "source": 0,
        "fd": {},
        "fd_data": {},
    }


def agreements(
    rows: Sequence[dict[str, Any]], features: Sequence[Callable[[], np.ndarray]], judge: str
) -> None:
    """Note in each row how near its pictures are to those of its sampler's largest budget.

    Args:
        rows: of all samplers; "agreement" is added where the sampler has a larger budget.
        features: reads those of each row, [n, d], of the same seeds.
        judge: whose features they are.
    """
    for name in dict.fromkeys(row["sampler"] for row in rows):
        *less, last = sorted(
            (i for i, row in enumerate(rows) if row["sampler"] == name),
            key=lambda i: rows[i]["nfe"],
        )
        best = _directions(features[last]()) if less else np.empty(0)
        for i in less:
            told = rows[i].setdefault("agreement", {"nfe": rows[last]["nfe"], "cosine": {}})
            cosines = (_directions(features[i]()) * best).sum(1)
            told["cosine"][judge] = float(cosines.mean())


def _directions(features: np.ndarray) -> np.ndarray:
    rows = features.astype(float)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def times(ran: Sequence[tuple[Workbench, Filled]], seeds: Sequence[int]) -> list[float]:
    """Seconds per picture of each, the median over rounds that go through all of them."""
    taken = []
    for i, (workbench, settings) in enumerate([*ran] * ROUNDS):
        taken.append(workbench.seconds(settings, seeds))
        workbench.report("times", i + 1, ROUNDS * len(ran))
    return np.median(np.reshape(taken, (ROUNDS, len(ran))), axis=0).tolist()
