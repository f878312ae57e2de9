"""Solvers that learn: AMED-Solver, AMED-Plugin and tuned tables.

solver = fewstep.learned.train(denoiser, shape, method="amed", nfe=5)
x = fewstep.solve(denoiser, x_T, solver)
solver.save("my-solver")                      # and later: fewstep.solve(..., "my-solver")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewstep._lazy import lazily

if TYPE_CHECKING:
    from fewstep.learned.prompts import prompted
    from fewstep.learned.solver import LearnedSolver
    from fewstep.learned.training import train
    from fewstep.learned.validation import Imitated
    from fewstep.train.loop import Progress

__all__ = ["Imitated", "LearnedSolver", "Progress", "prompted", "train"]

__getattr__ = lazily(
    __name__,
    {
        "fewstep.learned.prompts": ("prompted",),
        "fewstep.learned.solver": ("LearnedSolver",),
        "fewstep.learned.training": ("train",),
        "fewstep.learned.validation": ("Imitated",),
        "fewstep.train.loop": ("Progress",),
    },
)
