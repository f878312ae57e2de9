"""Samplers side by side on one model; see `fewstep.evaluate.compare.run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewstep._lazy import lazily

if TYPE_CHECKING:
    from fewstep.evaluate.compare.bench import Judge, Run, Workbench
    from fewstep.evaluate.compare.design import Design
    from fewstep.evaluate.compare.records import (
        check_protocol,
        merge,
        protocol,
        read_comparison,
    )
    from fewstep.evaluate.compare.run import Comparison, compare, load_students
    from fewstep.evaluate.compare.screening import check_solvers

__all__ = [
    "Comparison",
    "Design",
    "Judge",
    "Run",
    "Workbench",
    "check_protocol",
    "check_solvers",
    "compare",
    "load_students",
    "merge",
    "protocol",
    "read_comparison",
]

__getattr__ = lazily(
    __name__,
    {
        "fewstep.evaluate.compare.bench": ("Judge", "Run", "Workbench"),
        "fewstep.evaluate.compare.design": ("Design",),
        "fewstep.evaluate.compare.records": (
            "check_protocol",
            "merge",
            "protocol",
            "read_comparison",
        ),
        "fewstep.evaluate.compare.run": ("Comparison", "compare", "load_students"),
        "fewstep.evaluate.compare.screening": ("check_solvers",),
    },
)
