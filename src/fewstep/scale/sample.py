"""`fewstep sample` in shards: one job, handed to an executor, until every shard is there."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from fewstep.models import Model
from fewstep.models.identity import digest_of
from fewstep.models.labels import drawn_labels
from fewstep.sampling.folder import Facts
from fewstep.sampling.generate import Run, batch_size
from fewstep.sampling.request import CONDITIONS, Request
from fewstep.sampling.settings import Settings
from fewstep.scale.executors import Executor
from fewstep.scale.manifest import Job
from fewstep.scale.run import Plan, Result, finish
from fewstep.scale.settings import KEEPS
from fewstep.scale.shards import (
    Judges,
    Looks,
    SampleWork,
    Shard,
    Source,
    Task,
    picture_of,
)
from fewstep.scale.work import Place, device_at
from fewstep.text import span

__all__ = ["SHARD", "Asked", "plan_of", "judges_here", "sample_shards", "task_of", "work_of"]

Keep = Literal["tar", "png", "none"]

SHARD = 256  # pictures of a shard, as a rule


@dataclass(frozen=True)
class Asked:
    """What is sampled into one place.

    place: a folder or URL
    seeds: one per picture; a range where they run on, for there may be millions
    given: conditions, one for all or a list with one per picture
    names: of the pictures, without suffix; those of the seeds where left out
    shards: how many files at most; as many as have SHARD pictures where left out
    keep: tar, png or none, of the pictures
    looks: what looks at the pictures while they are made
    """

    place: str
    seeds: Sequence[int]
    settings: Settings = field(default_factory=Settings)
    given: dict[str, Any] = field(default_factory=dict)
    names: Sequence[str] | None = None
    shards: int | None = None
    batch: int | None = None
    keep: str = "tar"
    looks: Looks = Looks()

    def __post_init__(self) -> None:
        if self.keep not in KEEPS:
            raise ValueError(f"keep must be tar, png or none, got {self.keep!r}")
        if self.keep == "none" and self.looks == Looks():
            raise ValueError(
                "keep none leaves nothing of the pictures; name --features, or keep tar"
            )
        if self.shards is not None and self.shards < 1:
            raise ValueError(f"shards must be at least 1, got {self.shards}")
        if not len(self.seeds):
            raise ValueError("seeds must name at least one picture")
        names = self.seeds if self.names is None else self.names
        if not isinstance(names, range) and len(set(names)) != len(self.seeds):
            raise ValueError("each picture needs a name of its own; is a seed there twice?")

    @property
    def each(self) -> tuple[str, ...]:
        """The conditions that have one value per picture."""
        return tuple(n for n in CONDITIONS if isinstance(self.given.get(n), list | tuple))

    def drawn(self, model: Model) -> Asked:
        """With a class for each picture, where the label is "all"."""
        if self.given.get("label") != "all":
            return self
        return replace(self, given={**self.given, "label": drawn_labels(self.seeds, model)})

    def request(self, part: range) -> Request:
        """That of some of the pictures."""
        chosen = slice(part.start, part.stop)
        given = {n: v[chosen] if n in self.each else v for n, v in self.given.items()}
        return Request(tuple(self.seeds[chosen]), **given)


def job_of(asked: Asked, model: Model, looks: Judges) -> tuple[Job, Request]:
    """The job, checked and filled in, and the conditions of its first pictures.

    Raises:
        ValueError: what the model or the solver cannot do, before any work.
    """
    count, batch = len(asked.seeds), batch_size(model, asked.batch)
    size = SHARD if asked.shards is None else math.ceil(count / asked.shards)
    size = math.ceil(size / batch) * batch  # so that batches are those of one process
    first = asked.request(range(min(batch, count)))
    run = Run.of(model, first, asked.settings, batch)
    if "label" in asked.each:  # raises now for an unknown one in a later shard
        model.denoiser(list(dict.fromkeys(asked.given["label"])))
    names = None if asked.names is None else list(asked.names)
    seeds = span(asked.seeds) if len(asked.seeds) <= 20 or _run_on(asked.seeds) else "a list"
    facts = json.loads(json.dumps(Facts.of(run).common))
    conditions = {n: asked.given.get(n) for n in CONDITIONS}
    numbers = seeds if _run_on(asked.seeds) else list(asked.seeds)
    digest = digest_of([numbers, names, conditions])
    job = Job(
        "pictures",
        model.card.name,
        count,
        size,
        batch,
        cast(Keep, asked.keep),
        looks.names,
        seeds,
        digest,
        picture_of(model),
        facts,
    )
    return job, first


def _run_on(seeds: Sequence[int]) -> bool:
    return isinstance(seeds, range) or list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))


def task_of(source: Source, asked: Asked, model: Model, judges: Judges) -> Task:
    """A job as workers need it, checked before any work.

    Args:
        source: the model by name, as workers load it
        asked: what is sampled
        model: the same, loaded by this process
        judges: what looks at the pictures, opened by this process

    Raises:
        ValueError: what the model or the solver cannot do.
    """
    job, first = job_of(asked, model, judges)
    conditions = {n: v for n, v in asked.given.items() if n not in asked.each}
    request = replace(first, **dict.fromkeys(asked.each), **conditions)
    return Task(job, asked.place, source, asked.settings, request, asked.looks)


def judges_here(source: Source, looks: Looks, model: Model, here: Place | None) -> Judges:
    """What looks at the pictures, where this process works, else on the CPU to be asked its name.

    Raises:
        ValueError: there is no such network.
    """
    return looks.open(device_at(source.device, here) if here else "cpu", picture_of(model))


def work_of(source: Source, asked: Asked, model: Model, here: Place | None) -> SampleWork:
    """What workers do for one job.

    Args:
        source, asked, model: as of `task_of`
        here: the place of this process where it is itself a worker, which keeps the model

    Raises:
        ValueError: what the model or the solver cannot do.
    """
    judges = judges_here(source, asked.looks, model, here)
    task = task_of(source, asked, model, judges)
    return SampleWork((task,), (model, judges) if here else None)


def sample_shards(
    source: Source,
    asked: Asked,
    executor: Executor,
    *,
    command: str = "",
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Result | None:
    """Sample into shards; those that are there are skipped, damaged ones are made again.

    Args:
        source: the model by name
        asked: what is sampled
        executor: who does it
        command: for the record
        report: called with what is done, the pictures done and all of them

    Returns:
        What is there now; None in a process that does not lead.

    Raises:
        ValueError: what cannot be done, or another job is in the place: before any work.
        OSError: the place cannot be written.
    """
    model = source.load(executor.here)
    asked = asked.drawn(model)
    work = work_of(source, asked, model, executor.here)
    del model  # the workers have their own
    if not executor.leads:
        executor.serve(work)
        return None
    plans = [plan_of(asked, work.tasks[0].job)]
    return finish(work, plans, executor, command=command, report=report)[0]


def plan_of(asked: Asked, job: Job, task: int = 0) -> Plan:
    """The job with its shards."""
    return Plan(
        job,
        asked.place,
        lambda number: _shard(task, asked, job, number),
    )


def _shard(task: int, asked: Asked, job: Job, number: int) -> Shard:
    part = job.part(number)
    chosen = slice(part.start, part.stop)
    given = tuple((name, tuple(asked.given[name][chosen])) for name in asked.each)
    names = None if asked.names is None else tuple(asked.names[chosen])
    return Shard(task, number, asked.seeds[chosen], names, given)
