"""The stored comparisons: the documents say what they say, and one of their rows is made again."""

from __future__ import annotations

import functools
import json
import shlex
from typing import Any

import numpy as np
import pytest
import torch

import fewstep
from fewstep.cli.parsing import parse_seeds
from fewstep.models import builtin, read_card
from studies import make_results

RECORDS = {path.stem: path for path in sorted(make_results.STORED.glob("*.json"))}
NONE_YET = pytest.mark.skipif(not RECORDS, reason="results/ has no comparison yet")

# A row's error on its 32 check seeds, made on another machine. float32: sums in another order move
# a solve by less than 1e-5. bfloat16: a network's output has 8 bits, and which of them falls to
# which side depends on the machine's kernels; the mean over 32 pictures moves by a few 1e-4.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-3}


@NONE_YET
def test_the_documents_are_what_the_stored_numbers_give():
    assert make_results.main(check=True) == 0


def cheapest() -> tuple[dict[str, Any], dict[str, Any], str]:
    """A stored comparison of a built-in model, its fastest row of 3 evaluations that a name makes,
    float32 if there is one, and its dtype."""
    found = []
    for path in RECORDS.values():
        record = json.loads(path.read_text())
        for row in record["rows"]:
            dtype = record["sources"][row["source"]]["dtype"]
            named = "/" not in row["sampler"] and row["grid"] is not None  # not a learned one
            plain = named and "student" not in row and not row.get("stochastic")
            plain = plain and dtype in TOLERANCE
            if record["model"]["name"] in builtin() and row["nfe"] == 3 and plain:
                found.append((dtype != "float32", row["seconds"], record, row, dtype))
    assert found, "no stored comparison of a built-in model has a row of 3 evaluations"
    *_, record, row, dtype = min(found, key=lambda one: one[:2])
    return record, row, dtype


@pytest.mark.slow
@NONE_YET
def test_a_stored_row_is_made_again():
    again(*cheapest())


@pytest.mark.slow
@NONE_YET
def test_the_row_of_a_shipped_student_is_made_again_from_its_file():
    record = json.loads(RECORDS[make_results.SHOWN_IN_README].read_text())
    rows = [row for row in record["rows"] if row["sampler"] in builtin() and row["nfe"] == 1]
    assert rows, "the main comparison has no student that ships"
    for row in rows:
        assert not row["stochastic"]
        assert row["student"]["weights"] == read_card(row["sampler"]).weights_sha256
        again(record, row, record["sources"][row["source"]]["dtype"])


@functools.cache
def ends(name: str, condition: Any, seeds: Any, solver: str, nfe: int, grid: str) -> Any:
    """Where the reference ends, at sigma_min and at 0."""
    exact = fewstep.load(name)
    denoiser, low = exact.denoiser(*condition), torch.full((len(seeds),), exact.card.sigma_min)
    with torch.inference_mode():
        x = fewstep.solve(denoiser, exact.prior(seeds), solver, nfe, grid=grid)
        return x, denoiser(x, low)


def again(record: dict[str, Any], row: dict[str, Any], dtype: str) -> None:
    """Samples a row's check seeds and holds their error to the stored one."""
    references, seeds = record["references"], tuple(parse_seeds(row["check"]["seeds"]))
    name = record["model"]["name"]
    model = fewstep.load(name, dtype=dtype)
    assert model.card.weights_sha256 == record["model"]["weights"]
    if "student" in row:
        model = fewstep.load(row["sampler"], dtype=dtype)
    grid = row["grid"] if isinstance(row["grid"], str) else tuple(row["grid"])
    condition = record["condition"]["label"], None, record["condition"]["guidance"]
    how = references["solver"], references["nfe"], references["grid"]
    to_zero = row["final"] or row["end"] == "zero" or grid[-1] == 0
    reference = ends(name, condition, seeds, *how)[int(to_zero)]
    with torch.inference_mode():
        x = fewstep.solve(
            model.denoiser(*condition), model.prior(seeds), row["solver"], row["nfe"],
            grid=grid, afs=row["afs"], final=row["final"], end=row["end"],
        )  # fmt: skip
    gap = (x.double() - reference.double()).numpy()
    error = np.sqrt(np.square(gap).reshape(len(seeds), -1).mean(1)).mean()
    assert error == pytest.approx(row["check"]["error"], abs=TOLERANCE[dtype])


def test_a_record_of_folders_alone_has_its_page_and_figure():
    """As a study writes it: learned solvers of somebody's runs, two training seeds of each."""
    record = json.loads(RECORDS[make_results.SHOWN_IN_README].read_text())
    rows = [row for row in record["rows"] if row["nfe"] in (3, 5) and row["solver"] == "ddim"]
    rows = [
        {**row, "sampler": f"study/{name}-s{seed}", "grid": None}
        for row in rows for name in ("tuned", "amed") for seed in (0, 1)
    ]  # fmt: skip
    record = {**record, "rows": rows}
    assert make_results.named(record)["rows"] == rows
    assert make_results.figure(record).endswith(make_results.mark(record))
    assert "| tuned-s1 |" in make_results.results_page({"study": record})
    with_others = {**record, "rows": [*rows, {**rows[0], "sampler": "ddim", "grid": "karras"}]}
    assert [row["sampler"] for row in make_results.named(with_others)["rows"]] == ["ddim"]


def test_a_printed_command_is_the_command_for_a_shell():
    for path in RECORDS.values():
        for source in json.loads(path.read_text())["sources"]:
            first, *lines, last = make_results.as_code(source["command"]).splitlines()
            assert (first, last) == ("```", "```")
            joined = "\n".join(lines).replace("\\\n", "")  # as a shell reads it
            assert shlex.split(joined) == shlex.split(source["command"])
