"""`fewstep evaluate` of shards, and by several workers.

Shards that were sampled with features are merged; no picture is read. Other pictures are looked at
in parts, by any executor, and the parts are merged.
"""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fewstep.data.captions import match_captions, read_captions
from fewstep.data.sources import Entry, Images, Positions, open_images, picture_shape
from fewstep.evaluate.clip import load_clip
from fewstep.evaluate.features import resolve_features
from fewstep.evaluate.gather import Gathered, Report, open_reference, silent
from fewstep.evaluate.job import CLIP, of_protocol
from fewstep.evaluate.measure import Evaluation, evaluate
from fewstep.evaluate.parts import Window, gather_part, merge_parts, read_part, write_part
from fewstep.evaluate.settings import Measuring
from fewstep.models.identity import digest_of
from fewstep.scale.executors import Executor
from fewstep.scale.manifest import Job, Line, Manifest, read_job, shard_files
from fewstep.scale.run import Plan, finish
from fewstep.scale.stores import open_store
from fewstep.scale.work import Place, device_at
from fewstep.text import clean

__all__ = ["ShardImages", "evaluate_parts", "evaluate_shards", "merged", "sampled_features"]

PART = 1000  # pictures that a worker looks at before it writes


@dataclass(frozen=True, eq=False)
class ShardImages:
    """The pictures of a job, known by what was gathered of them."""

    name: str
    count: int
    digest: str
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def names(self) -> Positions:
        return Positions(self.count)

    def stream(self, start: int = 0) -> Iterator[Entry]:
        raise ValueError(f"{clean(self.name)} keeps the features of its pictures, not the pictures")


def sampled_features(place: str) -> Job | None:
    """The job of a place whose shards have features, else None."""
    job = read_job(open_store(place))
    return job if job is not None and job.features else None


def merged(place: str, job: Job) -> tuple[Gathered, str]:
    """What the shards of a finished job have gathered, and a digest of it.

    Raises:
        ValueError: shards are missing or damaged.
    """
    store = open_store(place)
    survey = Manifest(store, job).survey(whole=False)
    if missing := job.shards - len(survey.lines):
        raise ValueError(
            f"{clean(place)} lacks {missing} of {job.shards} shards; run its command again, which "
            "makes the rest (fewstep status says which)"
        )

    def parts() -> Iterator[Gathered]:
        for number in range(job.shards):
            name = shard_files(job, number)[-1]
            yield read_part(store.read(name) or b"", f"{place}/{name}")

    digest = hashlib.sha256("".join(survey.lines[i].sha256 for i in range(job.shards)).encode())
    return merge_parts(parts(), place), digest.hexdigest()


def evaluate_shards(
    place: str,
    job: Job,
    how: Measuring,
    reference: Path | None = None,
    *,
    command: str = "",
    report: Report = silent,
) -> Evaluation:
    """Measure a job whose shards have features.

    Args:
        place: of its store; job: as `sampled_features` returns it
        how, reference, command, report: as of `Job.run`

    Raises:
        ValueError: shards are missing, or the features are those of another network.
    """
    how, protocol = of_protocol(how)
    if how.limit is not None:
        raise ValueError("--limit takes some of the pictures, and shards are merged whole")
    metrics = how.metrics or (protocol.metrics if protocol else ("fd",))
    metrics = () if metrics == ("none",) else metrics
    extractor = resolve_features(how.features or "inception", how.device, job.picture, how.trust)
    if extractor.name not in job.features:
        raise ValueError(
            f"{clean(place)} has features of {', '.join(map(clean, job.features))}, and not of "
            f"{extractor.name}; name the one that it has with --features"
        )
    found, digest = merged(place, job)
    if "clip" in metrics and found.clip is None:
        raise ValueError(f"{clean(place)} has no CLIP scores; sample with --clip, or leave it out")
    target = open_reference(
        reference,
        extractor,
        fit=how.fit,
        upright=protocol.upright if protocol is not None else not how.as_stored,
        batch=how.batch,
        skip_corrupt=how.skip_corrupt,
        report=report,
    )
    return evaluate(
        ShardImages(place, job.pictures, digest),
        target,
        extractor,
        metrics=metrics,
        protocol=protocol,
        resamples=how.resamples,
        gathered=found if "clip" in metrics else replace(found, clip=None),
        command=command,
        report=report,
    )


@dataclass(frozen=True)
class Part:
    """Pictures of a source: the part's number, and their captions."""

    number: int
    captions: tuple[str, ...] = ()
    task: int = 0


@dataclass(frozen=True)
class LookWork:
    """Looks at parts of a set of pictures.

    place: of the store for what is found
    """

    job: Job
    place: str
    images: str
    how: Measuring
    upright: bool

    def open(self, place: Place) -> Callable[[Part], Line]:
        images = open_images(self.images, upright=self.upright)
        device = device_at(self.how.device, place)
        shape = picture_shape(images) or (32, 32, 3)
        extractor = resolve_features(self.how.features or "", device, shape, self.how.trust)
        scorer = load_clip(self.how.clip, device) if self.how.clip else None
        store = open_store(self.place)
        if images.digest != self.job.facts["pictures"]:
            raise ValueError(
                f"{self.images} has other pictures on {socket.gethostname()}, or they have changed"
            )

        def look(part: Part) -> Line:
            begun = time.monotonic()
            places = self.job.part(part.number)
            window = Window(images, places.start, places.stop)
            found = gather_part(
                window,
                extractor,
                scorer,
                part.captions,
                places.start,
                batch=self.job.batch,
                skip_corrupt=self.how.skip_corrupt,
            )
            [name], data = shard_files(self.job, part.number), write_part(found)
            store.write(name, data)
            return Line.of(self.job, part.number, [(name, data)], batch=self.job.batch, begun=begun)

        return look


def evaluate_parts(
    images: str,
    how: Measuring,
    executor: Executor,
    place: str,
    reference: Path | None = None,
    captions: Path | None = None,
    *,
    command: str = "",
    report: Report = silent,
) -> Evaluation | None:
    """Measure pictures that several workers look at.

    Args:
        images: pictures, as `open_images` takes them, which every worker can see
        how, reference, captions, command: as of `open_job` and `Job.run`
        executor: who looks
        place: folder or URL for what they find, by which an interrupted run goes on
        report: called as `gather` does

    Returns:
        The result; None in a process that does not lead.

    Raises:
        ValueError: something does not go together, or cannot be read.
    """
    how, protocol = of_protocol(how)
    metrics = how.metrics or (protocol.metrics if protocol else ("fd",))
    metrics = () if metrics == ("none",) else metrics
    if ("clip" in metrics) != (captions is not None):
        raise ValueError("--metrics clip and --captions FILE go together")
    upright = protocol.upright if protocol is not None else not how.as_stored
    pictures = open_images(images, upright=upright)
    total = min(len(pictures.names), how.limit or len(pictures.names))
    if protocol is not None:
        total = protocol.pictures
    texts = read_captions(captions) if captions is not None else None
    matched = match_captions(texts, pictures.names[:total])[0] if texts is not None else ()
    how = replace(how, features=how.features or "inception")
    how = replace(how, clip=(how.clip or CLIP) if texts is not None else None)
    shape = picture_shape(pictures) or (32, 32, 3)
    extractor = resolve_features(how.features or "", how.device, shape, how.trust)
    names = (extractor.name,) + ((how.clip,) if how.clip else ())
    facts = {"pictures": pictures.digest, "skip_corrupt": how.skip_corrupt, "upright": upright}
    digest = digest_of([facts, list(matched)])
    job = Job(
        "features", images, total, PART, how.batch, "none", names, "none", digest, shape, facts
    )
    work = LookWork(job, place, images, how, upright)
    if not executor.leads:
        executor.serve(work)
        return None

    def item(number: int) -> Part:
        places = job.part(number)
        return Part(number, matched[places.start : places.stop])

    plan = Plan(job, place, item)
    finish(work, [plan], executor, command=command, report=report)
    found, _ = merged(place, job)
    target = None
    if set(metrics) - {"clip"}:
        target = open_reference(
            reference,
            extractor,
            fit=how.fit,
            upright=upright,
            batch=how.batch,
            skip_corrupt=how.skip_corrupt,
            report=report,
        )
    whole: Images = pictures if total == len(pictures.names) else Window(pictures, 0, total)
    return evaluate(
        whole,
        target,
        extractor,
        metrics=metrics,
        captions=texts,
        protocol=protocol,
        resamples=how.resamples,
        gathered=found,
        command=command,
        report=report,
    )
