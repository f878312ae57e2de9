"""The settings of a solver's training. It imports no torch: the command reads its options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fewstep.arguments import either, levels, number, text, whole

__all__ = ["TRAINING", "VALIDATION", "MethodOptions", "Settings"]

TRAINING, VALIDATION = 2_000_000, 1_000_000  # first seeds; those below are for final tests


@dataclass(frozen=True)
class Settings:
    """What is chosen for a training; what is None follows from the method and the network.

    The command shows these lines as its help.

    Attributes:
        method: tuned, amed, amed-plugin or grid.
        base: The solver that is improved on. Default: ipndm-4 for amed-plugin; else dpmpp-2m on
            pipelines, ipndm-3 elsewhere, ipndm-2 up to 3 evaluations. On students
            consistency-kappa, and consistency-ode for amed-plugin.
        nfe: Network evaluations per picture.
        trajectories: Length of the run in pictures.
        batch: Pictures at a time.
        grid: A grid's name, sigmas like 80,9,1,0.002, or search: find one. Default: search;
            on pipelines trailing, and for the AMED methods discrete; on students their levels.
        sigma_min: Lowest level of the grid. Default: the network's.
        sigma_max: Highest level of the grid. Default: the network's.
        afs: Analytic first step, at no evaluation: none, zero or mean.
        end: Where a named grid ends: sigma_min, or zero, for tuned and grid. Default: zero for
            these on pipelines, else sigma_min.
        teacher: A deterministic solver's name. Default: deis-3; for tuned deis-4.
        inner: Points that the teacher adds inside each interval; for tuned, on the whole way.
            Default: 2; for tuned 30.
        lr: Learning rate of Adam. Default: 0.02.
        seed: Decides first weights and noise.
        validation_seeds: Pictures compared with reference solves.
        checkpoint_every: Batches between checkpoints.
        validate_every: Batches between validations.
        checkpointed: Compute tuned's gradients in the memory of one call, in half more of its time.
        fallback: Where the best training-free solver was not beaten, it is the result.
        options: Options of the method, see `MethodOptions`.

    Raises:
        ValueError: a count is no integer, or too small.
    """

    method: str = "tuned"
    base: str | None = None
    nfe: int = 5
    trajectories: int = 10_000
    batch: int = 128
    grid: str | Sequence[float] | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    afs: str | None = None
    end: str | None = None
    teacher: str | None = None
    inner: int | None = None
    lr: float | None = None
    seed: int = 0
    validation_seeds: int = 64
    checkpoint_every: int = 5
    validate_every: int = 10
    checkpointed: bool = True
    fallback: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (
            ("trajectories", 1),
            ("batch", 1),
            ("seed", 0),
            ("validation_seeds", 1),
            ("validate_every", 1),
            ("checkpoint_every", 1),
            ("nfe", 1),
        ):
            whole(name, getattr(self, name), least)
        for name in ("base", "teacher", "afs", "end"):
            if getattr(self, name) is not None:
                text(name, getattr(self, name))
        for name in ("sigma_min", "sigma_max", "lr"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), finite=False)
        if self.inner is not None:
            whole("inner", self.inner, 0)
        for name in ("checkpointed", "fallback"):
            either(name, getattr(self, name))
        text("method", self.method)
        if not isinstance(self.grid, str | None):
            object.__setattr__(self, "grid", levels("grid", self.grid))

    @classmethod
    def of(cls, values: dict[str, Any]) -> Settings:
        """From keywords; those that are no field are options of the method."""
        known = {name: values[name] for name in values if name in cls.__dataclass_fields__}
        return cls(**known, options={n: v for n, v in values.items() if n not in known})

    @property
    def begin(self) -> int:
        """The first seed; runs of different `seed` share none."""
        return TRAINING + self.seed * self.trajectories


@dataclass(frozen=True)
class MethodOptions:
    """Options of single methods.

    Attributes:
        scale_dir: amed, amed-plugin: how far c may be from 1. Default: 0.01.
        scale_time: amed, amed-plugin: how far a may be from 1. Default: 0.
        features: amed, amed-plugin: read the network's features. Without them the solver is a
            table of numbers. Default: where there are any.
        parts: tuned: what is learned. Default: times,told,weights.
        squared: tuned: the loss is the squared distance, not the distance.
        shift: tuned: weight of the shift that all ends share. Default: 2 in features, else 0.
    """

    scale_dir: float | None = None
    scale_time: float | None = None
    features: bool | None = None
    parts: tuple[str, ...] | None = None
    squared: bool | None = None
    shift: float | None = None
