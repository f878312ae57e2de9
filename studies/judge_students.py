"""Excess Frechet distances of students by budget, without solving the test seeds finely again.

    python -m studies.judge_students results/fashion-mnist.json STUDENT... --nfe 1 2 4 8 --out FILE

The record is a comparison of the students' teacher: it has the distance of the fine solutions of
its test seeds to their population, in each feature network. Less that, the distance of a student's
pictures of the same seeds is the excess that `fewstep compare` gives to the last digit. Its
standard error is over the choice of pictures, not paired with the fine solutions. Of students in
results/fashion-mnist.json the paired one is 0.88 to 1.09 times this; of a solver that ends close to
the fine solutions it is far smaller, down to a tenth. The error of each picture is left out.

agreement is the mean cosine of the features of a seed's picture at a budget and at the largest one,
which is the same for all rows of a student. A row that is in the file already is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fewstep
from fewstep.evaluate.compare import read_comparison
from fewstep.evaluate.features import resolve_features
from fewstep.evaluate.statistics import Statistics, bootstrap_frechet
from fewstep.files import write_json
from fewstep.models import read_card
from fewstep.models.card import POPULATION_FOLDER, Card
from fewstep.models.students import own_levels
from fewstep.provenance import VERSION, machine
from fewstep.records import read_json, shown
from fewstep.text import slug
from studies.commands import at_least, ended
from studies.rows import chosen, same

BATCH = 50


def population(folder: Path, name: str) -> Statistics:
    """Statistics of the fine solutions of other seeds, as they come with the teacher."""
    (found,) = (folder / POPULATION_FOLDER).glob(f"{slug(name)}-*.npz")
    return Statistics.load(found)


def directions(features: np.ndarray) -> np.ndarray:
    rows = features.astype(float)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("students", nargs="+")
    parser.add_argument("--solver", default="auto")
    parser.add_argument("--nfe", nargs="+", type=at_least(1), default=[1, 2, 4, 8])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(arguments)


def earlier_rows(path: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What the file has; none where there is none.

    Raises:
        ValueError: it is of another record, or none of this study.
    """
    if not path.exists():
        return []
    found = read_json(path, "a file of judged students")
    for name, value in facts.items():
        if found.get(name, value) != value:
            raise ValueError(
                f"--out {path} is of another comparison: its {name} is {shown(found[name])}, that "
                f"of the record {shown(value)}; give another file"
            )
    rows = found.get("rows")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and "nfe" in row for row in rows
    ):
        raise ValueError(f"--out {path} has no rows of judged students; give another file")
    return rows


def left_of(
    rows: Sequence[dict[str, Any]], known: dict[str, Any], card: Card, asked: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The budgets of a student without a row, and those to make pictures of, both from the largest
    down: the first of these is what all rows of the student are compared with.

    Args:
        known: what tells the student's rows from others

    Raises:
        ValueError: the rows that are there were compared with another; the student has no levels.
    """
    ours = [row for row in rows if same(row, known, tuple(known))]
    top = max([*asked, *(row["nfe"] for row in ours)])
    have = {row["nfe"] for row in ours if same(row, chosen(card, row["nfe"]), ("chosen",))}
    if ours and top not in have:
        raise ValueError(
            f"the rows of {card.name} in the file are compared with other pictures than those of "
            f"nfe {top} now; give another --out, or leave that budget out"
        )
    left = sorted({*asked} - have, reverse=True)
    for nfe in left:
        own_levels(card, nfe)  # raises now where it has none
    return left, sorted({*left, top}, reverse=True) if left else []


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse(arguments)
    record = read_comparison(options.record)
    facts = {"record": options.record.name, "seeds": record["seeds"]}
    facts["floor"] = {name: one["fd"] for name, one in record["floor"].items()}
    rows = earlier_rows(options.out, facts)
    how = {"solver": options.solver, "dtype": options.dtype}
    work = []
    for name in options.students:
        card = read_card(name)
        if card.distilled is None or card.distilled.teacher_weights != record["model"]["weights"]:
            raise ValueError(f"{name} is no student of the record's {record['model']['name']}")
        known = {"student": card.name, "weights": card.weights_sha256, **how}
        work.append((name, card, known, *left_of(rows, known, card, options.nfe)))
    first, last = map(int, record["seeds"].split("-"))
    seeds = list(range(first, last + 1))
    teacher = fewstep.load(record["model"]["name"])
    spaces = {one: resolve_features(one) for one in record["features"]}
    assert teacher.card.folder is not None
    far = {one: population(teacher.card.folder, record["features"][one]) for one in spaces}
    for name, card, known, left, budgets in work:
        student = fewstep.load(name, dtype=options.dtype, device=options.device) if left else None
        largest: dict[str, np.ndarray] = {}
        for nfe in budgets:
            assert student is not None
            made = fewstep.sample(student, nfe=nfe, seeds=seeds, solver=options.solver, batch=BATCH)
            row = {**known, "nfe": nfe, **chosen(card, nfe)}
            row |= {"excess": {}, "se": {}, "agreement": {}}
            for one, space in spaces.items():
                features = space(made.images)
                if one in largest:
                    cosine = (directions(features) * directions(largest[one])).sum(1).mean()
                    row["agreement"][one] = round(float(cosine), 4)
                largest.setdefault(one, features)
                if nfe in left:
                    ours = Statistics.of(features, far[one].extractor)
                    excess = ours.frechet(far[one]) - facts["floor"][one]
                    row["excess"][one] = round(excess, 4)
                    row["se"][one] = round(bootstrap_frechet(features, far[one]), 4)
            if nfe in left:
                rows.append(row)
                print(json.dumps(row), flush=True)
                about = {"fewstep": VERSION, "machine": machine()}
                write_json(options.out, {**facts, **about, "rows": rows})
    return rows


if __name__ == "__main__":
    sys.exit(ended(main))
