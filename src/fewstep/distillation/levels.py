"""Which levels a student visits for each budget: the best of a few, on validation seeds.

With fresh noise, a step to level s forgets the share s^2 / (c^2 + s^2) of the error so far, c the
spread of the data, and adds one of the student's own. So a level far below c adds an error and
forgets none. The levels of the training grid, spread evenly, go that far down where the budget is
large. The family beside them is uniform in log sigma from the first level to a multiple of c.

A student in segments visits their edges and levels inside them. What is chosen is in how many of
those that it knows it spends the budget.

What decides is the Frechet distance to the teacher's fine solutions of other seeds, in the features
that train, never in those that judge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.distillation.students import CHORD, FEATURES, LEAST, Examination
from fewstep.files import write_json
from fewstep.grid import make_grid
from fewstep.loop import check_known
from fewstep.models import Model
from fewstep.models.card import CARD_FILE, Card, Choice, Distilled
from fewstep.models.students import phase_levels, student_levels
from fewstep.networks.features import FeatureNetwork
from fewstep.sampling.generate import sample
from fewstep.solver import get

__all__ = ["MULTIPLES", "Tried", "best_of", "choose_levels", "family", "write_levels"]

SEGMENTS = "segments="
MULTIPLES = (1.0, 2.0, 4.0, 8.0)  # of sigma_data, for the lowest level


@dataclass(frozen=True)
class Tried:
    """One way to spend a budget.

    name: of the levels: trained, lowest=SIGMA, or segments=NUMBER
    excess: the distance of its pictures, less that of the fine solutions of the same seeds
    phases: how many segments the student is told
    """

    nfe: int
    sampler: str
    name: str
    levels: tuple[float, ...]
    excess: float
    phases: int | None = None


def family(
    card: Card, nfe: int, multiples: Sequence[float] = MULTIPLES
) -> dict[str, tuple[float, ...]]:
    """The levels to choose from, by name, each with 0 at its end.

    Args:
        card: of a student
        multiples: of sigma_data, for the lowest level; of no meaning in segments
    """
    assert card.distilled is not None
    known = card.distilled.levels
    if card.in_segments:
        return {f"{SEGMENTS}{k}": grid for k, grid in _by_segments(card.distilled, nfe).items()}
    found = {"trained": student_levels(known, nfe)} if nfe < len(known) else {}
    for multiple in multiples if nfe > 1 else ():
        low = multiple * card.sigma_data
        if low < known[0]:
            found[f"lowest={low:g}"] = (*make_grid("log-snr", nfe, known[0], low), 0.0)
    return found


def _by_segments(known: Distilled, nfe: int) -> dict[int, tuple[float, ...]]:
    """The levels for a budget, by each number of segments that has any."""
    found = {}
    for k in known.phases:
        with suppress(ValueError):
            found[k] = phase_levels(known.levels, nfe, k)
    return found


def _conditions(card: Card, seeds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the teacher's pictures, and of the student's, whose scale may be built in."""
    scale = None if card.distilled is None else card.distilled.guidance
    if scale is None or not card.classes:
        return {}, {}
    ranged = isinstance(scale, tuple)
    middle = sum(scale) / 2 if ranged else scale
    classes = tuple(range(len(card.classes)))
    turns = [classes[i % len(classes)] for i in range(seeds)]
    theirs = {"labels": classes, "guidance": middle}
    return theirs, {"label": turns} | ({"guidance": middle} if ranged else {})


def _told(student: Any, nfe: int, phases: int) -> Model:
    """The student, told a number of segments at a budget."""
    card = student.card
    known = card.auto.get(str(nfe), Choice(CHORD))
    auto = {**card.auto, str(nfe): replace(known, phases=phases)}
    return replace(student, card=replace(card, auto=auto))


def choose_levels(
    student: Model,
    teacher: Model,
    *,
    budgets: Sequence[int] = (2, 4, 8),
    samplers: Sequence[str] = (),
    multiples: Sequence[float] = MULTIPLES,
    seeds: int = 500,
    features: FeatureNetwork | None = None,
    report: Callable[[Tried], None] = lambda tried: None,
) -> list[Tried]:
    """Try all levels and samplers at each budget.

    Args:
        student: sampled without a class, and where it has guidance with all classes in turn
        teacher: see `fewstep.models.teacher_of`
        budgets: evaluations
        samplers: for consistency functions; that of the card for the budget where left out
        multiples: see `family`
        seeds: how many, from 1,000,000 on; the distance is to the same number of others
        features: a network for the distance; fashion-a for its pictures where left out
        report: called after each

    Returns:
        Every try; the best of a budget has the least excess.

    Raises:
        ValueError: before any work, for a model that is no student, or that takes text, an unknown
            sampler, a budget without levels, and where there is nothing to measure a distance by.
    """
    card = student.card
    if card.distilled is None:
        raise ValueError(f"{card.name} is no student, so it has no levels to choose")
    if getattr(getattr(student, "family", None), "encode", None) is not None:
        raise ValueError(f"{card.name} takes text; levels are chosen of pictures without")
    if card.in_segments and set(samplers) - {CHORD}:
        raise ValueError(f"a student in segments has {CHORD} for its sampler, got {samplers[0]}")
    if seeds < LEAST:
        raise ValueError(f"seeds must be at least {LEAST} for a distance, got {seeds}")
    tries = []
    for nfe in budgets:
        usual = card.auto[str(nfe)].solver if str(nfe) in card.auto else "consistency"
        options = family(card, nfe, multiples)
        if not options:
            raise ValueError(f"{card.name} has no levels for {nfe} evaluations")
        for sampler in samplers or (usual,):
            check_known(get(sampler).on(next(iter(options.values()))), student.denoiser())
            tries += [(nfe, sampler, name, levels) for name, levels in options.items()]
    shown, told_scale = _conditions(card, seeds)
    examined = Examination(teacher, seeds, features=features, **shown)
    distance = examined.distance
    if distance is None:
        raise ValueError(
            f"{FEATURES} does not know pictures of {teacher.card.name}; name a feature network"
        )
    floor, found = distance(examined.reference), []
    for nfe, sampler, name, levels in tries:
        told = int(name.removeprefix(SEGMENTS)) if "phases" in card.told else None
        known = student if told is None else _told(student, nfe, told)
        how = {"solver": sampler, "seeds": examined.seeds, "grid": levels, **told_scale}
        made = sample(known, **how).images
        found.append(Tried(nfe, sampler, name, levels, distance(made) - floor, told))
        report(found[-1])
    return found


def best_of(tries: Sequence[Tried]) -> dict[int, Tried]:
    """That of each budget with the least excess."""
    found: dict[int, Tried] = {}
    for one in sorted(tries, key=lambda one: one.excess, reverse=True):
        found[one.nfe] = one
    return dict(sorted(found.items()))


def write_levels(folder: Path, card: Card, tries: Sequence[Tried], about: dict[str, Any]) -> Card:
    """Write the best of each budget into a student's card, with all figures.

    Args:
        folder: of the student
        card: as it is there
        about: how they were measured, JSON-ready

    Returns:
        The card as written.

    Raises:
        OSError: it cannot be.
    """
    chosen = {}
    for nfe, one in best_of(tries).items():
        known = card.auto.get(str(nfe), Choice(one.sampler))
        chosen[str(nfe)] = replace(known, solver=one.sampler, grid=one.levels, phases=one.phases)
    excess: dict[str, dict[str, float]] = {}
    for one in tries:
        excess.setdefault(str(one.nfe), {})[f"{one.sampler}, {one.name}"] = round(one.excess, 4)
    auto = dict(sorted({**card.auto, **chosen}.items(), key=lambda entry: int(entry[0])))
    written = replace(card, auto=auto, about={**card.about, "levels": {**about, "excess": excess}})
    write_json(folder / CARD_FILE, written.to_dict())
    return written
