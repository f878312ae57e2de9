"""Solvers that learn: AMED-Solver and AMED-Plugin.

solver = fewstep.learned.train(denoiser, shape, method="amed", nfe=5)
x = fewstep.solve(denoiser, x_T, solver)
solver.save("my-solver")                      # and later: fewstep.solve(..., "my-solver")
"""

from __future__ import annotations

from fewstep.learned.solver import LearnedSolver
from fewstep.learned.training import Progress, train

__all__ = ["LearnedSolver", "Progress", "train"]
