"""fewstep compare."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import in_process


def quick(folder: Path) -> Iterator[Any]:
    yield from ("--out", folder / "out", "--cache", folder / "cache", "--seeds", "0-3")
    yield from ("--features", "none", "--screen", 0, "--reference-nfe", 10, "--population", 10)


def test_the_command_compares_adds_and_resumes(tmp_path, capsys):
    base = [*quick(tmp_path), "--nfe", "3,4", "--no-plots"]
    assert in_process("compare", *base, "--solvers", "ddim,heun", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    rows = [(row["sampler"], row["nfe"]) for row in record["rows"]]
    assert rows == [("ddim", 3), ("ddim", 4), ("heun", 4)]
    assert record["sources"][0]["command"].startswith("fewstep compare --out ")
    stored = tmp_path / "out" / "comparison.json"
    assert json.loads(stored.read_text()) == record

    before = stored.with_name("before.json")
    shutil.copy(stored, before)
    assert in_process("compare", *base, "--solvers", "dpmpp-2m", "--beside", before) == 0
    out = capsys.readouterr().out
    assert "dpmpp-2m" in out
    assert str(stored) in out
    merged = json.loads(stored.read_text())
    assert {row["sampler"] for row in merged["rows"]} == {"ddim", "heun", "dpmpp-2m"}
    by_name = {(row["sampler"], row["nfe"]): row for row in merged["rows"]}
    for row in record["rows"]:
        assert by_name[row["sampler"], row["nfe"]] == {**row, "source": 1}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "ddim" in page

    other = [*base, "--solvers", "unipc-2", "--beside", before, "--seeds", "0-2"]
    assert in_process("compare", *other) == 2
    assert "the comparisons differ in seeds: 0-2 and 0-3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nfe", "x"], "--nfe is written like 3,5,7 or 3-8, got 'x'"),
        (["--nfe", "0"], "budgets must be from 1 to 10000, got 0"),
        (["--solvers", "dimm"], "dimm"),
        (["--solvers", ","], "solvers must name at least one, got ','"),
        (["--grids", "carras"], "grids must be among"),
        (["--features", "eyes"], "there are no features 'eyes'"),
        (["--choose-by", "eyes"], "choose_by must be error or one of"),
        (["--seeds", "100000-100001"], "kept for population"),
        (["--beside", "nowhere.json"], "nowhere.json: No such file"),
        (["--label", "sock"], "sock"),
        (["--guidance", "2"], "guidance"),
        (["--solvers", "heun", "--nfe", "3"], "none of the solvers can spend any of the budgets"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(tmp_path, capsys, arguments, words):
    assert in_process("compare", *quick(tmp_path), "--no-plots", *arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "cache").exists()
