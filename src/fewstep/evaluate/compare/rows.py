"""A row of a comparison: one sampler at one budget, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from fewstep.denoiser import calls_per_eval
from fewstep.evaluate.compare.bench import Run, Workbench
from fewstep.evaluate.compare.design import Design, seeds_text
from fewstep.sampling.choose import draws_noise
from fewstep.sampling.settings import Filled

__all__ = ["CHECKED", "make_row", "times"]

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


def times(ran: Sequence[tuple[Workbench, Filled]], seeds: Sequence[int]) -> list[float]:
    """Seconds per picture of each, the median over rounds that go through all of them."""
    taken = []
    for i, (workbench, settings) in enumerate([*ran] * ROUNDS):
        taken.append(workbench.seconds(settings, seeds))
        workbench.report("times", i + 1, ROUNDS * len(ran))
    return np.median(np.reshape(taken, (ROUNDS, len(ran))), axis=0).tolist()
