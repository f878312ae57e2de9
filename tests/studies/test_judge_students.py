"""The judge of students gives what a comparison would, less what it leaves out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fewstep
from fewstep.evaluate.features import resolve_features
from fewstep.evaluate.statistics import Statistics
from fewstep.models import read_card
from fewstep.models.card import POPULATION_FOLDER
from studies.commands import ended
from studies.judge_students import left_of, main
from studies.rows import chosen

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
    out = tmp_path / "out.json"
    before = out.read_bytes()
    assert len(main([*how, "--out", str(out)])) == 2  # both were there
    assert out.read_bytes() == before
    out.write_text(json.dumps({**json.loads(before), "rows": rows[:1]}))
    assert main([*how, "--out", str(out)])[1] == rows[1]  # compared with 2, which was there


KNOWN = {"student": "splam", "weights": "abc", "solver": "auto", "dtype": "float32"}


@pytest.mark.parametrize(
    "have, asked, left, made",
    [
        ([], [1, 2, 4], [4, 2, 1], [4, 2, 1]),
        ([4], [1, 2, 4], [2, 1], [4, 2, 1]),
        ([8, 2], [1, 2], [1], [8, 1]),  # the largest was not asked for
        ([8, 2, 1], [1, 2], [], []),
    ],
)
def test_what_is_left_is_compared_with_the_largest(have, asked, left, made) -> None:
    rows = [{**KNOWN, "nfe": nfe} for nfe in have] + [{**KNOWN, "weights": "other", "nfe": 8}]
    assert left_of(rows, KNOWN, read_card("fashion-mnist-splam"), asked) == (left, made)


def test_rows_that_were_compared_with_other_pictures_are_refused() -> None:
    card, rows = read_card("fashion-mnist-splam"), [{**KNOWN, "nfe": 2}]
    with pytest.raises(ValueError, match="compared with other pictures than those of nfe 4"):
        left_of(rows, KNOWN, card, [1, 2, 4])
    again = replace(card, about={**card.about, "levels": {}})  # chosen after the row was made
    with pytest.raises(ValueError, match="compared with other pictures than those of nfe 2"):
        left_of(rows, KNOWN, again, [1, 2])
    made = {**KNOWN, "nfe": 2, **json.loads(json.dumps(chosen(again, 2)))}
    assert left_of([made], KNOWN, again, [2]) == ([], [])


@pytest.mark.parametrize(
    "found, message",
    [
        ({"record": "other.json", "rows": []}, "its record is 'other.json'"),
        ({"seeds": "0-9", "rows": []}, "its seeds is '0-9'"),
        ({"record": "fashion-mnist.json"}, "has no rows of judged students"),
    ],
)
def test_a_file_of_another_record_is_refused(found, message, tmp_path, capsys) -> None:
    out = tmp_path / "out.json"
    out.write_text(json.dumps(found))
    how = [str(RECORD), "fashion-mnist-splam", "--out", str(out)]
    assert ended(lambda: main(how)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert json.loads(out.read_text()) == found


def test_a_student_of_another_teacher_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="fashion-mnist is no student of the record's"):
        main([str(RECORD), "fashion-mnist", "--out", str(tmp_path / "out.json")])
