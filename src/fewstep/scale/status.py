"""What is there of a job, what is missing, the rate and the time left.

It is read from the store alone, on any machine, while the shards are being made or later.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fewstep.scale.manifest import Job, Line, Manifest, read_job
from fewstep.scale.phases import read_phase
from fewstep.scale.stores import Store, open_store
from fewstep.text import clean

__all__ = ["Status", "status_of"]

RECENT = 600.0  # seconds that the rate is taken over


@dataclass(frozen=True)
class Status:
    """Of one job.

    missing, damaged: numbers of shards
    rate: pictures per second over the last ten minutes of work; None where nothing was made
    left: seconds at that rate; 0 where all is there
    ago: seconds since the last shard
    """

    place: str
    job: Job
    shards: int
    pictures: int
    bytes: int
    missing: tuple[int, ...]
    damaged: tuple[int, ...]
    rate: float | None
    left: float | None
    ago: float | None
    hosts: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def status_of(place: str, *, check: bool = False, now: float | None = None) -> list[Status]:
    """Of the job in a folder or URL, or of the jobs in its folders.

    Args:
        place: of the store
        check: read every shard and compare its hash with its line; else its size only
        now: seconds since the epoch

    Raises:
        ValueError: there is no job, and no other work under way.
        OSError: it cannot be read.
    """
    store = open_store(place)
    found = list(_all(store, place, check, time.time() if now is None else now))
    if not found and read_phase(store) is None:
        raise ValueError(
            f"{clean(place)} has no shards (no job.json); fewstep sample --shards makes them"
        )
    return found


def _all(store: Store, place: str, check: bool, now: float) -> Iterator[Status]:
    job = read_job(store)
    if job is not None:
        yield _status(store, job, check, now)
        return
    for name in store.folders():
        inner = open_store(f"{place.rstrip('/')}/{name}")
        job = read_job(inner)
        if job is not None:
            yield _status(inner, job, check, now)


def _status(store: Store, job: Job, check: bool, now: float) -> Status:
    survey = Manifest(store, job).survey(whole=check)
    lines = list(survey.lines.values())
    pictures = sum(line.count for line in lines)
    rate = _rate(lines)
    left = 0.0 if pictures == job.pictures else None
    if left is None and rate:
        left = (job.pictures - pictures) / rate
    hosts: dict[str, int] = {}
    for line in lines:
        hosts[line.host] = hosts.get(line.host, 0) + 1
    return Status(
        store.place,
        job,
        len(lines),
        pictures,
        sum(line.bytes for line in lines),
        tuple(number for number in range(job.shards) if number not in survey.lines),
        survey.damaged,
        rate,
        left,
        now - max(line.at for line in lines) if lines else None,
        hosts,
    )


def _rate(lines: Sequence[Line]) -> float | None:
    """Pictures per second over the last minutes in which something was made."""
    if not lines:
        return None
    last = max(line.at for line in lines)
    recent = [line for line in lines if line.at > last - RECENT]
    begun = min(line.at - line.seconds for line in recent)
    return sum(line.count for line in recent) / max(last - begun, 1e-3)
