"""What `fewstep evaluate` shows: numbers, each beside what it was taken of and against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from fewstep.text import styled

if TYPE_CHECKING:
    from fewstep.evaluate.protocols import Protocol

__all__ = ["evaluation_notes", "evaluation_table", "protocol_list", "protocol_table"]


def protocol_list(protocols: Sequence[Protocol]) -> Table:
    """One row per published protocol."""
    table = Table("protocol", "data", "pictures", "metrics", box=None)
    for one in protocols:
        table.add_row(one.name, one.data, f"{one.pictures:,}", ", ".join(one.metrics))
    return table


def protocol_table(protocol: Protocol) -> Table:
    """All about one."""
    from fewstep.evaluate.protocols import explain

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for heading, text in explain(protocol):
        table.add_row(heading, text)
    return table


def evaluation_table(record: dict[str, Any]) -> Table:
    """One row per number."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("metric", "value", "error"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for name in ("pictures", "against", "protocol"):
        table.add_column(name, overflow="fold")
    protocol = record["protocol"]["name"] if record["protocol"] else "none"
    for row in record["metrics"]:
        error = "" if row["error"] is None else f"± {_digits(row['error'], row['error'])}"
        value, against = _digits(row["value"], row["error"]), _against(row, record)
        cells = (row["metric"], value, error, f"{row['count']:,}", against, protocol)
        table.add_row(*map(styled, cells))
    return table


def evaluation_notes(record: dict[str, Any]) -> list[str]:
    """What the numbers were made with, and what to know about them."""
    lines = [f"features: {record['extractor']['name']}"] if record["extractor"] else []
    lines += [f"CLIP: {record['clip']}"] if record["clip"] else []
    return lines + [f"note: {text}" for text in record["warnings"]]


def _against(row: dict[str, Any], record: dict[str, Any]) -> str:
    """What a number compares the pictures with, and how many there are."""
    if "model" in row:
        return Path(record["captions"]["name"]).name
    count = row.get("reference_count")
    return Path(record["reference"]["name"]).name + (f" ({count:,})" if count is not None else "")


def _digits(value: float, error: float | None) -> str:
    """With as many decimals as the error has to two figures."""
    if not error:
        return f"{value:.4g}"
    places = 0
    while error < 10 and places < 8:
        error, places = error * 10, places + 1
    return f"{value:.{places}f}"
