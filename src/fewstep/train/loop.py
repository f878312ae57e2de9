"""The one loop of every training: steps, validations, checkpoints, reports, interrupts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

import torch

from fewstep.files import alone, open_folder, sweep
from fewstep.train.checkpoint import CHECKPOINT, Head, check_length, read_head, restore, save
from fewstep.train.interrupts import Stopped, between_steps
from fewstep.train.log import LOG, Log
from fewstep.train.processes import Team
from fewstep.train.run import Identity, Run

__all__ = ["Folder", "Progress", "Schedule", "Step", "Task", "check_every", "train"]

ALONE = Team()


@dataclass(frozen=True)
class Step:
    """What one step of a task gives back.

    lr: of its last update
    learned: what the method has to show of its numbers
    """

    loss: float
    lr: float
    learned: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """One step of a training, as it is reported.

    examples: pictures or trajectories that were seen so far
    per_second: of them, since this process began
    seconds_left: an estimate
    validation: after a step that was followed by one
    """

    step: int
    total_steps: int
    loss: float
    lr: float
    examples: int = 0
    per_second: float = 0.0
    seconds_left: float = 0.0
    learned: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] | None = None


class Task(Protocol):
    """What is particular to a training.

    run: its state; the loop counts its steps
    """

    @property
    def run(self) -> Run: ...

    def update(self, step: int) -> Step:
        """Everything after `step` earlier ones. Raises: FloatingPointError, before anything has
        changed, where a loss is not finite."""
        ...

    def validate(self) -> dict[str, float]:
        """Figures of the state as it is. Called by rank 0 alone."""
        ...


@dataclass(frozen=True)
class Schedule:
    """How long, and how often; all in steps.

    batch: examples of a step; the last one may have fewer
    examples: of the whole run; batch * total_steps unless given
    unit: what they are, in the log
    validate_every: None for no validation
    """

    total_steps: int
    batch: int
    checkpoint_every: int = 100
    validate_every: int | None = 1000
    examples: int | None = None
    unit: str = "pictures"

    def __post_init__(self) -> None:
        check_every(checkpoint_every=self.checkpoint_every)
        if self.validate_every is not None:
            check_every(validate_every=self.validate_every)

    def seen(self, step: int) -> int:
        """Examples after so many steps."""
        return min(step * self.batch, self.examples or self.total_steps * self.batch)

    def validates(self, step: int) -> bool:
        every = self.validate_every
        return every is not None and (step == self.total_steps or step % every == 0)

    def saves(self, step: int) -> bool:
        return step == self.total_steps or step % self.checkpoint_every == 0


def check_every(**counts: object) -> None:
    """Raises: ValueError, with the name, for what is not a positive integer."""
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer, at least 1, got {value!r}")


class Folder:
    """The files of a run in its folder; without one, everything stays in memory.

    Used as a context manager. Inside, from `check` on, no other process has the folder.

    Args:
        path: of the folder, or None.
        results: the names of what comes out of such a training. Where one is there and no
            checkpoint, it is another's.
        inner: folders inside it that the training writes to.
    """

    def __init__(
        self, path: Path | None, results: Sequence[str] = (), inner: Sequence[str] = ()
    ) -> None:
        self.path, self.results, self.inner = path, results, inner
        self.log = Log(None if path is None else path / LOG)
        self.held, self.checked = ExitStack(), False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.held.close()

    def look(self, identity: Identity, longest: int) -> None:
        """Check what is there already, before work that a run may ask for first. Makes nothing.

        Args:
            identity: as far as it is known; inputs that it leaves out are compared later
            longest: the step at which the run ends

        Raises:
            OSError, ValueError: as in `check`, and where the checkpoint is another run's.
        """
        if self.path is not None and self.path.is_dir():
            self.check()
            if (head := self.head(identity)) is not None:
                check_length(self.path / CHECKPOINT, head, longest)

    def check(self) -> None:
        """Make and sweep it, before any work; once.

        Raises:
            OSError: where it cannot be written.
            ValueError: where it holds the result of something else, or another process has it.
        """
        if self.path is None or self.checked:
            return
        self.checked = True
        open_folder(self.path)
        self.held.enter_context(alone(self.path))
        for name in self.inner:
            sweep(self.path / name)
        others = [name for name in self.results if (self.path / name).exists()]
        if others and self.checkpoint is None:
            raise ValueError(
                f"{self.path} has a {others[0]} but no {CHECKPOINT}, so it is another's; "
                "give another folder"
            )

    @property
    def checkpoint(self) -> Path | None:
        """The file, where there is one."""
        file = None if self.path is None else self.path / CHECKPOINT
        return file if file is not None and file.exists() else None

    def head(self, identity: Identity) -> Head | None:
        """Of the checkpoint that is there. Raises: ValueError where it is another run's."""
        return None if self.checkpoint is None else read_head(self.checkpoint, identity)

    def resume(self, run: Run, longest: int) -> bool:
        """Take up the checkpoint and the log; whether they were there. Raises: ValueError."""
        if found := self.checkpoint:
            restore(found, run, longest)
        self.log.read(run.step if found else -1)
        return found is not None

    def save(self, run: Run) -> None:
        if self.path is not None:
            save(self.path / CHECKPOINT, run)


def share(run: Run, team: Team) -> None:
    """Give the state of rank 0 to the other processes."""
    tensors = list(run.tensors.values())
    count = torch.tensor(run.step, device=tensors[0].device)
    team.share([*tensors, count])
    run.state["step"] = int(count)


def train(
    task: Task,
    folder: Folder,
    plan: Schedule,
    report: Callable[[Progress], None] = lambda progress: None,
    team: Team = ALONE,
) -> None:
    """From the run's step to its end; files and reports are those of rank 0.

    On Ctrl-C and SIGTERM the step is finished and a checkpoint saved before `Stopped` is raised.
    """
    run, first, begun = task.run, task.run.step, time.perf_counter()
    device = next((value.device for value in run.tensors.values()), torch.device("cpu"))
    with between_steps() as stopping:
        while run.step < plan.total_steps:
            done = task.update(run.step)
            run.state["step"] += 1
            figures: dict[str, float] | None = None
            if team.leads and plan.validates(run.step):
                figures = task.validate()
                line = {"step": run.step, plan.unit: plan.seen(run.step)}
                folder.log.add({**line, "training_loss": done.loss, **done.learned, **figures})
            number = stopping()
            stop = team.any(bool(number), device)
            if team.leads:
                if stop or plan.saves(run.step):
                    folder.save(run)
                report(_progress(run.step, first, begun, done, plan, figures))
            if stop:
                team.wait()  # for what rank 0 saves
                raise Stopped(number)


def _progress(
    step: int,
    first: int,
    begun: float,
    done: Step,
    plan: Schedule,
    figures: dict[str, float] | None,
) -> Progress:
    seconds = time.perf_counter() - begun
    seen, left = plan.seen(step), plan.total_steps - step
    return Progress(
        step,
        plan.total_steps,
        done.loss,
        done.lr,
        seen,
        (seen - plan.seen(first)) / seconds,
        seconds / (step - first) * left,
        done.learned,
        figures,
    )
