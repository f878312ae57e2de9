"""Error of several solvers at several budgets, on a denoiser that is known exactly.

    python examples/compare_solvers.py

The data are a ring of eight Gaussians in the plane; the reference is a fine solve of the same ODE.
Replace `ring` by your own denoiser to compare solvers on your network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

import fewstep
from fewstep.models.exact import GaussianMixture

SOLVERS = ("ddim", "heun", "dpmpp-2m", "unipc-2", "deis-2", "ipndm-2", "ipndm-4")


def ring(count: int = 8, spread: float = 0.1) -> GaussianMixture:
    """Equal Gaussians of standard deviation `spread` on the unit circle."""
    angles = 2 * math.pi * torch.arange(count, dtype=torch.float64) / count
    means = torch.stack((angles.cos(), angles.sin()), dim=1)  # [count, 2]
    return GaussianMixture(torch.ones(count), means, spread**2)


@torch.no_grad()
def main(
    solvers: Sequence[str] = SOLVERS,
    budgets: Sequence[int] = (4, 6, 8, 10),
    grid: str = "karras",
    points: int = 256,
) -> dict[tuple[str, int], float]:
    """Print and return the root mean square error of each solver at each budget."""
    denoiser = ring()
    generator = torch.Generator().manual_seed(0)
    x_T = denoiser.sigma_max * torch.randn(points, 2, generator=generator, dtype=torch.float64)
    reference = fewstep.solve(denoiser, x_T, "dpm-solver-3", nfe=600)

    errors = {}
    print(f"{'solver':12s}" + "".join(f"{nfe:>9d}" for nfe in budgets))
    for solver in solvers:
        for nfe in budgets:
            x = fewstep.solve(denoiser, x_T, solver, nfe=nfe, grid=grid)
            errors[solver, nfe] = (x - reference).square().mean().sqrt().item()
        print(f"{solver:12s}" + "".join(f"{errors[solver, nfe]:9.4f}" for nfe in budgets))
    return errors


if __name__ == "__main__":
    main()
