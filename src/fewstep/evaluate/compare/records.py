"""The record of a comparison: what its numbers depend on, and how two become one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import (
    Annotated,
    Any,
    NotRequired,  # pydantic asks for it before Python 3.12
)

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from fewstep.evaluate.compare.bench import Judge, Workbench
from fewstep.evaluate.compare.design import Design, seeds_text
from fewstep.records import read_json
from fewstep.text import clean

__all__ = ["check_protocol", "merge", "protocol", "read_comparison"]

FORMAT = "fewstep-comparison/1"

# What a page or a table reads; there may be more.
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Words = Annotated[str, Field(max_length=10_000)]


class Distance(TypedDict):
    value: Number
    se: Number
    excess: Number
    excess_se: Number


class Agreement(TypedDict):
    nfe: Annotated[int, Field(ge=1)]
    cosine: dict[Words, Number]


class Row(TypedDict):
    sampler: Words
    solver: Words
    nfe: Annotated[int, Field(ge=1)]
    network_calls: Count
    grid: Words | list[Number] | None
    afs: Words | None
    end: Words | None
    final: bool
    error: Number
    error_se: Number | None
    psnr: Number
    seconds: Positive
    source: Count
    fd: dict[Words, Distance]
    fd_data: dict[Words, Number]
    agreement: NotRequired[Agreement]


class Machine(TypedDict):
    processor: Words
    cores: Count | None
    threads: Count
    gpu: Words | None
    torch: Words
    python: Words


class Source(TypedDict):
    command: Words
    made: Words
    dtype: Words
    machine: Machine


class References(TypedDict):
    solver: Words
    nfe: Count
    grid: Words
    dtype: Words
    population: Words
    own_error: Number


class Screen(TypedDict):
    seeds: Words | None
    first_round: Count
    by: Words
    grids: list[Words]
    afs: list[Words]
    ends: list[Words]


class Which(TypedDict):
    name: Words
    weights: Words


class Record(TypedDict):
    model: Which
    condition: dict[Words, Any]
    seeds: Words
    pictures: Count
    references: References
    screen: Screen
    features: dict[Words, Words]
    sources: Annotated[list[Source], Field(min_length=1)]
    floor: dict[Words, dict[Words, Number]]
    rows: Annotated[list[Row], Field(min_length=1)]


RECORD = TypeAdapter(Record)


def protocol(workbench: Workbench, design: Design, judges: Sequence[Judge]) -> dict[str, Any]:
    """What every number of a comparison depends on, known before any work, JSON-ready."""
    card = workbench.model.card
    prompt = {} if design.prompt is None else {"prompt": workbench.references.said}
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

    Raises:
        ValueError: with what differs, unless model, condition, seeds, references, feature networks
            and, where both chose settings, the choice are the same.
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
    """The record of a comparison.json.

    Raises:
        ValueError: where it is something else, or lacks what a table or a page needs.
    """
    record = read_json(path, "a comparison")
    try:
        if record.get("format") != FORMAT:
            raise ValueError(f"need format {FORMAT!r}, got {record.get('format')!r}")
        RECORD.validate_python(record, strict=True)
        judges, sources = set(record["floor"]), len(record["sources"])
        for row in record["rows"]:
            if set(row["fd"]) != judges or row["source"] >= sources:
                raise ValueError(f"the row of {row['sampler']!r} does not fit its feature networks")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(clean(f"{path} is not a comparison: {where}: {first['msg']}")) from None
    except ValueError as error:
        raise ValueError(clean(f"{path} is not a comparison: {error}")) from None
    return record


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
