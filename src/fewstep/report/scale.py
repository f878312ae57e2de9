"""What the command line shows of shards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from fewstep.scale.protocol import numbers
from fewstep.text import clean, count, styled

if TYPE_CHECKING:
    from fewstep.scale.phases import Phase
    from fewstep.scale.run import Result
    from fewstep.scale.status import Status

__all__ = ["protocol_numbers", "runs", "shards_lines", "status_table"]

MOST_RUNS = 8  # of numbers that are named


def shards_lines(result: Result) -> list[str]:
    """What a run has made."""
    job, counts = result.job, result.counts
    parts = [
        f"{count(result.made, 'shard')} made"
        + f", {result.skipped} there already" * bool(result.skipped),
        f"{job.pictures:,} pictures in {count(job.shards, 'shard')}",
        f"{result.seconds:.1f} s",
    ]
    lines = ["; ".join(parts)]
    happened = {
        "damaged and made again": result.damaged,
        "tried again": counts.tried,
        "given to a second worker": counts.second,
        "made in smaller batches, for lack of memory": result.smaller,
    }
    told = [f"{count(number, 'shard')} {what}" for what, number in happened.items() if number]
    if counts.lost:
        told.append(f"{count(counts.lost, 'worker')} lost and replaced")
    return [*lines, *(["; ".join(told)] if told else []), clean(result.place)]


def status_table(found: Sequence[Status], phase: Phase | None = None) -> Table:
    """One row per fact of each job, after what is under way."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for heading, text in _under_way(phase) if phase is not None else ():
        table.add_row(heading, styled(text))
    for one in found:
        if table.row_count:
            table.add_row("", "")
        for heading, text in _facts(one):
            table.add_row(heading, styled(text))
    return table


def _under_way(phase: Phase) -> list[tuple[str, str]]:
    rows = [("phase", f"{phase.what}: {phase.done:,} of {count(phase.total, 'piece')}")]
    if phase.done < phase.total:
        rows.append(("last told", f"{words(max(0.0, time.time() - phase.at))} ago"))
        if phase.left is not None:
            rows.append(("left", f"{words(phase.left)} of this phase"))
    return rows


def _how(facts: dict[str, Any]) -> list[str]:
    """The solver and its budget, where the facts of a job have them."""
    nfe = facts.get("nfe")
    return [f"{facts.get('solver')}, {count(nfe, 'evaluation')}"] if isinstance(nfe, int) else []


def _facts(one: Status) -> list[tuple[str, str]]:
    job, how = one.job, _how(one.job.facts)
    rows = [
        ("place", one.place),
        (job.what, ", ".join([job.model, *how, f"seeds {job.seeds}"] if how else [job.model])),
        ("kept", " and ".join([job.keep] * (job.keep != "none") + [*job.features])),
        ("shards", f"{one.shards:,} of {job.shards:,}, of {job.shard} pictures"),
        ("pictures", f"{one.pictures:,} of {job.pictures:,}, {one.bytes / 1e6:,.1f} MB"),
    ]
    if one.missing:
        rows.append(("missing", runs(one.missing)))
    if one.damaged:
        rows.append(("damaged", runs(one.damaged)))
    if one.rate is not None:
        ago = f", the last shard {words(one.ago or 0.0)} ago" if one.missing else ""
        rows.append(("rate", f"{one.rate:,.1f} pictures a second{ago}"))
    if one.left:
        rows.append(("left", words(one.left)))
    hosts = ", ".join(f"{host} ({number:,})" for host, number in sorted(one.hosts.items()))
    return [*rows, ("made on", hosts)] if hosts else rows


def protocol_numbers(record: dict[str, Any]) -> Table:
    """One row per sampler and budget."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.title = styled(f"{record['model']['name']}, protocol {record['protocol']['name']}")
    names = list(record["rows"][0]["metrics"])
    for name in ("sampler", "NFE", *names):
        table.add_column(styled(name), justify="left" if name == "sampler" else "right")
    for row in record["rows"]:
        cells = [row["sampler"], str(row["nfe"])]
        table.add_row(*map(styled, cells), *(numbers(row["metrics"][name]) for name in names))
    return table


def runs(places: Sequence[int]) -> str:
    """Rising numbers as "0-4, 9", the first few runs."""
    found: list[list[int]] = []
    for number in places:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    named = [str(low) if low == high else f"{low}-{high}" for low, high in found[:MOST_RUNS]]
    more = f" and {len(found) - MOST_RUNS} more runs" if len(found) > MOST_RUNS else ""
    return ", ".join(named) + more


def words(seconds: float) -> str:
    """A time: "12 s", "34 min", "5.6 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
