"""A model's card: what a folder holds beside its weights, in one JSON file."""

from __future__ import annotations

from dataclasses import asdict, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from fewstep.records import (
    Digest,
    Levels,
    Real,
    Slug,
    Text,
    check_slug,
    read_json,
    record,
    shown,
)

__all__ = [
    "CARD_FILE",
    "POPULATION_FOLDER",
    "SOLVERS",
    "WEIGHTS_FILE",
    "Card",
    "Choice",
    "Distilled",
]

CARD_FILE, WEIGHTS_FILE = "card.json", "model.safetensors"
SOLVERS = "solvers"  # folder of the learned solvers that come with a model, by name and budget
POPULATION_FOLDER = "population"  # of the statistics of reference solves that come with a model
FORMAT = "fewstep-model/1"
MOST_CLASSES = 1_000_000


def _grid(value: Any) -> str | tuple[float, ...]:
    """A grid by name or by its levels, which may stand in a list."""
    if isinstance(value, str):
        return check_slug("grid", value)
    numbers = value if isinstance(value, list | tuple) else ()
    levels = tuple(float(n) for n in numbers if type(n) in (int, float))
    if len(levels) < 2 or len(levels) < len(numbers) or not min(levels) >= 0:
        raise ValueError(f"must be a name, or a list of levels, got {shown(value)}")
    if not all(a > b for a, b in pairwise(levels)):
        raise ValueError(f"must be levels that strictly decrease, got {shown(value)}")
    return levels


def _budget(key: str) -> str:
    if not (key.isascii() and key.isdecimal() and 0 < int(key) < 10_000):
        raise ValueError("must be keyed by a number of evaluations, like '5'")
    return key


Grid = Annotated[Any, AfterValidator(_grid)]
Budget = Annotated[str, AfterValidator(_budget)]


def _scale(value: Any) -> float | tuple[float, float] | None:
    """A guidance scale, or the ends of a range of them."""
    if value is None:
        return None
    ends: tuple[Any, ...] = tuple(value) if isinstance(value, list | tuple) else (value,)
    pair = isinstance(value, list | tuple)
    plain = all(type(end) in (int, float) and 0 <= end < float("inf") for end in ends)
    if not plain or len(ends) != 1 + pair or ends[0] > ends[-1]:
        raise ValueError(f"must be a scale, or two that rise, got {shown(value)}")
    return (float(ends[0]), float(ends[-1])) if pair else float(ends[0])


@record
class Choice:
    """The best known way to spend one budget.

    solver: its name
    grid, afs, end: where they are not the model's usual ones; a grid is a name or its levels
    learned: the name of a learned solver beside the card that is better at exactly this budget
    phases: how many segments a student is told that the path is gone in
    """

    solver: Slug
    grid: Grid = None
    afs: Slug | None = None
    end: Slug | None = None
    learned: Slug | None = None
    phases: Annotated[int, Field(ge=1, le=64)] | None = None

    def given(self) -> dict[str, Any]:
        """The fields that say something, JSON-ready."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@record
class Distilled:
    """How a network was distilled, and on which levels it may be sampled.

    rule: of the weights of the sub-path, where the method has any
    gamma_input: how the network is told gamma: embedding or none
    guidance: the scale that it imitates, or the ends of the range that it is told
    teacher, teacher_weights: the name and the weights' hash of the model that it imitates
    teacher_step: the solver and the evaluations of one step of the teacher
    levels: from sigma_max down
    boundary: clean, or discrete as published for networks in discrete time
    phases: in how many segments it goes the path: a number, or those that it can be told; none is 1
    """

    method: Slug
    levels: Levels
    teacher: Slug
    teacher_weights: Digest
    boundary: Annotated[Text, Field(pattern="^(clean|discrete)$")] = "clean"
    rule: Slug | None = None
    gamma_input: Slug = "none"
    guidance: Annotated[Any, AfterValidator(_scale)] = None
    teacher_step: Text = ""
    phases: tuple[Annotated[int, Field(ge=1, le=64)], ...] = ()


@record
class Card:
    """Facts about a model, JSON-ready.

    name: letters, digits and . _ + -
    kind: what the weights are, which selects the loader
    network: the configuration of its network, which the loader of its kind checks
    classes: their names, in order
    feature_module: dotted name of the module whose output feature taps read
    weights_sha256: hash of the weights file
    grid, end: the usual grid and its end, for a solver that is named without them
    auto: for each budget (as a string) the best known solver
    screened: for each budget the best setting of each named solver, found on validation seeds
    distilled: for a network that was distilled, how
    about: recipe, data, licence and figures, for people
    folder: where the card lies; not part of it

    Raises:
        ValueError: that names the field, for a value of the wrong kind.
    """

    name: Slug
    network: dict[str, Any] = field(default_factory=dict)
    summary: Text = ""
    classes: Annotated[tuple[Text, ...], Field(max_length=MOST_CLASSES)] = ()
    sigma_min: Real = 0.002
    sigma_max: Real = 80.0
    sigma_data: Real = 0.5
    feature_module: Annotated[Text, Field(pattern=r"^[\w.]*$")] = "middle"
    weights_sha256: Digest = ""
    grid: Slug = "karras"
    end: Slug = "sigma_min"
    auto: dict[Budget, Choice] = field(default_factory=dict)
    screened: dict[Budget, tuple[Choice, ...]] = field(default_factory=dict)
    distilled: Distilled | None = None
    about: dict[str, Any] = field(default_factory=dict)
    kind: Slug = "unet"
    format: Text = FORMAT
    folder: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"need 0 < sigma_min < sigma_max, got {self.sigma_min}, {self.sigma_max}"
            )
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data must be positive, got {self.sigma_data}")

    @property
    def told(self) -> tuple[str, ...]:
        """Names of the further numbers that its network is told."""
        told = self.network.get("told", ())
        return tuple(told) if isinstance(told, list | tuple) else ()

    @property
    def picture(self) -> tuple[int, int, int] | None:
        """Shape of one picture, (h, w, c), where the network's configuration says it."""
        size, channels = (self.network.get(name) for name in ("size", "channels"))
        return (size, size, channels) if size and channels else None

    @property
    def built_in_guidance(self) -> float | None:
        """The guidance scale that a student imitates in one pass and that cannot be changed; None
        where there is none, or it is told the scale."""
        if self.distilled is None or "guidance" in self.told:
            return None
        scale = self.distilled.guidance
        low = scale[0] if isinstance(scale, tuple) else scale
        return None if low in (None, 1) else low

    @property
    def in_segments(self) -> bool:
        """Whether it is a student that goes its path in more than one segment."""
        return self.distilled is not None and self.distilled.phases not in ((), (1,))

    def phases(self, nfe: int) -> int | None:
        """The number of segments that its network is told at a budget: the choice's, else the most
        that it knows up to that; None where it is told none."""
        if "phases" not in self.told or self.distilled is None:
            return None
        choice = self.auto.get(str(nfe))
        if choice is not None and choice.phases is not None:
            return choice.phases
        return max((k for k in self.distilled.phases if k <= nfe), default=1)

    def to_dict(self) -> dict[str, Any]:
        """As it is written, JSON-ready; `auto` names only what is chosen."""
        values = {"format": self.format, **asdict(self)}
        del values["folder"]
        auto = {nfe: choice.given() for nfe, choice in self.auto.items()}
        screened = {nfe: [one.given() for one in rows] for nfe, rows in self.screened.items()}
        del values["screened"]
        return {**values, "auto": auto, **({"screened": screened} if screened else {})}

    def setting(self, solver: str, nfe: int) -> dict[str, Any]:
        """The screened setting of a solver: grid, afs and end. That of the budget, or of the next
        lower one that has it; empty where there is none."""
        for budget in sorted((int(key) for key in self.screened if int(key) <= nfe), reverse=True):
            for choice in self.screened[str(budget)]:
                if choice.solver == solver:
                    return {name: v for name, v in choice.given().items() if name != "solver"}
        return {}

    def learned(self, nfe: int) -> Path | None:
        """The folder of the learned solver that is the best known at this budget, if there is
        one."""
        choice = self.auto.get(str(nfe))
        if choice is None or choice.learned is None or self.folder is None:
            return None
        return self.folder / SOLVERS / choice.learned / str(nfe)

    def shipped(self, solver: str) -> Path | None:
        """The folder of the learned solvers of that name that come with the model, if any do."""
        if self.folder is None or Path(solver).name != solver:
            return None
        folder = self.folder / SOLVERS / solver
        return folder if folder.is_dir() else None

    @classmethod
    def read(cls, folder: Path) -> Card:
        """The card of a model folder.

        Raises:
            ValueError: that names the file, where it is not a card, or a newer one.
        """
        path = folder / CARD_FILE
        values = read_json(path, "a model card of fewstep")
        if (found := values.get("format")) != FORMAT:
            raise ValueError(
                f"{path} has format {shown(found)}, this version reads {FORMAT!r}; update fewstep"
            )
        try:
            if "folder" in values:
                raise ValueError("it has an unknown field 'folder'")
            return replace(cls(**values), folder=folder)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a model card of fewstep: {error}") from None
