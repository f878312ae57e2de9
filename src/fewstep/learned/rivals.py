"""The best training-free solver of a budget, measured as the learned one is.

A learned solver is worth its training where it beats every solver that needs none. So these run on
the same validation seeds, over all named grids, with each analytic first step that the network can
have. Solvers that work on D run down to 0 too, where they are better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from fewstep.grid import GRIDS, make_grid
from fewstep.loop import check_known
from fewstep.models.students import SAMPLERS
from fewstep.schedule import Schedule
from fewstep.solver import end_at, get, intervals_for

__all__ = ["OF_STUDENTS", "RIVALS", "best_rival", "best_sampler", "unbeaten"]

RIVALS = (  # the best of the built-in network's screens and of the toys in the tests
    *("ddim", "dpm-solver-2", "dpmpp-2m", "unipc-2"),
    *("deis-2", "deis-3", "deis-4", "ipndm-2", "ipndm-3", "ipndm-4"),
)

OF_STUDENTS = SAMPLERS[1:]  # no fresh noise, since that leads to another picture than the teacher's


def best_sampler(
    measure: Callable[[Any], Mapping[str, float]], levels: Sequence[float], denoiser: Any
) -> dict[str, Any]:
    """The best of a student's own samplers, as `best_rival` has it.

    Args:
        measure: as there
        levels: of the student, for this budget
        denoiser: some samplers need more than others have
    """
    best, least = {}, math.inf
    for name in OF_STUDENTS:
        program = get(name).on(tuple(levels))
        try:
            check_known(program, denoiser)
        except ValueError:
            continue
        figures = dict(measure(program))
        if figures[list(figures)[-1]] < least:
            least = figures[list(figures)[-1]]
            known = {"solver": name, "grid": "the student's levels", "afs": "none"}
            best = {**known, "sigmas": list(levels), **figures}
    return best


def best_rival(
    measure: Callable[[Any], Mapping[str, float]],
    nfe: int,
    high: float,
    low: float,
    end: str,
    schedule: Schedule | None,
    firsts: Sequence[str] = ("none", "zero"),
) -> dict[str, Any]:
    """The best of them, and its figures.

    Args:
        measure: from something that can be solved with to figures, of which the last decides.
        nfe: the budget, which each spends exactly.
        high, low, end: where the grids begin and end, as in `fewstep.solve`.
        schedule: the network's, for grids in its own time.
        firsts: the analytic first steps.

    Returns:
        "solver", "grid", "afs" and "sigmas", and the figures; empty where none is finite.
    """
    best, least = {}, math.inf
    for name in RIVALS:
        ends = {end, "zero"} if get(name).prediction == "x0" else {end}
        for last, afs, grid in product(sorted(ends), firsts, GRIDS):
            try:
                points = 1 + intervals_for(get(name), nfe, afs, end=last)
                sigmas = end_at(make_grid(grid, points, high, low, schedule), last)
                program = get(name).on(sigmas, afs)
            except ValueError:
                continue  # another budget, or a grid in a time that the network has not
            figures = dict(measure(program))
            if figures[list(figures)[-1]] < least:
                least = figures[list(figures)[-1]]
                known = {"solver": name, "grid": grid, "afs": afs, "sigmas": list(sigmas)}
                best = {**known, **figures}
    return best


def unbeaten(name: str, measured: Mapping[str, Any]) -> str | None:
    """One line where the best training-free solver was not beaten.

    Args:
        name: of the learned solver.
        measured: its figures, and under "training_free" those of the best rival.
    """
    rival = measured.get("training_free")
    by = "features" if "features" in measured else "error"
    if not rival or measured[by] < rival[by]:
        return None
    return (
        f"{name} did not beat the best training-free solver on the validation seeds: "
        f"{rival['solver']} on {rival['grid']} with afs={rival['afs']} has {by} {rival[by]:.4g}, "
        f"this has {measured[by]:.4g}"
    )
