"""Jobs are finished: what is missing or damaged goes to an executor, shard by shard."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from typing import Any

from fewstep.provenance import VERSION
from fewstep.scale.executors import Counts, Executor
from fewstep.scale.manifest import Job, Line, Manifest, check_job
from fewstep.scale.stores import Store, open_store
from fewstep.scale.work import Outcome, Work
from fewstep.text import clean

__all__ = ["Plan", "Result", "finish"]

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """A job, and its shards by their numbers.

    place: of its store
    item: what a worker is given; it has a `number`, and as its `task` the place of the plan
    """

    job: Job
    place: str
    item: Callable[[int], Any]


@dataclass(frozen=True)
class Result:
    """What is there now.

    shards, pictures: of the job; skipped: shards that were there already
    damaged: of these, shards that were not as they should be, and were made again
    smaller: shards whose batch was halved where memory ran out
    hosts: machines that made something now
    """

    job: Job
    lines: dict[int, Line] = field(repr=False)
    skipped: int
    damaged: int
    counts: Counts
    seconds: float
    place: str = ""

    @property
    def made(self) -> int:
        return len(self.lines) - self.skipped

    @property
    def smaller(self) -> int:
        return sum(line.batch < self.job.batch for line in self.lines.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "place": self.place,
            "shards": self.job.shards,
            "pictures": self.job.pictures,
            "made": self.made,
            "skipped": self.skipped,
            "damaged": self.damaged,
            "smaller_batches": self.smaller,
            **asdict(self.counts),
            "hosts": sorted({line.host for line in self.lines.values()}),
            "bytes": sum(line.bytes for line in self.lines.values()),
            "seconds": round(self.seconds, 3),
            "settings": self.job.facts,
            "seeds": self.job.seeds,
        }


def finish(
    work: Work,
    plans: Sequence[Plan],
    executor: Executor,
    *,
    command: str = "",
    report: Report = lambda what, done, total: None,
) -> list[Result]:
    """Do the shards of some jobs that are missing or damaged.

    Args:
        work: does an item and returns its `Line`
        plans: the jobs
        executor: who does it
        command: for the record
        report: called with what is done, the pictures done and all of them

    Raises:
        ValueError: another job is in a place, before any work; or a shard cannot be made.
        OSError: a place cannot be written.
    """
    about = {"fewstep": VERSION, "command": command, "made": time.strftime("%Y-%m-%d")}
    manifests = [Manifest(open_store(plan.place), plan.job) for plan in plans]
    for one in manifests:
        check_job(one.store, one.job)
    with ExitStack() as held:
        for one in manifests:
            one.store.prepare()
            held.enter_context(one.store.shared(one.job.key))
            one.begin(**about)
        return _finish(work, plans, manifests, executor, report)


def _finish(
    work: Work,
    plans: Sequence[Plan],
    manifests: Sequence[Manifest],
    executor: Executor,
    report: Report,
) -> list[Result]:
    begun = time.monotonic()
    surveys = [one.survey() for one in manifests]
    lines = [dict(survey.lines) for survey in surveys]
    total = sum(plan.job.pictures for plan in plans)
    done = sum(line.count for found in lines for line in found.values())
    report(plans[0].job.what, done, total)
    seen: set[tuple[int, str]] = set()
    missing = [
        (i, number)
        for i, plan in enumerate(plans)
        for number in range(plan.job.shards)
        if number not in lines[i]
    ]
    items = (plans[i].item(number) for i, number in missing)
    try:
        with closing(executor.map(work, items) if missing else _nothing()) as made:
            for item, outcome in made:
                line, task = outcome.value, item.task
                if (task, line.host) not in seen:
                    seen.add((task, line.host))
                    _check_seen(manifests[task].store, line.files(plans[task].job), line)
                manifests[task].add(line)
                lines[task][item.number] = line
                done += line.count
                report(plans[task].job.what, done, total)
    finally:
        for one in manifests:
            one.flush()
            one.store.tidy()
    seconds = time.monotonic() - begun
    return [
        Result(
            plan.job,
            found,
            len(survey.lines),
            len(survey.damaged),
            executor.counts,
            seconds,
            plan.place,
        )
        for plan, found, survey in zip(plans, lines, surveys, strict=True)
    ]


def _nothing() -> Generator[tuple[Any, Outcome], None, None]:
    yield from ()


def _check_seen(store: Store, names: Sequence[str], line: Line) -> None:
    """Raises OSError where a machine wrote into a folder that only it can see."""
    if names and not store.has(names[0]):
        raise OSError(
            None,
            f"{clean(line.host)} has written {names[0]} there, and it cannot be seen here; give a "
            "folder that all machines share, or a URL",
            store.place,
        )
