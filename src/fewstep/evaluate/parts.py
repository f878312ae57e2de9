"""Parts of a set of pictures, gathered apart and merged: shards, or what several workers saw.

A part's file has its features themselves, for a few hundred rows of them are smaller than their
covariance. Merging goes from first to last, so the numbers do not depend on who made which part.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from fewstep.data.archives import read_arrays
from fewstep.data.bounds import reason
from fewstep.data.sources import Entry, Images
from fewstep.evaluate.clip import ClipScorer
from fewstep.evaluate.features import Extractor
from fewstep.evaluate.gather import Gathered, gather
from fewstep.evaluate.statistics import Rows, Statistics
from fewstep.text import clean

__all__ = ["Window", "gather_part", "merge_parts", "read_part", "write_part"]

PLAIN = ("done", "shape", "first", "skipped", "turned", "askew", "more")


@dataclass(frozen=True, eq=False)
class Window:
    """Pictures start to stop - 1 of a source."""

    inner: Images
    start: int
    stop: int

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def names(self) -> Sequence[str]:
        return self.inner.names[self.start : self.stop]

    @property
    def left_out(self) -> dict[str, int]:
        return {}

    @property
    def digest(self) -> str:
        return f"{self.inner.digest} {self.start} {self.stop}"

    def stream(self, start: int = 0) -> Iterator[Entry]:
        first = self.start + start
        return islice(self.inner.stream(first), max(0, self.stop - first))


def gather_part(
    images: Images,
    extractor: Extractor | None,
    clip: ClipScorer | None = None,
    captions: Sequence[str] = (),
    start: int = 0,
    *,
    batch: int = 64,
    skip_corrupt: bool = False,
) -> Gathered:
    """What is kept of a part, whose first picture has the place `start` in the whole set.

    Raises:
        ValueError: as `gather`; a part may have no picture that can be read.
    """
    try:
        found = gather(
            images,
            extractor,
            clip=clip,
            captions=captions,
            batch=batch,
            skip_corrupt=skip_corrupt,
            save_every=max(1, len(images.names)),
        )
    except ValueError:
        if not skip_corrupt or _any_readable(images):
            raise
        return Gathered(len(images.names), skipped=tuple(images.names))
    if found.rows is None:
        return found
    rows = found.rows
    return replace(found, rows=Rows(rows.index + start, rows.features, rows.most))


def _any_readable(images: Images) -> bool:
    for entry in images.stream():
        try:
            entry.read()
        except ValueError:
            continue
        return True
    return False


def merge_parts(parts: Iterable[Gathered], source: str = "pictures") -> Gathered:
    """All of them as one set, in their order.

    Raises:
        ValueError: there is none, or their pictures differ in size.
    """
    total: Gathered | None = None
    for part in parts:
        total = part if total is None else _merge(total, part, source)
    if total is None or not total.count:
        raise ValueError(f"{clean(source)}: there are no pictures that can be read")
    return total


def _merge(one: Gathered, other: Gathered, source: str) -> Gathered:
    if one.shape and other.shape and one.shape != other.shape:
        raise ValueError(
            f"{clean(source)}: {clean(other.first)} is {list(other.shape)}, but "
            f"{clean(one.first)} is {list(one.shape)}; pictures of one set must have one size"
        )
    return Gathered(
        done=one.done + other.done,
        shape=one.shape or other.shape,
        first=one.first or other.first,
        skipped=one.skipped + other.skipped,
        turned=one.turned + other.turned,
        askew=one.askew + other.askew,
        more=one.more + other.more,
        statistics=_both(one.statistics, other.statistics),
        rows=_both(one.rows, other.rows),
        clip=_both(one.clip, other.clip),
    )


def _both(one: Any, other: Any) -> Any:
    if one is None or other is None:
        return other if one is None else one
    return one.merge(other)


def write_part(found: Gathered) -> bytes:
    """The file of a part; equal parts have equal bytes."""
    plain = {name: getattr(found, name) for name in PLAIN}
    statistics, rows, clip = found.statistics, found.rows, found.clip
    values: dict[str, Any] = {}
    if statistics is not None and rows is not None:
        plain["extractor"] = statistics.extractor
        values |= {"rows": rows.features, "row_index": rows.index}
        if len(rows.index) < (statistics.count or 0):  # not all: the moments are not in them
            values |= _moments("features", statistics)
    if clip is not None:
        plain["clip"] = clip.extractor
        values |= _moments("clip", clip)
    buffer = io.BytesIO()
    np.savez(buffer, plain=np.array(json.dumps(plain)), **values)
    return buffer.getvalue()


def _moments(name: str, statistics: Statistics) -> dict[str, np.ndarray]:
    return {
        f"{name}_count": np.array(statistics.count),
        f"{name}_mean": statistics.mean,
        f"{name}_covariance": statistics.covariance,
    }


def read_part(data: bytes, what: str = "the part") -> Gathered:
    """What `write_part` wrote.

    Raises:
        ValueError: it is something else.
    """
    try:
        values = read_arrays(io.BytesIO(data))  # type: ignore[arg-type]
        plain = dict(json.loads(str(values["plain"])))
        height, width, channels = map(int, plain["shape"] or (1, 1, 1))
        rows = Rows.of(values["rows"], values["row_index"]) if "rows" in values else None
        features = _statistics("features", str(plain.get("extractor")), values)
        if rows is not None and features is None:
            features = Statistics.of(rows.features, str(plain["extractor"]))
        return Gathered(
            done=int(plain["done"]),
            shape=(height, width, channels) if plain["shape"] else None,
            first=str(plain["first"]),
            skipped=tuple(map(str, plain["skipped"])),
            turned=int(plain["turned"]),
            askew=int(plain["askew"]),
            more=int(plain["more"]),
            statistics=features,
            rows=rows,
            clip=_statistics("clip", str(plain.get("clip")), values),
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{clean(what)} is no part of an evaluation ({reason(error)})") from None


def _statistics(name: str, extractor: str, values: dict[str, np.ndarray]) -> Statistics | None:
    if f"{name}_count" not in values:
        return None
    mean, covariance = values[f"{name}_mean"], values[f"{name}_covariance"]
    return Statistics(extractor, int(values[f"{name}_count"]), mean, covariance)
