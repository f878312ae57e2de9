"""The settings of a distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewstep.distillation.subpath import LOSSES, RULES

__all__ = ["Recipe"]

METHODS = ("splam", "lcm")
TOLD = ("gamma", "level")


@dataclass(frozen=True)
class Recipe:
    """What decides the trained weights, on one kind of machine to the bit.

    method: splam, or lcm, which has gamma = 1 throughout
    points, grid: how many levels the training grid has, and its kind; 10 and "time-uniform" where
        left out
    teacher, substeps: the solver of the teacher's step, and how many it takes on a sub-path, 2
        where left out. A plan as teacher brings grid and steps of its own.
    guidance: scale of the teacher; (low, high) draws one for each picture, which the student is
        then told; None or 1 is none
    gamma_one: the share of the draws in which gamma is 1; 0.5 where left out. For splam only.
    tell: what tells the student where on a line it stands: the "level" of its place, which is also
        what is meant where this is left out; or, as published, "gamma", beside the level of the
        line's noisy end. For splam only.
    rule: what the level of a place is, "variance" as published or "linear"; left out, linear where
        it is told and variance where gamma is. For splam only.
    loss: "huber" or "l2"
    pictures: length of the run, rounded up to whole batches
    batch: pictures per step, over all processes
    accumulate: in how many parts a process takes its share of a batch, to save memory
    warmup: the first share of the run, over which the learning rate rises
    cooldown: the last one, over which it falls to zero
    label_dropout: share of pictures whose condition is left out, 0.5 where left out; for networks
        that have conditions
    target_decay: of the average of the student that gives the target
    clip: largest norm of a gradient
    dtype: arithmetic of the networks; their weights stay float32
    compile: torch.compile the passes, at the price of minutes at the start; changes rounding

    Errors: ValueError for a number outside its range, or a setting that its method does not have.
    """

    method: str = "splam"
    points: int | None = None
    grid: str | None = None
    teacher: str = "unipc-2"
    substeps: int | None = None
    guidance: float | tuple[float, float] | None = None
    gamma_one: float | None = None
    tell: str | None = None
    rule: str | None = None
    loss: str = "huber"
    pictures: int = 500_000
    batch: int = 128
    accumulate: int = 1
    lr: float = 3e-4
    warmup: float = 0.05
    cooldown: float = 0.3
    label_dropout: float | None = None
    target_decay: float = 0.95
    clip: float = 1.0
    dtype: str = "bfloat16"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", METHODS),
            ("loss", tuple(LOSSES)),
            ("dtype", ("bfloat16", "float32")),
            ("rule", (None, *RULES)),
            ("tell", (None, *TOLD)),
        ):
            if (value := getattr(self, name)) not in allowed:
                named = ", ".join(str(one) for one in allowed if one)
                raise ValueError(f"{name} must be one of {named}, got {value!r}")
        if self.method == "lcm":
            for name in ("gamma_one", "rule", "tell"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(
                        f"{name}={value} has no effect with method lcm, where gamma is 1 "
                        "throughout; leave it out"
                    )
        low, high = self.scales
        if isinstance(self.guidance, list):  # as JSON has it
            object.__setattr__(self, "guidance", (low, high))
        for name, fine, rule in (
            ("points", self.points is None or self.points >= 2, "at least 2"),
            ("substeps", self.substeps is None or self.substeps >= 1, "at least 1"),
            ("guidance", 0 <= low <= high < math.inf, "a scale >= 0, or two that rise"),
            ("gamma_one", 0 <= self.ones <= 1, "between 0 and 1"),
            ("pictures", self.pictures >= 1, "positive"),
            ("batch", self.batch >= 1, "positive"),
            ("accumulate", 1 <= self.accumulate <= self.batch, "from 1 to batch"),
            ("lr", 0 < self.lr < math.inf, "positive"),
            ("warmup", 0 <= self.warmup <= 1, "between 0 and 1"),
            ("cooldown", 0 <= self.cooldown <= 1 - self.warmup + 1e-9, "between 0 and 1 - warmup"),
            ("label_dropout", 0 <= self.dropout <= 1, "between 0 and 1"),
            ("target_decay", 0 <= self.target_decay < 1, "at least 0 and below 1"),
            ("clip", self.clip > 0, "positive"),
            ("seed", -(2**63) <= self.seed < 2**63, "a 64-bit integer"),
        ):
            if not fine:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)}")

    @property
    def total_steps(self) -> int:
        return math.ceil(self.pictures / self.batch)

    @property
    def ones(self) -> float:
        """The share of draws with gamma = 1."""
        if self.method == "lcm":
            return 1.0
        return 0.5 if self.gamma_one is None else self.gamma_one

    @property
    def level_rule(self) -> str:
        return self.rule or ("variance" if self.tell == "gamma" else "linear")

    @property
    def dropout(self) -> float:
        """The share of pictures whose condition is left out."""
        return 0.5 if self.label_dropout is None else self.label_dropout

    @property
    def scales(self) -> tuple[float, float]:
        """The range of the guidance scale."""
        if self.guidance is None:
            return 1.0, 1.0
        if isinstance(self.guidance, tuple | list):
            if len(self.guidance) != 2:
                raise ValueError(f"guidance must be one scale or two, got {self.guidance}")
            return float(self.guidance[0]), float(self.guidance[1])
        return float(self.guidance), float(self.guidance)

    @property
    def told(self) -> tuple[str, ...]:
        """The further numbers that the student is told."""
        low, high = self.scales
        gamma = self.tell == "gamma"
        return ("gamma",) * gamma + ("guidance",) * (low < high)

    def lr_at(self, step: int) -> float:
        """Learning rate of the update after `step` earlier ones."""
        rise = (step + 1) / (self.warmup * self.total_steps + 1)
        fall = (self.total_steps - step) / (self.cooldown * self.total_steps + 1)
        return self.lr * min(1.0, rise, fall)
