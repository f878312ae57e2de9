"""What handing out costs the driver: simulated workers, real manifest, no network.

    python -m benchmarks.scale_schedule --workers 1024 --pictures 10000000

Workers answer at once, in an order of their own; each shard is a file of one byte. The driver is
the one of `fewstep sample`. Printed as JSON: its processor time for a shard, its memory, and how
long the finished manifest takes to read and to check. `--ray N` hands the same items to N real
actors of Ray, that do nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep.scale.executors import Counts, Executor, hand_out
from fewstep.scale.manifest import Job, Line, Manifest, hash_of, read_job, shard_files
from fewstep.scale.rays import Ray
from fewstep.scale.run import Plan, finish
from fewstep.scale.settings import Scaling
from fewstep.scale.shards import Shard
from fewstep.scale.stores import open_store
from fewstep.scale.work import Outcome, Place

SHARD = 256


@dataclass(frozen=True)
class Nothing:
    """Work that writes a byte for each shard."""

    job: Job
    place: str

    def open(self, place: Place) -> Callable[[Shard], Line]:
        return self.make

    def make(self, shard: Shard) -> Line:
        (Path(self.place) / shard_files(self.job, shard.number)[0]).write_bytes(b"0")
        count = len(self.job.part(shard.number))
        host, now = f"node-{shard.number % 128}", round(time.time(), 3)
        key = self.job.key
        return Line(key, shard.number, count, hash_of([b"0"]), 1, 64, host, os.getpid(), 1.0, now)


@dataclass(eq=False)
class Simulated:
    """Workers that answer when a random number of others were asked."""

    count: int
    do: Callable[[Shard], Line]
    waiting: list[tuple[Future[Outcome], Any]] = field(default_factory=list)

    def submit(self, worker: int, item: Any) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        if item is None:
            future.set_result(Outcome())
            return future
        self.waiting.append((future, item))
        if len(self.waiting) >= self.count or item.number >= self.last:
            random.shuffle(self.waiting)
            asked, self.waiting = self.waiting, []
            for one, shard in asked:
                one.set_result(Outcome(self.do(shard)))
        return future

    last: int = 0

    def replace(self, worker: int) -> None:
        raise NotImplementedError


@dataclass(eq=False)
class Workers:
    """An executor of simulated workers."""

    workers: int
    last: int
    leads: bool = True
    here: None = None
    counts: Counts = field(default_factory=Counts)

    def map(self, work: Any, items: Iterable[Any]) -> Generator[tuple[Any, Outcome], None, None]:
        yield from hand_out(Simulated(self.workers, work.make, last=self.last), items, self.counts)

    def serve(self, work: Any) -> None:
        raise NotImplementedError

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def measured(executor: Executor, pictures: int, place: str) -> dict[str, Any]:
    """A job of shards of nothing."""
    facts = {"solver": "none", "nfe": 1}
    job = Job(
        "pictures",
        "none",
        pictures,
        SHARD,
        64,
        "tar",
        (),
        f"0 to {pictures}",
        "0",
        (32, 32, 1),
        facts,
    )
    (Path(place) / "shards").mkdir(parents=True)
    seeds = range(pictures)

    def item(number: int) -> Shard:
        part = job.part(number)
        return Shard(0, number, seeds[part.start : part.stop])

    before, base = time.process_time(), peak()
    begun = time.monotonic()
    work, plan = Nothing(job, place), Plan(job, place, item)
    [result] = finish(work, [plan], executor)
    spent, wall = time.process_time() - before, time.monotonic() - begun
    assert result.made == job.shards
    begun = time.process_time()
    lines = Manifest(open_store(place), job).lines()
    read = time.process_time() - begun
    assert read_job(open_store(place)) == job
    assert len(lines) == job.shards
    begun = time.process_time()
    survey = Manifest(open_store(place), job).survey()
    checked = time.process_time() - begun
    assert len(survey.lines) == job.shards
    return {
        "pictures": pictures,
        "shards": job.shards,
        "workers": executor.workers,
        "driver_ms_per_shard": round(1000 * spent / job.shards, 3),
        "wall_seconds": round(wall, 1),
        "driver_peak_mb": round(peak()),
        "of_it_before_mb": round(base),
        "manifest_mb": round(sum(open_store(place).sizes("manifest").values()) / 1e6, 1),
        "manifest_read_s": round(read, 2),
        "manifest_and_files_checked_s": round(checked, 2),
    }


def peak() -> float:
    """MB that this process has taken at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=1024)
    parser.add_argument("--pictures", type=int, default=10_000_000)
    parser.add_argument("--ray", type=int, help="so many real actors, in place of simulated ones")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        last = -(-args.pictures // SHARD) - args.workers
        executor: Executor = Workers(args.workers, last)
        if args.ray:
            executor = Ray.of(Scaling("ray", args.ray))
        with executor:
            print(json.dumps(measured(executor, args.pictures, f"{folder}/out"), indent=1))


if __name__ == "__main__":
    main()
