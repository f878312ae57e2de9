"""The study of learned solvers: what it plans can be trained, what is done is known, and its
expectations say pass and fail where they should."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewstep
from benchmarks import learned_overhead
from fewstep.cli.run import app
from fewstep.learned.kinds import kind_of
from studies import learned_study, paired
from studies.learned_study import ABLATION, VARIANTS, Rows, expectations, parse, trainings


def options(out: Path, *more: str) -> Any:
    return parse(["--out", str(out), *more])


def test_all_that_is_planned_can_be_trained(tmp_path):
    planned = trainings(options(tmp_path, "--budgets", "3-9"), [*VARIANTS, *ABLATION])
    assert len(planned) == 2 * (7 * len(VARIANTS) + len(ABLATION))
    assert len({one.folder for one in planned}) == len(planned)
    for one in planned:
        words = one.command[4:]
        names = [word for word in words if word.startswith("--")]
        assert len(set(names)) == len(names)
        given = dict(pairwise(words))
        kind = kind_of(given["--method"])
        first = given.get("--afs")
        recipe = kind.recipe(given.get("--base"), int(given["--nfe"]), first, None, False)
        assert recipe.intervals >= 1


def test_the_command_knows_every_planned_option(tmp_path):
    once = options(tmp_path, "--training-seeds", "1", "--budgets", "5")
    for one in trainings(once, [*VARIANTS, *ABLATION]):
        assert one.command[:3] == ("fewstep", "train", "solver")
        _, bound, _ = app.parse_args(one.command[1:], exit_on_error=False, print_error=False)
        bound.apply_defaults()
        given = bound.arguments
        assert given["out"] == one.folder
        assert given["batch"] == (128 if "authors" in one.variant else 32)
        assert given["trajectories"] == 10_000


def test_what_is_done_is_known_and_other_lengths_are_refused(tmp_path, capsys):
    only = ("--only", "amed", "--budgets", "5", "--trajectories", "100", "--list")
    first = trainings(options(tmp_path, *only), ["amed"])[0]
    first.folder.mkdir(parents=True)
    (first.folder / "solver.json").write_text(
        json.dumps({"training": {"trajectories": 100, "batch": 32}})
    )
    learned_study.main(["--out", str(tmp_path), *only])
    told = capsys.readouterr().out
    assert "1 of 2 solvers are trained" in told
    assert "done  amed-s0 at 5" in told
    assert "left  amed-s1 at 5" in told
    with pytest.raises(ValueError, match="was trained with trajectories 100, now 200"):
        learned_study.main(["--out", str(tmp_path), *only[:-2], "200", "--list"])


def row(sampler: str, nfe: int, excess: float, free: bool = False) -> dict[str, Any]:
    return {
        "sampler": sampler,
        "solver": sampler,
        "nfe": nfe,
        "grid": "karras" if free else None,
        "afs": "mean",
        "error": 1.0,
        "error_se": 0.1,
        "fd": {"fashion-b": {"excess": excess, "excess_se": 0.01}},
    }


def test_expectations_compare_the_right_rows():
    rows = [
        row("ddim", 5, 4.0, free=True),
        row("heun", 5, 9.0, free=True),
        row("ddim", 7, 1.0, free=True),
        row("ipndm-3", 7, 0.9, free=True),
        row("out/plugin-ddim-s0", 5, 3.0),
        row("out/plugin-ddim-s1", 5, 2.0),
        row("out/plugin-ddim-zero-s0", 5, 0.1),  # another variant
        row("out/amed-s0", 5, 5.0),
        row("out/tuned-s0", 5, 0.8),
        row("out/tuned-s1", 5, 1.2),
    ]
    found = {what: (ours, other, holds) for what, ours, other, holds in expectations(
        Rows(rows, "fashion-b"), (5, 7)
    )}  # fmt: skip
    assert found["plugin on ddim at 5 is below ddim"] == (2.5, 4.0, True)
    assert found["amed at 5 is below heun and dpm-solver-2"] == (5.0, 9.0, True)
    assert found["amed at 5 is below ddim"] == (5.0, 4.0, False)
    assert found["tuned at 5 reaches the best training-free solver at 7"] == (1.0, 0.9, False)
    assert found["tuned at 5 is 40% below the best plugin"] == (1.0, 0.6 * 2.0, True)
    assert len(found) == 5  # what has no rows is left out


def test_overhead_is_taken_of_every_pair():
    rows = learned_overhead.sampling(fewstep.load("fashion-mnist"), batch=1, rounds=1)
    assert [one["beside"] for one in rows] == [pair[2] for pair in learned_overhead.PAIRS]
    assert all(torch.tensor(one["ratio"]) > 0 for one in rows)
    assert rows[0]["learned"] == "amed"


def test_paired_distances(tmp_path, capsys, monkeypatch):
    """A learned solver by name and a plain one; and the numbers are what they say."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    common = ("--seeds", "1000000-1000003", "--nfe", "3", "--dtype", "float32")
    paired.main(["--solvers", "tuned", "ddim", "--end", "zero", *common])
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == ["tuned", "ddim"]
    errors = [float(line.split()[2]) for line in told]
    assert 0 < errors[0] < errors[1] < 1
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((500, 2))
    found = paired.distances(exact + np.array([3.0, 4.0]), exact)
    np.testing.assert_allclose([found[k] for k in ("fd", "mean", "paired")], 25, rtol=1e-6)
    assert found["spread"] == pytest.approx(1)
    assert paired.distances(3 * exact, exact)["spread"] == pytest.approx(9)
