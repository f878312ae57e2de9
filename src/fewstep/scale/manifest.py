"""What a folder of shards holds: one job, and a line for each shard that is finished.

    job.json                what is made, and in which shards
    shards/000007.tar       pictures, as PNG and JSON in webdataset's layout
    shards/000007.npz       their features
    manifest/RUN.jsonl      a line for each shard that a run finished: count, SHA-256, host, seconds

A line is written after its shard. Each run has a manifest of its own, so runs share a folder
without locks. A shard counts where a line of this job says so and its files are as the line says.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from fewstep.models.identity import digest_of
from fewstep.records import Digest, Int, Real, Text, parse, record
from fewstep.scale.stores import Store
from fewstep.text import clean, joined

__all__ = [
    "JOB",
    "Job",
    "Line",
    "Manifest",
    "Survey",
    "differences",
    "hash_of",
    "read_job",
    "shard_files",
]

JOB, FORMAT = "job.json", "fewstep-shards/1"
EVERY = 10.0  # seconds between two writes of a manifest to an object store
MOST = 10_000_000  # shards of a job: their numbers are kept in memory
READERS = 8  # threads that read shards to check them

Count = Annotated[Int, Field(ge=0)]
Pixels = Annotated[Int, Field(ge=1, le=1 << 14)]
Name = Annotated[Text, Field(pattern=r"^[^/\\\x00]+$")]  # a file's, not a path


@record
class Job:
    """What is made, and in which shards.

    what: pictures, or features of pictures that are elsewhere
    model: its name, or that of the pictures
    pictures: in all; shard: in each shard but the last; batch: at a time
    keep: tar, png or none, of the pictures; features: names of the networks that look at them
    seeds: as text; digest: of the seeds, the names and what is given for each picture
    picture: (h, w, c)
    facts: all else that the shards depend on
    """

    what: Literal["pictures", "features"]
    model: Text
    pictures: Annotated[Int, Field(ge=1)]
    shard: Annotated[Int, Field(ge=1)]
    batch: Annotated[Int, Field(ge=1)]
    keep: Literal["tar", "png", "none"]
    features: tuple[Text, ...]
    seeds: Text
    digest: Digest
    picture: tuple[Pixels, Pixels, Pixels]
    facts: dict[str, Any]
    format: Literal["fewstep-shards/1"] = FORMAT

    def __post_init__(self) -> None:
        if self.shards > MOST:
            raise ValueError(
                f"a job has at most {MOST:,} shards, got {self.shards:,}; make larger shards"
            )

    @property
    def shards(self) -> int:
        return -(-self.pictures // self.shard)

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits of all of it."""
        return digest_of(asdict(self))

    def part(self, shard: int) -> range:
        """Positions of a shard's pictures."""
        return range(shard * self.shard, min((shard + 1) * self.shard, self.pictures))


@record
class Line:
    """A finished shard.

    job: its key; shard: its number
    sha256: of its files' bytes, one after the other; bytes: of all of them
    batch: pictures at a time, fewer than the job's where memory ran out
    host, worker: where it was made; seconds: how long that took; at: when it was done, epoch
    names: of pictures that are kept one by one
    """

    job: Digest
    shard: Count
    count: Count
    sha256: Digest
    bytes: Count
    batch: Count
    host: Text
    worker: Count
    seconds: Annotated[Real, Field(ge=0)]
    at: Real
    names: tuple[Name, ...] = ()

    @classmethod
    def of(
        cls,
        job: Job,
        shard: int,
        files: Sequence[tuple[str, bytes]],
        *,
        batch: int,
        begun: float,
        names: Sequence[str] = (),
    ) -> Line:
        """Of a shard that this process has made now; begun: by `time.monotonic`."""
        return cls(
            job=job.key,
            shard=shard,
            count=len(job.part(shard)),
            sha256=hash_of(data for _, data in files),
            bytes=sum(len(data) for _, data in files),
            batch=batch,
            host=socket.gethostname(),
            worker=os.getpid(),
            seconds=round(time.monotonic() - begun, 3),
            at=round(time.time(), 3),
            names=tuple(names),
        )

    def files(self, job: Job) -> list[str]:
        """Of the shard, in the order in which they are hashed."""
        return [*(f"{name}.png" for name in self.names), *shard_files(job, self.shard)]


@dataclass(frozen=True)
class Survey:
    """What is there of a job, by the numbers of shards."""

    lines: Mapping[int, Line] = field(repr=False)
    damaged: tuple[int, ...] = ()


def read_job(store: Store) -> Job | None:
    """What a folder says that it holds; None where it holds no shards.

    Raises:
        ValueError: it is no job of ours.
        OSError: it cannot be read.
    """
    data = store.read(JOB)
    if data is None:
        return None
    try:
        values = parse(data, "it")
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"need format {FORMAT!r}")
        for name in ("made", "fewstep", "command"):
            values.pop(name, None)
        return Job(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{clean(store.place)}/{JOB} says no job: {clean(error)}") from None


def shard_files(job: Job, shard: int) -> list[str]:
    """The files of a shard, but pictures that are kept one by one."""
    ends = (["tar"] if job.keep == "tar" else []) + (["npz"] if job.features else [])
    return [f"shards/{shard:06d}.{end}" for end in ends]


class Manifest:
    """The job of a store, and the lines of its shards.

    Args:
        store: where
        job: what is made there
    """

    def __init__(self, store: Store, job: Job) -> None:
        self.store, self.job = store, job
        host = re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname())[:40]
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        self._name = f"manifest/{stamp}-{host}-{os.getpid()}-{time.monotonic_ns() % 10**6}.jsonl"
        self._text, self._written, self._at = "", 0, 0.0

    def begin(self, **about: Any) -> None:
        """Say in the store what is made, where it does not say so yet.

        Args:
            about: what is noted beside the job

        Raises:
            ValueError: something else is made there.
            OSError: it cannot be written.
        """
        check_job(self.store, self.job)
        if self.store.read(JOB) is None:
            values = {**asdict(self.job), **about}
            self.store.write(JOB, (json.dumps(values, indent=2) + "\n").encode())

    def lines(self) -> dict[int, Line]:
        """The last line of each shard; those of other jobs and broken ones are left out."""
        found: dict[int, Line] = {}
        for name in sorted(self.store.sizes("manifest")):
            for line in _read_lines(self.store.read(name) or b""):
                ours = line.job == self.job.key and line.shard < self.job.shards
                if ours and (line.shard not in found or found[line.shard].at <= line.at):
                    found[line.shard] = line
        return found

    def survey(self, *, whole: bool | None = None) -> Survey:
        """Which shards are there, and as their lines say.

        Args:
            whole: read them and compare their hash; where the store is near unless given
        """
        lines = self.lines()
        whole = self.store.near if whole is None else whole
        sizes = {**self.store.sizes("shards")}
        if self.job.keep == "png":
            sizes |= self.store.sizes("")

        def good(line: Line) -> bool:
            names = line.files(self.job)
            if sum(sizes.get(name, -1) for name in names) != line.bytes:
                return False
            return not whole or self._hash(names) == line.sha256

        with ThreadPoolExecutor(READERS) as readers:
            fine = dict(zip(lines, readers.map(good, lines.values()), strict=True))
        damaged = tuple(sorted(shard for shard, is_good in fine.items() if not is_good))
        return Survey({shard: line for shard, line in lines.items() if fine[shard]}, damaged)

    def _hash(self, names: Sequence[str]) -> str:
        try:
            return hash_of(part for name in names for part in self.store.parts(name))
        except (OSError, ValueError):
            return ""

    def add(self, line: Line) -> None:
        """Raises OSError."""
        self._text += json.dumps(asdict(line)) + "\n"
        if self.store.near or time.monotonic() - self._at > EVERY:
            self.flush()

    def flush(self) -> None:
        """Write what was added. Raises OSError."""
        new = self._text[self._written :]
        if new and not self.store.append(self._name, new):
            self.store.write(self._name, self._text.encode())
        elif self.store.near:
            self._text, new = "", ""
        self._written, self._at = len(self._text), time.monotonic()


def check_job(store: Store, job: Job) -> None:
    """Raises ValueError where something else is in the store."""
    there = read_job(store)
    if there is None:
        if picture := next((one for one in store.sizes("") if one.endswith(".png")), None):
            raise ValueError(
                f"{clean(store.place)} holds pictures that are not of shards, as {clean(picture)}; "
                "choose another --out"
            )
        return
    if there.key == job.key:
        return
    ours, theirs = asdict(job), asdict(there)
    for one in (ours, theirs):
        one |= one.pop("facts")
    apart = list(differences(theirs, ours))[:3]
    what = joined(apart) if apart else "other settings"
    raise ValueError(
        f"{clean(store.place)} is of another job, with {clean(what)}; choose another --out"
    )


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """What differs, in words."""
    for name in sorted({*found, *wanted}):
        theirs, ours = (json.loads(json.dumps(one.get(name))) for one in (found, wanted))
        if theirs != ours:
            yield f"{name}={str(theirs)[:80]} (now {str(ours)[:80]})"


def hash_of(parts: Iterable[bytes]) -> str:
    """SHA-256 of bytes one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _read_lines(data: bytes) -> Iterator[Line]:
    for text in data.split(b"\n"):
        try:
            yield Line(**json.loads(text))
        except (TypeError, ValueError, RecursionError):
            continue  # empty, or cut short with its writer: that shard is made again
