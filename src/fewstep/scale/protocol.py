"""`fewstep compare --protocol`: the numbers of a published protocol for solvers and budgets, from
captions to the table, in one command.

Each solver at each budget is a job of shards, in a folder of its own; no picture need be kept. All
their shards go to one executor. So a run that was stopped goes on, and a solver is added at its own
cost.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fewstep.data.captions import Captions, read_captions
from fewstep.evaluate.job import of_protocol
from fewstep.evaluate.protocols import Protocol, check_protocol, get_protocol
from fewstep.evaluate.settings import Measuring
from fewstep.models import is_model
from fewstep.provenance import machine
from fewstep.sampling.settings import Settings
from fewstep.scale.evaluate import evaluate_shards
from fewstep.scale.executors import Executor
from fewstep.scale.run import Result, finish
from fewstep.scale.sample import Asked, judges_here, plan_of, task_of
from fewstep.scale.shards import Looks, SampleWork, Source, picture_of
from fewstep.scale.stores import open_store
from fewstep.text import clean, slug

__all__ = ["Published", "compare_published", "numbers", "write_record"]

FORMAT = "fewstep-protocol-comparison/1"

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Published:
    """What is compared.

    source: the model by name
    protocol: its name
    solvers: names, folders of learned solvers, or students
    budgets: network evaluations
    out: folder or URL
    captions: file with the prompts, where the protocol has any
    reference: what pictures are compared with
    features: a file of the protocol's feature network, where it is not in its usual place
    clip: CLIP model; none without it
    guidance: its scale; label: the class
    keep: tar, png or none, of the pictures
    """

    source: Source
    protocol: str
    solvers: tuple[str, ...]
    budgets: tuple[int, ...]
    out: str
    captions: Path | None = None
    reference: Path | None = None
    features: str | None = None
    trust: tuple[str, ...] = ()
    clip: str | None = None
    guidance: float | None = None
    label: Any = None
    batch: int | None = None
    keep: str = "none"
    resamples: int | None = None

    def __post_init__(self) -> None:
        if not self.solvers or not self.budgets:
            raise ValueError("solvers and nfe must name at least one")
        known = get_protocol(self.protocol)
        if known.captions != (self.captions is not None):
            how = "needs --captions FILE" if known.captions else "takes no --captions"
            raise ValueError(f"protocol {self.protocol} {how}")
        of_protocol(Measuring(features=self.features, protocol=self.protocol))
        if self.reference is not None and not self.reference.exists():
            raise FileNotFoundError(2, "not there", str(self.reference))
        if self.clip is not None and self.captions is None:
            raise ValueError("the CLIP score compares pictures with --captions; leave out --clip")


@dataclass(frozen=True, eq=False)
class _Row:
    """A solver at a budget, and its job."""

    solver: str
    nfe: int
    asked: Asked
    task: Any = field(repr=False)


def compare_published(
    what: Published, executor: Executor, *, command: str = "", report: Report
) -> dict[str, Any] | None:
    """Make what is missing, and measure.

    Args:
        what: is compared
        executor: who makes the pictures
        command: for the record
        report: called with what is done, the pictures done and all of them

    Returns:
        The record, JSON-ready; None in a process that does not lead.

    Raises:
        ValueError: something is not there or does not go together, before any work.
    """
    protocol = get_protocol(what.protocol)
    base = _base(what, protocol)
    rows, left_out, loaded = _rows(what, base, protocol, executor)
    work = SampleWork(tuple(row.task for row in rows), loaded)
    if not executor.leads:
        executor.serve(work)
        return None
    plans = [plan_of(row.asked, row.task.job, i) for i, row in enumerate(rows)]
    results = finish(work, plans, executor, command=command, report=report)
    metrics = ("fd", "clip") if what.clip is not None else ("fd",)
    how = Measuring(
        features=what.features,
        metrics=metrics,
        protocol=what.protocol,
        resamples=what.resamples,
        trust=what.trust,
        device=what.source.device,
    )
    told, reference = [], None
    for row, result in zip(rows, results, strict=True):
        found = evaluate_shards(row.asked.place, row.task.job, how, what.reference, report=report)
        reference = found.record["reference"]
        told.append(_told(row, result, found.record))
    return {
        "format": FORMAT,
        "protocol": protocol.to_dict(),
        "model": {"name": rows[0].task.job.model, "weights": rows[0].task.job.facts["weights"]},
        "guidance": what.guidance,
        "captions": str(what.captions) if what.captions else None,
        "reference": reference,
        "clip": what.clip,
        "left_out": left_out,
        "rows": told,
        "command": command,
        "made": time.strftime("%Y-%m-%d"),
        "machine": machine(),
    }


def _base(what: Published, protocol: Protocol) -> Asked:
    """What all rows share. Raises ValueError for too few captions."""
    looks = Looks(what.features or protocol.features, what.trust, what.clip)
    given: dict[str, Any] = {"guidance": what.guidance, "label": what.label}
    seeds: Sequence[int] = range(protocol.pictures)
    names = None
    if what.captions is not None:
        captions: Captions = read_captions(what.captions)
        check_protocol(protocol, len(captions))
        given["prompt"] = list(captions.texts[: protocol.pictures])
        names = captions.files[: protocol.pictures]
        seeds = list(captions.seeds[: protocol.pictures]) or seeds
    return Asked(
        what.out, seeds, given=given, names=names, batch=what.batch, keep=what.keep, looks=looks
    )


def _rows(
    what: Published, base: Asked, protocol: Protocol, executor: Executor
) -> tuple[list[_Row], dict[str, str], Any]:
    """The rows that can be made, those that cannot and why, and what this process has loaded.

    Raises:
        ValueError: none can be made, or the pictures are not of the protocol's size.
    """
    rows: list[_Row] = []
    left_out: dict[str, str] = {}
    kept = None
    students = {name: replace(what.source, name=name) for name in what.solvers if is_model(name)}
    groups = itertools.groupby(what.solvers, lambda name: students.get(name, what.source))
    for source, names in groups:
        model = source.load(executor.here)
        judges = judges_here(source, base.looks, model, executor.here)
        check_protocol(protocol, protocol.pictures, picture_of(model)[:2])
        if (
            what.reference is None
            and judges.extractor is not None
            and judges.extractor.data is None
        ):
            raise ValueError(f"protocol {protocol.name} needs --reference: {protocol.reference}")
        base = base.drawn(model)
        if not rows and executor.here is not None:
            kept = (model, judges)
        for solver, nfe in itertools.product(names, what.budgets):
            own = Settings("auto" if solver in students else solver, nfe)
            place = f"{what.out.rstrip('/')}/{slug(Path(solver).name)}-{nfe}"
            asked = replace(base, place=place, settings=own)
            try:
                rows.append(_Row(solver, nfe, asked, task_of(source, asked, model, judges)))
            except ValueError as error:
                left_out[f"{solver}@{nfe}"] = clean(error)
        del model
    if not rows:
        why = next(iter(left_out.values()))
        raise ValueError(f"none of the solvers can spend any of the budgets: {why}")
    places = [row.asked.place for row in rows]
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise ValueError(f"two solvers would share the folder {clean(twice)}; rename one")
    return rows, left_out, kept


def _told(row: _Row, result: Result, record: dict[str, Any]) -> dict[str, Any]:
    numbers = {one["metric"]: one for one in record["metrics"]}
    facts = row.task.job.facts
    return {
        "sampler": row.solver,
        "solver": facts["solver"],
        "nfe": facts["nfe"],
        "grid": facts["grid"],
        "afs": facts["afs"],
        "end": facts["end"],
        "weights": facts["weights"],
        "pictures": row.task.job.pictures,
        "metrics": {
            name: {key: one[key] for key in ("value", "error", "count")}
            for name, one in numbers.items()
        },
        "worker_seconds": round(sum(line.seconds for line in result.lines.values()), 1),
        "warnings": record["warnings"],
        "place": row.asked.place,
    }


def write_record(record: dict[str, Any], out: str) -> list[str]:
    """protocol.json and protocol.md in the place. Returns their names, with the place."""
    store = open_store(out)
    store.write("protocol.json", (json.dumps(record, indent=2) + "\n").encode())
    lines = [
        "| sampler | NFE | " + " | ".join(record["rows"][0]["metrics"]) + " |",
        "|---|---|" + "---|" * len(record["rows"][0]["metrics"]),
    ]
    for row in record["rows"]:
        cells = [clean(row["sampler"]).replace("|", "\\|"), str(row["nfe"])]
        cells += [numbers(one) for one in row["metrics"].values()]
        lines.append("| " + " | ".join(cells) + " |")
    store.write("protocol.md", ("\n".join(lines) + "\n").encode())
    return [f"{out.rstrip('/')}/{name}" for name in ("protocol.json", "protocol.md")]


def numbers(one: dict[str, Any]) -> str:
    """A value with its error."""
    spread = "" if one["error"] is None else f" ± {one['error']:.2g}"
    return f"{one['value']:.4g}{spread}"
