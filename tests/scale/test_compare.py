"""A comparison, or trajectories, whose pieces others did are those of one process."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.evaluate.compare.design import Design
from fewstep.evaluate.compare.setup import Setup
from fewstep.evaluate.geometry import run_geometry
from fewstep.reference import ReferenceSolve
from fewstep.scale.compare import compare_by
from fewstep.scale.executors import Counts, Local
from fewstep.scale.geometry import shared
from fewstep.scale.shards import Source
from fewstep.scale.work import Outcome, Place, Work
from tests.support.command import command


@dataclass(eq=False)
class Others:
    """Workers in this process, with a model of their own each, that answer in another order."""

    workers: int = 2
    here: None = None
    leads: bool = True
    counts: Counts = field(default_factory=Counts)
    seen: list[Any] = field(default_factory=list)
    work: Any = None
    does: list[Any] = field(default_factory=list)

    def map(self, work: Work, items: Iterable[Any]) -> Generator[tuple[Any, Outcome], None, None]:
        known = list(items)
        self.seen += known
        if self.work != work:
            self.work = work
            self.does = [work.open(Place(worker)) for worker in range(self.workers)]
        for i, item in reversed(list(enumerate(known))):
            yield item, Outcome(self.does[i % self.workers](item))

    def serve(self, work: Work) -> None:
        raise NotImplementedError

    def __enter__(self) -> Others:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def setup(folder: Path, cache: Path) -> Setup:
    design = Design(
        ("ipndm-2",),
        (2,),
        tuple(range(6)),
        grids=("karras", "log-snr"),
        afs=("none",),
        ends=("sigma_min",),
        screen=6,
        screen_first=3,
        population=8,
        resamples=2,
    )
    machine = {"device": "cpu", "dtype": "float32", "compile": False}
    how = ReferenceSolve(nfe=8)
    more: dict[str, Any] = {"features": ("fashion-a",), "how": how, "cache": cache, "batch": 3}
    return Setup("fashion-mnist", machine, design, None, folder, **more)


@pytest.mark.slow
def test_a_comparison_asks_for_nothing_that_workers_did_not_do(tmp_path: Path) -> None:
    alone = setup(tmp_path / "alone", tmp_path / "cache-1")
    ours = compare_by(Local(), alone, alone.open())
    spread = setup(tmp_path / "spread", tmp_path / "cache-2")
    (tmp_path / "spread").mkdir()
    others = Others()
    theirs = compare_by(others, spread, spread.open())
    assert ours is not None
    assert theirs is not None
    for record in (ours.record, theirs.record):
        record.pop("sources")
        for row in record["rows"]:
            row.pop("seconds")
    assert theirs.record == ours.record
    for name, strip in ours.strips.items():
        assert np.array_equal(theirs.strips[name], strip)
    for folder in ("runs", "features"):
        made = sorted(p.name for p in (tmp_path / "alone" / folder).rglob("*.npz"))
        assert sorted(p.name for p in (tmp_path / "spread" / folder).rglob("*.npz")) == made
    assert {piece.kind for piece in others.seen} == {
        *("references", "finer", "exact", "run", "features")
    }
    ran = command("status", tmp_path / "spread")
    assert "features of test seeds: 1 of 1 piece" in ran.stdout


def test_trajectories_that_workers_measured_are_those_of_one_process(tmp_path: Path) -> None:
    source = Source("fashion-mnist")
    how: dict[str, Any] = {"seeds": range(5), "points": 5, "solver": "ddim", "batch": 2}
    one = run_geometry("fashion-mnist", tmp_path / "one", **how)
    by = shared(Others(), source)
    two = run_geometry("fashion-mnist", tmp_path / "two", by=by, **how)
    for name in ("x", "denoised"):
        ours, theirs = (getattr(result, name) for result in (one, two))
        assert np.array_equal(ours.points, theirs.points)
        assert np.array_equal(ours.norms, theirs.norms)
