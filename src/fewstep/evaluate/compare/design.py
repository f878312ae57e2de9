"""What a comparison is asked to do: a record that checks itself.

It imports no torch, for the command reads its options off it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from fewstep.records import Int, Real, Text, record

__all__ = ["FINALISTS", "Design", "seeds_text"]

FINALISTS = 2  # settings that the first round of screening leaves
VALIDATION, POPULATION = 1_000_000, 100_000  # where their seeds start


@record
class Design:
    """What is compared, and how the settings are chosen.

    The command shows these lines as its help.

    Attributes:
        solvers: Names, folders of learned solvers, students of the model; commas between.
        budgets: Network evaluations per picture: 3,5,7 or 3-8.
        seeds: Test seeds: 0-4999.
        label: Class name or index. Several, with commas, take turns by seed; all: each draws one.
        guidance: Scale of classifier-free guidance; needs a prompt or a label.
        prompt: Text, for models that take one; several take turns by seed.
        grids: Grids that are tried; all that the model has if left out.
        afs: Analytic first steps that are tried.
        ends: Ends of named grids that are tried.
        screen: Validation seeds that choose each setting; 0: the usual settings.
        screen_first: Of these, the seeds of a first round that all settings enter.
        choose_by: What settings are chosen by: error, or a feature network's name.
        population: Reference solves from other seeds that make the target distribution.
        resamples: Of the bootstrap behind the error of a distance.

    Raises:
        ValueError: that names the field.
    """

    solvers: tuple[Text, ...]
    budgets: tuple[Int, ...]
    seeds: tuple[Int, ...]
    label: int | str | None = None
    guidance: Real | None = None
    prompt: Text | tuple[Text, ...] | None = None
    grids: tuple[Text, ...] = ()
    afs: tuple[Text, ...] = ("none", "zero", "mean")
    ends: tuple[Text, ...] = ("sigma_min", "zero")
    screen: Annotated[Int, Field(ge=0, le=100_000_000)] = 1000
    screen_first: Annotated[Int, Field(ge=1)] = 128
    choose_by: Text = "error"
    population: Annotated[Int, Field(ge=1)] = 10_000
    resamples: Annotated[Int, Field(ge=2)] = 200

    def __post_init__(self) -> None:
        from fewstep.grid import GRIDS  # these wait for torch
        from fewstep.solver import AFS, ENDS
        from fewstep.solver.registry import MOST_EVALUATIONS

        for name in ("solvers", "budgets", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        for nfe in self.budgets:
            if not 1 <= nfe <= MOST_EVALUATIONS:
                raise ValueError(f"budgets must be from 1 to {MOST_EVALUATIONS}, got {nfe}")
        for name, have in (("grids", GRIDS), ("afs", AFS), ("ends", ENDS)):
            unknown = [one for one in getattr(self, name) if one not in have]
            if unknown or (not getattr(self, name) and name != "grids"):
                got = unknown[0] if unknown else "none"
                raise ValueError(f"{name} must be among {', '.join(have)}, got {got}")
        if len(self.others) > VALIDATION - POPULATION and self.screen:
            raise ValueError(
                f"population must be at most {VALIDATION - POPULATION}, got {self.population}"
            )
        for name, kept in (("validation", self.validation), ("population", self.others)):
            shared = [seed for seed in self.seeds if seed in kept]
            if shared:
                raise ValueError(
                    f"seeds {kept[0]} to {kept[-1]} are kept for {name}, got {min(shared)} as a "
                    "test seed; take others"
                )

    @property
    def validation(self) -> range:
        """Seeds that choose the settings."""
        return range(VALIDATION, VALIDATION + self.screen)

    @property
    def others(self) -> range:
        """Seeds of the population."""
        return range(POPULATION, POPULATION + self.population)


def seeds_text(seeds: Sequence[int]) -> str:
    """Seeds as text: 0-4999, or a list with commas."""
    if seeds and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds))
