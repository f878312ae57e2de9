"""`fewstep geometry` by several workers: parts of the seeds are measured by whoever is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

from fewstep.evaluate.geometry import Columns, Share, Tracing, measure_part
from fewstep.scale.executors import Executor
from fewstep.scale.shards import Source
from fewstep.scale.work import Place

__all__ = ["GeometryWork", "shared"]

Item = tuple[Tracing, tuple[int, ...]]


@dataclass(frozen=True)
class GeometryWork:
    """Measures the trajectories of some seeds."""

    source: Source

    def open(self, place: Place) -> Callable[[Item], Columns]:
        model = self.source.load(place)
        return lambda item: measure_part(model, *item)


def shared(executor: Executor, source: Source) -> Share:
    """What `run_geometry` takes as `by`."""

    def share(
        how: Tracing, parts: list[tuple[int, ...]]
    ) -> Iterator[tuple[tuple[int, ...], Columns]]:
        items: list[Item] = [(how, part) for part in parts]
        with closing(executor.map(GeometryWork(source), items)) as made:
            for item, outcome in made:
                yield item[1], outcome.value

    return share
