"""The settings of a distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.arguments import text, whole

__all__ = ["Encoding", "Recipe"]

METHODS = ("splam", "lcm", "trajectory")
TOLD = ("gamma", "level")
TRAIN = ("full", "lora")
OPTIMIZERS = ("adam", "adamw8bit")  # what `fewstep.train.optimiser` has
RATE = 3e-4
RULES = ("linear", "variance")  # what `subpath` has
WEIGHTS = ("clean", "edge")
MOST_PHASES = 64
MOST_PATHS = 1_024  # sub-paths that numbers of segments may ask for


@dataclass(frozen=True)
class Recipe:
    """What decides the trained weights, on one kind of machine to the bit.

    The command shows these lines as its help.

    Attributes:
        method: splam; lcm: consistency distillation, gamma = 1 throughout; or trajectory: the
            student's own steps, from noise, each to the teacher's state at the next level.
        points: Levels of the training grid. Default: 10; 11 of pipelines.
        grid: Kind of that grid: time-uniform, karras, log-snr; discrete and trailing go by the
            network's own time. Default: time-uniform; trailing of pipelines.
        teacher: A solver's name; addim, for 4 and more segments; a plan's JSON file, or a learned
            solver's folder. A plan brings its own grid and steps.
        substeps: Steps of the teacher on one sub-path. Default: 2.
        guidance: The teacher's guidance scale. LOW,HIGH draws one for each picture and tells it to
            the student. Default: none.
        phases: In how many segments the path is gone, as 4; or several, as 1,2,4,8, of which the
            student is told one. Default: 1, the whole path at once.
        phase_weight: Whether the loss of a segment is of clean pictures or of states at its edge.
            Default: clean.
        end_to_end: The loss of a trajectory is at its end alone, through all steps.
        start: A student of the same teacher, whose weights are the first ones.
        gamma_one: Share of draws with gamma = 1, as in sampling. Only for splam. Default: 0.5.
        tell: What tells the student its place on the line: level, the noise level there, or gamma,
            as published. Only for splam. Default: level.
        rule: How that level follows from gamma: linear, or variance as published. Only for splam.
            Default: linear; variance with gamma.
        loss: huber or l2, of pixels or latents; decoder, of the first maps of a pipeline's decoder;
            or a feature network, by its name or folder, and pixels beside it.
        pictures: Length of the run in pictures, rounded up to whole batches.
        batch: Pictures per step, over all processes.
        accumulate: Parts in which a process takes its share of a batch, to save memory.
        optimizer: adam, or adamw8bit: its moments in 8 bits, by the library bitsandbytes.
        lr: Learning rate of Adam. Default: 3e-4; of pipelines 1e-5, and 1e-4 of their adapters.
        warmup: First share of the run, over which the learning rate rises.
        cooldown: Last share of the run, over which it falls to 0.
        label_dropout: Share of pictures without their condition, for networks that have conditions.
            Default: 0.5; 0.1 of texts.
        target_decay: Decay of the average of the student that gives the target.
        clip: Largest norm of a gradient.
        train: full: the whole network; lora: adapters alone, of a pipeline.
        rank: Of the adapters. Default: 64.
        targets: Layers that get adapters, by the ends of their names, with commas. Default: those
            of LCM-LoRA.
        checkpointing: Compute activations of a pipeline's network again, to save memory.
        dtype: Arithmetic of the networks, bfloat16 or float32; weights stay float32.
        compile: Use torch.compile: faster for long runs, minutes at the start, other rounding.
        seed: Decides data order and noise.

    Raises:
        ValueError: a number is outside its range, or the method has no such setting.
    """

    method: str = "splam"
    points: int | None = None
    grid: str | None = None
    teacher: str = "unipc-2"
    substeps: int | None = None
    guidance: float | tuple[float, float] | None = None
    phases: int | tuple[int, ...] | None = None
    phase_weight: str | None = None
    end_to_end: bool = False
    start: str | None = None
    gamma_one: float | None = None
    tell: str | None = None
    rule: str | None = None
    loss: str = "huber"
    pictures: int = 500_000
    batch: int = 128
    accumulate: int = 1
    optimizer: str = "adam"
    lr: float | None = None
    warmup: float = 0.05
    cooldown: float = 0.3
    label_dropout: float | None = None
    target_decay: float = 0.95
    clip: float = 1.0
    train: str = "full"
    rank: int | None = None
    targets: tuple[str, ...] | None = None
    checkpointing: bool = False
    dtype: str = "bfloat16"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", METHODS),
            ("dtype", ("bfloat16", "float32")),
            ("train", TRAIN),
            ("optimizer", OPTIMIZERS),
            ("rule", (None, *RULES)),
            ("tell", (None, *TOLD)),
            ("phase_weight", (None, *WEIGHTS)),
        ):
            if (value := getattr(self, name)) not in allowed:
                named = ", ".join(str(one) for one in allowed if one)
                raise ValueError(f"{name} must be one of {named}, got {value!r}")
        if self.method != "splam":
            for name in ("gamma_one", "rule", "tell"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(
                        f"{name}={value} has no effect with method {self.method}, where gamma is 1 "
                        "throughout; leave it out"
                    )
        for name in ("teacher", "loss"):
            text(name, getattr(self, name))
        if self.start is not None:
            text("start", self.start)
        self._check_phases()
        self._check_trajectory()
        for name in ("rank", "targets"):
            if self.train != "lora" and (value := getattr(self, name)) is not None:
                raise ValueError(f"{name}={value} is of adapters; give train lora too")
        if self.compile and (self.train == "lora" or self.checkpointing):
            raise ValueError("compile does not go with train lora or checkpointing; leave it out")
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
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
            ("lr", self.lr is None or 0 < self.lr < math.inf, "positive"),
            ("rank", self.rank is None or self.rank >= 1, "positive"),
            ("targets", self.targets is None or all(self.targets), "names"),
            ("warmup", 0 <= self.warmup <= 1, "between 0 and 1"),
            ("cooldown", 0 <= self.cooldown <= 1 - self.warmup + 1e-9, "between 0 and 1 - warmup"),
            ("label_dropout", 0 <= self.dropout <= 1, "between 0 and 1"),
            ("target_decay", 0 <= self.target_decay < 1, "at least 0 and below 1"),
            ("clip", self.clip > 0, "positive"),
            ("seed", -(2**63) <= self.seed < 2**63, "a 64-bit integer"),
        ):
            if not fine:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)}")

    def _check_phases(self) -> None:
        """Raise ValueError for settings that do not go with the segments."""
        if self.phases is not None:  # lists, as JSON has them
            several = isinstance(self.phases, tuple | list)
            given: Any = self.phases if several else (self.phases,)
            phases = tuple(whole("phases", one) for one in given)
            object.__setattr__(self, "phases", phases)
            if list(phases) != sorted(set(phases)) or not phases:
                raise ValueError(f"phases must be numbers that rise, got {given}")
            if not 1 <= phases[0] <= phases[-1] <= MOST_PHASES:
                raise ValueError(f"phases must be from 1 to {MOST_PHASES}, got {given}")
            if math.lcm(*phases) > MOST_PATHS:
                raise ValueError(
                    f"phases must divide a grid of at most {MOST_PATHS} sub-paths, got {given}"
                )
        if self.segments != (1,) and self.tell == "gamma":
            raise ValueError("phases go with tell level, for gamma is of the whole path")
        if self.phase_weight is not None and self.segments == (1,):
            raise ValueError("phase_weight has no effect without phases; leave it out")
        if self.start is not None and self.train == "lora":
            raise ValueError("start is a whole student, and adapters are trained; leave it out")

    def _check_trajectory(self) -> None:
        """Raise ValueError for settings that do not go with the method."""
        if self.end_to_end and self.method != "trajectory":
            raise ValueError(f"end_to_end is of method trajectory, not of {self.method}")
        if self.end_to_end and self.phase_weight is not None:
            raise ValueError("phase_weight has no effect end to end; leave it out")
        if self.method == "trajectory" and self.compile:
            raise ValueError("compile does not go with method trajectory; leave it out")
        if self.method == "trajectory" and self.target_decay != Recipe.target_decay:
            raise ValueError("target_decay has no effect with method trajectory; leave it out")

    @property
    def segments(self) -> tuple[int, ...]:
        """The numbers of segments that are trained."""
        return (self.phases,) if isinstance(self.phases, int) else self.phases or (1,)

    @property
    def total_steps(self) -> int:
        return math.ceil(self.pictures / self.batch)

    @property
    def ones(self) -> float:
        """The share of draws with gamma = 1."""
        if self.method != "splam":
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
        gamma, several = self.tell == "gamma", len(self.segments) > 1
        return ("gamma",) * gamma + ("guidance",) * (low < high) + ("phases",) * several

    def lr_at(self, step: int) -> float:
        """Learning rate of the update after `step` earlier ones."""
        rise = (step + 1) / (self.warmup * self.total_steps + 1)
        fall = (self.total_steps - step) / (self.cooldown * self.total_steps + 1)
        return (RATE if self.lr is None else self.lr) * min(1.0, rise, fall)


@dataclass(frozen=True)
class Encoding:
    """How pictures and texts become the data of a student.

    Attributes:
        captions: A file with the caption of each picture, by its name; without pictures, the texts.
        most_bad: Samples that may be left out because they cannot be read.
        starts: Without pictures: how many of the teacher's own. Default: one per text, or 10,000.
        cache_gib: Most that the cache of latents may take on disk, in GiB.
    """

    captions: Path | None = None
    most_bad: int = 100
    starts: int | None = None
    cache_gib: float = 50.0

    def __post_init__(self) -> None:
        for name, fine, rule in (
            ("most_bad", self.most_bad >= 0, "at least 0"),
            ("starts", self.starts is None or self.starts >= 1, "at least 1"),
            ("cache_gib", self.cache_gib > 0, "positive"),
        ):
            if not fine:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)}")
