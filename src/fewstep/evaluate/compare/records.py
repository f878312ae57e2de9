"""The record of a comparison: what its numbers depend on, and how two become one."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fewstep.evaluate.compare.bench import Judge, Workbench
from fewstep.evaluate.compare.design import Design, seeds_text

__all__ = ["check_protocol", "machine", "merge", "protocol", "read_comparison"]

FORMAT = "fewstep-comparison/1"


def protocol(workbench: Workbench, design: Design, judges: Sequence[Judge]) -> dict[str, Any]:
    """What every number of a comparison depends on, known before any work, JSON-ready."""
    card = workbench.model.card
    prompt = {} if design.prompt is None else {"prompt": design.prompt}
    record = {
        "format": FORMAT,
        "model": {"name": card.name, "weights": card.weights_sha256},
        "condition": {"label": design.label, "guidance": design.guidance, **prompt},
        "seeds": seeds_text(design.seeds),
        "pictures": len(design.seeds),
        "references": {**workbench.references.facts(), "population": seeds_text(design.others)},
        "screen": {
            "seeds": seeds_text(design.validation) if design.screen else None,
            "first_round": design.screen_first,
            "by": design.choose_by,
            "grids": workbench.grids(design),
            "afs": design.afs,
            "ends": design.ends,
        },
        "features": {judge.label: judge.name for judge in judges},
    }
    return json.loads(json.dumps(record))


def check_protocol(record: dict[str, Any], other: dict[str, Any]) -> None:
    """Numbers of different protocols do not stand in one table.

    Errors: ValueError, with what differs, unless model, condition, seeds, references, feature
    networks and, where both chose settings, the choice are the same.
    """
    for name in ("format", "model", "condition", "seeds", "references", "features", "screen"):
        ours, theirs = record.get(name), other.get(name)
        if name == "screen" and not (ours and theirs and ours["seeds"] and theirs["seeds"]):
            continue
        if isinstance(ours, dict) and isinstance(theirs, dict):
            keys = (ours.keys() | theirs.keys()) - {"own_error"}
            apart = sorted(key for key in keys if ours.get(key) != theirs.get(key))
            ours, theirs = ({key: one.get(key) for key in apart} for one in (ours, theirs))
        if ours != theirs:
            raise ValueError(
                f"the comparisons differ in {name}: {ours} and {theirs}; run both alike"
            )


def read_comparison(path: Path) -> dict[str, Any]:
    """The record of a comparison.json. Errors: ValueError where it is something else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] == FORMAT and record["rows"]:
            return record
        found = repr(record["format"])
    except (KeyError, TypeError, ValueError, RecursionError):
        found = "something else"
    raise ValueError(f"{path} is not a comparison: need format {FORMAT!r} with rows, got {found}")


def merge(record: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The rows of both; where both have a sampler at a budget, the first one's.

    Errors: as `check_protocol`.
    """
    check_protocol(record, other)
    have = {(row["sampler"], row["nfe"]) for row in record["rows"]}
    more = [row for row in other["rows"] if (row["sampler"], row["nfe"]) not in have]
    used = sorted({row["source"] for row in more})
    place = {source: len(record["sources"]) + i for i, source in enumerate(used)}
    rows = record["rows"] + [{**row, "source": place[row["source"]]} for row in more]
    done = {f"{row['sampler']}@{row['nfe']}" for row in rows}
    left_out = {**other.get("left_out", {}), **record.get("left_out", {})}
    return {
        **record,
        "screen": record["screen"] if record["screen"]["seeds"] else other["screen"],
        "sources": record["sources"] + [other["sources"][source] for source in used],
        "left_out": {name: why for name, why in left_out.items() if name not in done},
        "rows": rows,
    }


def machine() -> dict[str, Any]:
    """What it ran on, for the record."""
    name = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = (re.findall(r"model name\s*:\s*(.+)", text) or [name])[0]
    except OSError:
        pass
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
