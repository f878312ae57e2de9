"""What a comparison is asked to do: a record that checks itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.grid import GRIDS
from fewstep.solver import AFS, ENDS
from fewstep.solver.registry import MOST_EVALUATIONS

__all__ = ["FINALISTS", "Design", "seeds_text"]

FINALISTS = 2  # settings that the first round of screening leaves
VALIDATION, POPULATION = 1_000_000, 100_000  # where their seeds start


@dataclass(frozen=True)
class Design:
    """What is compared, and how the settings are chosen.

    Args:
        solvers: names, learned solvers' folders or those with one for each budget, "auto", or
            students of the model
        budgets: evaluations
        seeds: of the test
        label, prompt, guidance: the condition, one for all
        grids, afs, ends: what is screened; no grids are all that the model has
        screen: validation seeds of the last round; 0 chooses nothing: the usual setting
        screen_first: of the first round, which all settings enter
        choose_by: a judge's label, or "error"
        population: reference solves from other seeds that make the target distribution
        resamples: of the bootstrap

    Raises:
        ValueError: that names the field.
    """

    solvers: tuple[str, ...]
    budgets: tuple[int, ...]
    seeds: tuple[int, ...]
    label: int | str | None = None
    guidance: float | None = None
    prompt: str | None = None
    grids: tuple[str, ...] = ()
    afs: tuple[str, ...] = ("none", "zero", "mean")
    ends: tuple[str, ...] = ("sigma_min", "zero")
    screen: int = 1000
    screen_first: int = 128
    choose_by: str = "error"
    population: int = 10_000
    resamples: int = 200

    def __post_init__(self) -> None:
        for name in ("solvers", "budgets", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        if self.screen < 0 or self.screen_first < 1:
            raise ValueError(
                f"screen must be at least 0 and screen_first at least 1, got {self.screen} and "
                f"{self.screen_first}"
            )
        for nfe in self.budgets:
            if not 1 <= nfe <= MOST_EVALUATIONS:
                raise ValueError(f"budgets must be from 1 to {MOST_EVALUATIONS}, got {nfe}")
        for name, have in (("grids", GRIDS), ("afs", AFS), ("ends", ENDS)):
            unknown = [one for one in getattr(self, name) if one not in have]
            if unknown or (not getattr(self, name) and name != "grids"):
                got = unknown[0] if unknown else "none"
                raise ValueError(f"{name} must be among {', '.join(have)}, got {got}")
        for name, kept in (("validation", self.validation), ("population", self.others)):
            shared = set(self.seeds) & set(kept)
            if shared:
                raise ValueError(
                    f"seeds {kept[0]} to {kept[-1]} are kept for {name}, got {min(shared)} as a "
                    "test seed; take others"
                )
        if len(self.others) > VALIDATION - POPULATION and self.screen:
            raise ValueError(
                f"population must be at most {VALIDATION - POPULATION}, got {self.population}"
            )

    @property
    def validation(self) -> tuple[int, ...]:
        return tuple(range(VALIDATION, VALIDATION + self.screen))

    @property
    def others(self) -> tuple[int, ...]:
        """Seeds of the population."""
        return tuple(range(POPULATION, POPULATION + self.population))


def seeds_text(seeds: Sequence[int]) -> str:
    """Seeds as text: 0-4999, or a list with commas."""
    if seeds and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds))
