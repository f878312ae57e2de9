"""The passes that an iteration of distillation is compared with are those that it makes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import distill_overhead
from benchmarks.distill_overhead import passes, start_run
from fewstep.distillation import Recipe
from fewstep.distillation.metric import InFeatures
from fewstep.distillation.training import Distillation

QUICK: dict[str, Any] = {"batch": 2, "points": 3, "dtype": "float32"}
FEATURES: dict[str, Any] = {"phases": (1, 2), "loss": "fashion-a"}


class Noted:
    """Counts passes by network, rows and gradient; the forward ones, and those back through it."""

    def __init__(self, run: Distillation) -> None:
        self.counts: Counter[tuple[Any, ...]] = Counter()
        known, metric = run.subject, run.metric
        denoise, teacher = known.denoise, known.teacher

        def noted(network: Any, x: Tensor, *rest: Any) -> Tensor:
            name = "student" if network is known.student else "target"
            return self.seen(name, x, denoise(network, x, *rest))

        def taught(x: Tensor, *rest: Any) -> Tensor:
            return self.seen("teacher", x, teacher(x, *rest))

        run.subject = replace(known, denoise=noted, teacher=taught)
        if isinstance(metric, InFeatures):

            def maps(x: Tensor) -> list[Tensor]:
                *first, last = metric.maps(x)
                return [*first, self.seen("features", x, last)]

            run.metric = replace(metric, maps=maps)

    def seen(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        whole = "through its input" if x.requires_grad and torch.is_grad_enabled() else ""
        self.counts[name, len(x), whole] += 1
        if out.requires_grad:
            out.register_hook(lambda gradient: self.counts.update([(f"back: {name}", len(x))]))
        return out

    def taken(self) -> Counter[tuple[Any, ...]]:
        found, self.counts = self.counts, Counter()
        return found


@pytest.mark.parametrize(
    "settings, teacher, student, features",
    [
        ({}, 2, 1, 0),
        (FEATURES, 2, 1, 1),
        ({**FEATURES, "guidance": 3.0}, 2, 1, 1),
        ({**FEATURES, "method": "trajectory"}, 4, 3, 3),
        ({**FEATURES, "method": "trajectory", "end_to_end": True}, 4, 3, 2),
    ],
    ids=["usual", "segments", "guidance", "trajectories", "end to end"],
)
def test_an_iteration_makes_the_passes_that_it_is_compared_with(
    settings, teacher, student, features, monkeypatch
) -> None:
    monkeypatch.setattr(distill_overhead, "COUNT", 4)
    run = start_run(Recipe(**QUICK, **settings), "fashion-mnist")
    noted = Noted(run)
    alone = passes(run)
    run.update(0)
    iteration = noted.taken()
    alone()
    assert noted.taken() == iteration

    def total(name: str) -> int:
        return sum(count for key, count in iteration.items() if key[0] == name)

    rows = 4 if "guidance" in settings else 2
    assert iteration["teacher", rows, ""] == total("teacher") == teacher
    assert total("student") == total("back: student") == student
    assert total("target") == (settings.get("method") != "trajectory")
    assert (total("features"), total("back: features")) == (2 * features, features)
