"""Excess Frechet distances of students by budget, without solving the test seeds finely again.

    python -m studies.judge_students results/fashion-mnist.json STUDENT... --nfe 1 2 4 8 --out FILE

The record is a comparison of the students' teacher: it has the distance of the fine solutions of
its test seeds to their population, in each feature network. Less that, the distance of a student's
pictures of the same seeds is the excess that `fewstep compare` gives to the last digit. Its
standard error is over the choice of pictures, not paired with the fine solutions, and so a little
larger; the error of each picture is left out.

agreement is the mean cosine of the features of a seed's picture at a budget and at the largest one.
A row that is in the file already is kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fewstep
from fewstep.evaluate.compare import read_comparison
from fewstep.evaluate.features import resolve_features
from fewstep.evaluate.statistics import Statistics, bootstrap_frechet
from fewstep.files import write_json
from fewstep.models.card import POPULATION_FOLDER
from fewstep.provenance import VERSION, machine
from fewstep.text import slug

BATCH = 50


def population(folder: Path, name: str) -> Statistics:
    """Statistics of the fine solutions of other seeds, as they come with the teacher."""
    (found,) = (folder / POPULATION_FOLDER).glob(f"{slug(name)}-*.npz")
    return Statistics.load(found)


def directions(features: np.ndarray) -> np.ndarray:
    rows = features.astype(float)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("students", nargs="+")
    parser.add_argument("--solver", default="auto")
    parser.add_argument("--nfe", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    record = read_comparison(options.record)
    first, last = map(int, record["seeds"].split("-"))
    seeds = list(range(first, last + 1))
    teacher = fewstep.load(record["model"]["name"])
    spaces = {one: resolve_features(one) for one in record["features"]}
    assert teacher.card.folder is not None
    far = {one: population(teacher.card.folder, record["features"][one]) for one in spaces}
    rows: list[dict[str, Any]] = []
    if options.out.exists():
        rows = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
    for name in options.students:
        student = fewstep.load(name, dtype=options.dtype, device=options.device)
        known = {"student": student.card.name, "weights": student.card.weights_sha256}
        known |= {"solver": options.solver, "dtype": options.dtype}
        last_seen: dict[str, np.ndarray] = {}
        for nfe in sorted(options.nfe, reverse=True):
            if any(row.items() >= {**known, "nfe": nfe}.items() for row in rows):
                continue
            made = fewstep.sample(student, nfe=nfe, seeds=seeds, solver=options.solver, batch=BATCH)
            row = {**known, "nfe": nfe, "excess": {}, "se": {}, "agreement": {}}
            for one, space in spaces.items():
                features = space(made.images)
                ours = Statistics.of(features, far[one].extractor)
                floor = record["floor"][one]["fd"]
                row["excess"][one] = round(ours.frechet(far[one]) - floor, 4)
                row["se"][one] = round(bootstrap_frechet(features, far[one]), 4)
                if one in last_seen:
                    cosine = (directions(features) * directions(last_seen[one])).sum(1).mean()
                    row["agreement"][one] = round(float(cosine), 4)
                last_seen.setdefault(one, features)
            rows.append(row)
            print(json.dumps(row), flush=True)
            facts = {"record": options.record.name, "seeds": record["seeds"], "fewstep": VERSION}
            write_json(options.out, {**facts, "machine": machine(), "rows": rows})
    return rows


if __name__ == "__main__":
    main()
