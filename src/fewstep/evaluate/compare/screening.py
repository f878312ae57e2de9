"""The setting of each solver: what fits, and which is best on the validation seeds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from fewstep.evaluate.compare.bench import Judge, Workbench
from fewstep.evaluate.compare.design import FINALISTS, Design
from fewstep.evaluate.statistics import Statistics
from fewstep.loop import check_known
from fewstep.models import Model
from fewstep.models.students import SAMPLERS
from fewstep.sampling.choose import choose, draws_noise, locate
from fewstep.sampling.settings import Filled, Settings
from fewstep.solver import Solver
from fewstep.solving import is_folder, resolve

__all__ = ["all_candidates", "check_solvers", "finalists", "screened"]


def screened(
    workbench: Workbench,
    design: Design,
    judges: Mapping[str, Judge],
    candidates: Sequence[Filled],
) -> tuple[Filled, dict[str, Any] | None]:
    """The best of the settings on the validation seeds, and how it was chosen.

    By a distance, a setting's pictures are compared with the exact solutions of the same seeds: the
    scatter of the seeds, which a population would add, cancels. Not so for fresh noise: where a
    candidate draws it, all are compared with the population, or those without it would have the
    better of it.
    """
    if len(candidates) == 1:
        return candidates[0], None
    score = _score(workbench, design, judges, candidates)
    few = design.validation[: design.screen_first]
    scored = sorted((score(one, few), i) for i, one in enumerate(candidates))
    if len(few) < design.screen:
        left = [i for _, i in scored[:FINALISTS]]
        scored = sorted((score(candidates[i], design.validation), i) for i in left)
    best, i = scored[0]
    return candidates[i], {"score": best, "of": len(candidates)}


def finalists(
    workbench: Workbench,
    design: Design,
    judges: Mapping[str, Judge],
    candidates: Sequence[Filled],
) -> list[int]:
    """The places of the settings that the first round of `screened` leaves."""
    score = _score(workbench, design, judges, candidates)
    few = design.validation[: design.screen_first]
    scored = sorted((score(one, few), i) for i, one in enumerate(candidates))
    return [i for _, i in scored[:FINALISTS]]


def _score(
    workbench: Workbench,
    design: Design,
    judges: Mapping[str, Judge],
    candidates: Sequence[Filled],
) -> Callable[[Filled, Sequence[int]], float]:
    """What settings are sorted by on some seeds."""
    fresh = any(draws_noise(one) for one in candidates)

    def score(settings: Filled, seeds: Sequence[int]) -> float:
        run = workbench.run(settings, seeds)
        if design.choose_by == "error":
            return float(np.sqrt(run.mse).mean())
        judge = judges[design.choose_by]
        features = workbench.features(judge, run.images, run.digest)
        ours = Statistics.of(features, extractor=judge.name)
        if fresh:
            return ours.frechet(workbench.population(judge, design))
        exact = workbench.features(judge, *workbench.exact(seeds))
        return ours.frechet(Statistics.of(exact, extractor=judge.name))

    return score


def all_candidates(
    workbench: Workbench, design: Design
) -> tuple[dict[tuple[int, str], list[Filled]], dict[str, str]]:
    """The settings to choose from for each budget and solver, and the reasons of those that have
    none."""
    check_solvers(workbench.model, design, workbench.students)
    candidates, left_out = {}, {}
    for nfe, solver in itertools.product(design.budgets, design.solvers):
        fit, why = _candidates(workbench.of(solver), design, solver, nfe)
        if fit:
            candidates[nfe, solver] = fit
        else:
            left_out[f"{solver}@{nfe}"] = why
    if not candidates:
        reason = next(iter(left_out.values()))
        raise ValueError(f"none of the solvers can spend any of the budgets: {reason}")
    return candidates, left_out


def check_solvers(model: Model, design: Design, students: Collection[str] = ()) -> None:
    """Raise ValueError for a solver that is not there for any of the budgets."""
    for solver in set(design.solvers) - {"auto", *students}:
        problems = []
        for nfe in design.budgets:
            try:
                locate(model, solver, nfe)
            except ValueError as error:
                problems.append(error)
        if len(problems) == len(design.budgets):
            raise problems[0]


def _candidates(
    workbench: Workbench, design: Design, solver: str, nfe: int
) -> tuple[list[Filled], str]:
    """The settings that fit, and why the first of the others does not. "auto" and learned solvers
    leave nothing to choose; of a student it is its sampler, where there is more than one level and
    a distance to choose by, for the error is none with fresh noise. A student in segments has one
    sampler."""
    model = workbench.model
    if solver in workbench.students and not is_folder(solver):
        choice = design.screen > 0 and nfe > 1 and design.choose_by != "error"
        choice = choice and not model.card.in_segments
        samplers = SAMPLERS if choice else ("auto",)
        built_in = model.card.built_in_guidance
        if design.label is not None and built_in not in (None, design.guidance):
            return [], f"{solver} has guidance {built_in:g} built in, not {design.guidance}"
        return _samplers(workbench, samplers, nfe)
    try:
        free = solver != "auto" and isinstance(locate(model, solver, nfe), Solver)
    except ValueError as error:
        return [], str(error)
    free = free and design.screen > 0
    choices = itertools.product(workbench.grids(design), design.afs, design.ends)
    denoiser = workbench.denoiser()
    fit, why = [], ""
    for grid, afs, end in choices if free else [(None, None, None)]:
        try:
            settings = choose(model, Settings(solver, nfe, grid, afs, end=end))
            check_known(resolve(settings, denoiser), denoiser)
        except ValueError as error:
            why = why or str(error)
            continue
        if settings.afs == "mean" and getattr(denoiser, "far_mean", None) is None:
            why = why or "the model has no mean for the analytic first step"
            continue
        fit.append(settings)
    return fit, why


def _samplers(workbench: Workbench, names: Sequence[str], nfe: int) -> tuple[list[Filled], str]:
    """A student's samplers by name on its levels, and why the last of the others does not fit."""
    fit, why = [], ""
    for name in names:
        try:
            denoiser = workbench.denoiser()
            settings = choose(workbench.model, Settings(name, nfe))
            check_known(resolve(settings, denoiser), denoiser)
            fit.append(settings)
        except ValueError as error:
            why = str(error)
    return fit, why
