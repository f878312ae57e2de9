"""Every ODE solver converges at the order that it declares."""

from __future__ import annotations

import numpy as np
import pytest

import fewstep.solver as registry
from tests.support.testbed import ODE_SOLVERS, SMOOTH_GRIDS, Mixture, exact_path, solve_seeded

HIGH, LOW = 2.0, 0.3
INTERVALS = (32, 64, 128, 256)


def errors(name: str, grid: str) -> list[float]:
    """Root mean square error at the end for each number of intervals; history seeded.

    The mean over 8 starts rather than the largest error, which moves from start to start and blurs
    the slope.
    """
    finest = tuple(SMOOTH_GRIDS[grid](INTERVALS[-1] + 1, HIGH, LOW))
    path = exact_path(finest, batch=8)  # of which the coarser grids are every 2nd, 4th, ... point
    found = []
    for intervals in INTERVALS:
        sigmas = finest[:: INTERVALS[-1] // intervals]
        end = solve_seeded(name, sigmas, Mixture(), path.__getitem__)
        found.append(float((end - path[LOW]).square().mean().sqrt()))
    return found


@pytest.mark.parametrize("grid", SMOOTH_GRIDS)
@pytest.mark.parametrize("name", [*ODE_SOLVERS, "dpm-solver-2:r=0.3", "dpmpp-2s:r=0.3"])
def test_error_falls_at_the_declared_order(name, grid):
    found = errors(name, grid)
    assert found[-1] > 1e-10  # still two digits above the error of the reference solution
    slope = -np.polyfit(np.log(INTERVALS), np.log(found), 1)[0]
    assert abs(slope - registry.get(name).order) < 0.25
