"""The judge of students gives what a comparison would, less what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import fewstep
from fewstep.evaluate.features import resolve_features
from fewstep.evaluate.statistics import Statistics
from fewstep.models.card import POPULATION_FOLDER
from studies.judge_students import main

RECORD = Path(__file__).parents[2] / "results" / "fashion-mnist.json"


def test_the_excess_is_the_distance_less_that_of_the_record(tmp_path: Path) -> None:
    record = json.loads(RECORD.read_text())
    record["seeds"] = "0-11"
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    how = [str(path), "fashion-mnist-splam", "--nfe", "1", "2", "--dtype", "float32"]
    rows = main([*how, "--out", str(tmp_path / "out.json")])
    assert [row["nfe"] for row in rows] == [2, 1]
    student, teacher = (fewstep.load(f"fashion-mnist{end}") for end in ("-splam", ""))
    space, seen = resolve_features("fashion-b"), {}
    assert teacher.card.folder is not None
    (known,) = (teacher.card.folder / POPULATION_FOLDER).glob("fashion-b-*.npz")
    for row in rows:
        seen[row["nfe"]] = space(fewstep.sample(student, nfe=row["nfe"], seeds=range(12)).images)
        ours = Statistics.of(seen[row["nfe"]], "fashion-b-bf529eb7 native")
        wanted = ours.frechet(Statistics.load(known)) - record["floor"]["fashion-b"]["fd"]
        assert row["excess"]["fashion-b"] == pytest.approx(wanted, abs=2e-3)
    ends = [one / np.linalg.norm(one, axis=1, keepdims=True) for one in seen.values()]
    assert rows[1]["agreement"]["fashion-b"] == pytest.approx(
        float((ends[0] * ends[1]).sum(1).mean()), abs=1e-3
    )
    before = (tmp_path / "out.json").read_bytes()
    assert len(main([*how, "--out", str(tmp_path / "out.json")])) == 2  # both were there
    assert (tmp_path / "out.json").read_bytes() == before
