"""A model's card: what a folder holds beside its weights, in one JSON file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

__all__ = ["CARD_FILE", "POPULATION_FOLDER", "SOLVERS", "WEIGHTS_FILE", "Card"]

CARD_FILE, WEIGHTS_FILE = "card.json", "model.safetensors"
SOLVERS = "solvers"  # folder of the learned solvers that come with a model, by name and budget
POPULATION_FOLDER = "population"  # of the statistics of reference solves that come with a model
FORMAT = "fewstep-model/1"


@dataclass(frozen=True)
class Card:
    """Facts about a model, JSON-ready.

    kind: what the weights are, which selects the loader
    network: the configuration of its network; for the kind unet, that of `UNetConfig`
    classes: their names, in order
    feature_module: dotted name of the module whose output feature taps read
    weights_sha256: hash of the weights file
    grid, end: the usual grid and its end, for a solver that is named without them
    auto: for each budget (as a string) the best known "solver" without training, and "grid",
        "afs" and "end" where they are not the usual ones; and "learned", the folder of a learned
        solver beside the card that is better at exactly this budget
    distilled: for a network that was distilled, how, and the levels on which it may be sampled
    about: recipe, data, licence and figures, for people
    folder: where the card lies; not part of it

    Errors: ValueError for a field of the wrong kind.
    """

    name: str
    network: dict[str, Any] = field(default_factory=dict)
    summary: str = ""
    classes: tuple[str, ...] = ()
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    feature_module: str = "middle"
    weights_sha256: str = ""
    grid: str = "karras"
    end: str = "sigma_min"
    auto: dict[str, dict[str, Any]] = field(default_factory=dict)
    distilled: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    kind: str = "unet"
    format: str = FORMAT
    folder: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("name", "summary", "kind", "feature_module", "weights_sha256", "grid", "end"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be text, got {getattr(self, name)!r}")
        for name in ("network", "auto", "distilled", "about"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} must be a table, got {getattr(self, name)!r}")
        if isinstance(self.classes, str) or not all(isinstance(c, str) for c in self.classes):
            raise ValueError(f"classes must be a list of names, got {self.classes!r}")
        object.__setattr__(self, "classes", tuple(self.classes))
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"need 0 < sigma_min < sigma_max, got {self.sigma_min}, {self.sigma_max}"
            )
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"sigma_data must be positive, got {self.sigma_data}")
        for budget, entry in self.auto.items():
            if not _is_choice(budget, entry):
                raise ValueError(
                    "auto must give for each budget a solver, and perhaps grid, afs, end and "
                    f"learned, got {budget!r}: {entry!r}"
                )

    @property
    def built_in_guidance(self) -> float | None:
        """The guidance scale that a student imitates in one pass and that cannot be changed; None
        where there is none, or it is told the scale."""
        scale = self.distilled.get("guidance")
        if "guidance" in self.network.get("told", ()):
            return None
        low = scale[0] if isinstance(scale, list | tuple) else scale
        return None if low in (None, 1) else float(low)

    def to_dict(self) -> dict[str, Any]:
        values = {"format": self.format, **asdict(self)}
        del values["folder"]
        return values

    def learned(self, nfe: int) -> Path | None:
        """The folder of the learned solver that is the best known at this budget, if there is
        one."""
        name = self.auto.get(str(nfe), {}).get("learned")
        return self.folder / name if name and self.folder else None

    def shipped(self, solver: str) -> Path | None:
        """The folder of the learned solvers of that name that come with the model, if any do."""
        if self.folder is None or Path(solver).name != solver:
            return None
        folder = self.folder / SOLVERS / solver
        return folder if folder.is_dir() else None

    @classmethod
    def read(cls, folder: Path) -> Card:
        """The card of a model folder. Errors: ValueError where it is not one, or a newer one."""
        path = folder / CARD_FILE
        try:
            values = json.loads(path.read_text())
            found = values["format"]
            if found == FORMAT:
                return replace(cls(**values), folder=folder)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a model card of fewstep: {error!r}") from None
        raise ValueError(
            f"{path} has format {found!r}, this version reads {FORMAT!r}; update fewstep"
        )


def _is_choice(budget: Any, entry: Any) -> bool:
    """Whether these are a budget, as a string, and a choice of solver, grid and first step."""
    return (
        isinstance(budget, str)
        and budget.isdecimal()
        and isinstance(entry, dict)
        and isinstance(entry.get("solver"), str)
        and isinstance(entry.get("grid", ""), str | list | tuple)
        and isinstance(entry.get("afs", ""), str)
        and isinstance(entry.get("end", ""), str)
        and isinstance(entry.get("learned", ""), str)
    )
