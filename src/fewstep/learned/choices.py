"""What follows from the settings of a training before any work."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fewstep.denoiser import Denoiser
from fewstep.grid import GRIDS, check_grid, make_grid
from fewstep.learned.grid_search import SEARCH
from fewstep.learned.kinds import kind_of
from fewstep.learned.method import Kind, Recipe
from fewstep.learned.settings import Settings
from fewstep.learned.teacher import Teacher, check_teacher, fine_grid, whole_grid
from fewstep.reference import ReferenceSolve
from fewstep.schedule import Schedule
from fewstep.solver import end_at
from fewstep.solving import DEFAULT_RANGE
from fewstep.train.checkpoint import plain

__all__ = ["Choices"]

REFERENCE_INTERVALS = 40


@dataclass(frozen=True)
class Choices:
    """Settings, and what follows from them for one denoiser.

    named: the grid by name; None where it was given as sigmas
    sigmas: the levels; of a grid that is searched, only the ends hold
    low, high: where named grids end and begin
    schedule: the network's
    """

    settings: Settings
    kind: Kind
    recipe: Recipe
    named: str | None
    sigmas: tuple[float, ...]
    low: float
    high: float
    schedule: Schedule | None
    lr: float
    teacher: str
    inner: int

    @classmethod
    def of(
        cls, settings: Settings, denoiser: Denoiser, in_features: bool, student: bool = False
    ) -> Choices:
        """Raise ValueError for what does not go together."""
        grid, end = settings.grid, settings.end
        kind, schedule = kind_of(settings.method), getattr(denoiser, "schedule", None)
        if grid is not None and not isinstance(grid, str):
            if (end, settings.sigma_min, settings.sigma_max) != (None, None, None):
                raise ValueError(
                    "sigmas have their own ends: leave out end, sigma_min and sigma_max"
                )
            grid = check_grid(grid)
            end = "sigma_min" if grid[-1] > 0 else "zero"
        own_time = schedule is not None and schedule.own_time
        recipe = kind.recipe(settings.base, settings.nfe, settings.afs, end, own_time)
        if in_features and not recipe.whole:
            raise ValueError(
                f"{settings.method} compares states step by step, in pixels: leave out "
                "loss_features (--loss)"
            )
        lr = recipe.lr if settings.lr is None else settings.lr
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be positive, got {lr}")
        low, high = (
            getattr(denoiser, name, usual) if given is None else given
            for name, usual, given in (
                ("sigma_min", DEFAULT_RANGE[0], settings.sigma_min),
                ("sigma_max", DEFAULT_RANGE[1], settings.sigma_max),
            )
        )
        if isinstance(grid, tuple):
            named, sigmas = None, _counted(grid, recipe.intervals, settings.nfe)
        else:
            named = recipe.grid if grid is None else str(grid)
            usual = "karras" if named == SEARCH else named  # until it is found, for its ends
            whole = make_grid(usual, recipe.intervals + 1, high, low, schedule)
            sigmas = end_at(whole, recipe.end)
        inner = recipe.inner if settings.inner is None else settings.inner
        if inner < 0:
            raise ValueError(f"inner must be at least 0, got {inner}")
        teacher = settings.teacher or recipe.teacher
        check_teacher(teacher)
        _check_options(kind, settings.options)
        if student and named == SEARCH:
            raise ValueError(
                f"{settings.method} searches a grid by the network's own ODE, and a student has "
                "none; take tuned on its own levels, without grid"
            )
        return cls(settings, kind, recipe, named, sigmas, low, high, schedule, lr, teacher, inner)

    @property
    def searched(self) -> bool:
        return self.named == SEARCH

    @property
    def middle(self) -> float:
        """A level between the ends."""
        return math.sqrt(self.sigmas[0] * (self.sigmas[-1] or self.sigmas[-2]))

    def whole(self, intervals: int) -> tuple[float, ...]:
        """A grid from end to end, for a solve that is nearly exact."""
        first, last = self.sigmas[0], self.sigmas[-1]
        low = last or min(self.low, self.sigmas[-2])
        return whole_grid(intervals, first, low, last, self.schedule)

    def rivals(self) -> dict[str, tuple[float, ...]]:
        """The grids that go with these ends, by name."""
        found, points = {}, self.recipe.intervals + 1
        make = partial(make_grid, schedule=self.schedule)
        for name in GRIDS:
            try:
                found[name] = end_at(make(name, points, self.high, self.low), self.recipe.end)
            except ValueError:
                continue  # one of the network's own time, and it has none
        return found

    def guide(self, sigmas: tuple[float, ...], features: bool) -> Teacher:
        """The teacher on the levels that were found."""
        if self.recipe.whole:  # on a grid of its own, from end to end
            return Teacher(self.teacher, (sigmas[0], sigmas[-1]), self.whole(self.inner + 1))
        by = None if self.searched else self.named
        fine = fine_grid(by, sigmas, self.inner, self.schedule)
        return Teacher(self.teacher, sigmas, fine, features)

    @property
    def reference(self) -> ReferenceSolve:
        """What the validation seeds are solved with, down to the last level above 0."""
        down = tuple(sigma for sigma in self.whole(REFERENCE_INTERVALS) if sigma > 0)
        return ReferenceSolve(grid=down)

    def facts(
        self, shape: Sequence[int], options: dict[str, Any], loss: str, model: dict[str, Any]
    ) -> dict[str, Any]:
        """What tells one run from another, as far as it is known before any work."""
        chosen, recipe = self.settings, self.recipe
        return {
            "method": chosen.method,
            "nfe": chosen.nfe,
            "grid": self.named or "sigmas",
            "afs": recipe.afs,
            "seed": chosen.seed,
            "trajectories": chosen.trajectories,
            "batch": chosen.batch,
            "lr": self.lr,
            "loss": loss,
            "options": plain(options),
            "base": recipe.base,
            "sigma_max": self.high,
            "sigma_min": self.low,
            "end": recipe.end,
            "teacher": self.teacher,
            "inner": self.inner,
            "shape": list(shape),
            "validation": chosen.validation_seeds,
            "validate_every": chosen.validate_every,
            "model": model,
        }


def _counted(sigmas: tuple[float, ...], intervals: int, nfe: int) -> tuple[float, ...]:
    """Raise ValueError where the budget is spent on another number of them."""
    if len(sigmas) != intervals + 1:
        raise ValueError(
            f"nfe={nfe} is spent on {intervals + 1} sigmas here, got {len(sigmas)}; "
            "give as many, or another nfe or afs"
        )
    return sigmas


def _check_options(kind: Kind, options: dict[str, Any]) -> None:
    parameters = inspect.signature(kind.fresh).parameters.values()
    known = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise ValueError(
                f"{kind.name} has no option {name!r}; it has: {', '.join(known) or 'none'}"
            )
