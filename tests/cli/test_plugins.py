"""Solvers of one's own at the command line, and what refuses to run in several processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fewstep.solver import Range, Solver, registry, rules
from fewstep.solver.multistep import linear_multistep
from tests.support.command import command

MODULE = """
from fewstep import Combine, Eval, Solver, register
from itertools import pairwise

def ops(sigmas, pull=1.0):
    for cur, nxt in pairwise(sigmas):
        yield Eval(cur)
        yield Combine((pull * (1 - nxt / cur),), nxt, a=nxt / cur)

def add():
    register(Solver("my-euler", ops, "x0", 1, 1, options=(("pull", 1.0),)))
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Registered solvers, modules and paths are as before afterwards."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.chdir(tmp_path)


def plan(*words: object) -> dict[str, object]:
    made = command("plan", "my-euler:pull=0.5", "--nfe", 2, "--json", *words)
    assert made.exit_code == 0, made.stderr
    return json.loads(made.stdout)


@pytest.mark.parametrize("words", [("--import", "my_solvers_a"), ("--import=my_solvers_a",)])
def test_a_module_on_disk_registers_a_solver(words, tmp_path):
    (tmp_path / "my_solvers_a.py").write_text(MODULE + "\nadd()\n")
    assert plan(*words)["solver"] == "my-euler:pull=0.5"


def test_an_entry_point_registers_a_solver(tmp_path):
    (tmp_path / "my_solvers_b.py").write_text(MODULE)
    info = tmp_path / "my_solvers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-solvers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fewstep.solvers]\nmine = my_solvers_b:add\n")
    assert plan()["solver"] == "my-euler:pull=0.5"
    (tmp_path / "my_solvers_b.py").unlink()
    sys.modules.pop("my_solvers_b")
    found = command("plan", "ddim")
    assert (found.exit_code, found.stderr.count("\n")) == (2, 1)
    assert "the installed plugin mine (my_solvers_b:add): No module named" in found.stderr


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("nowhere_at_all", None, "--import nowhere_at_all: No module named"),
        ("../x", None, "--import takes a module's name"),
        ("", None, "--import takes a module's name"),
        ("broken_a", "1 / 0", "--import broken_a: ZeroDivisionError"),
        ("broken_b", "def (", "--import broken_b: SyntaxError"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(name, text, words, tmp_path):
    if text is not None:
        (tmp_path / f"{name}.py").write_text(text)
    found = command("plan", "ddim", "--import", name)
    assert (found.exit_code, found.stderr.count("\n")) == (2, 1)
    assert words in found.stderr


def ops(sigmas, eta=1.0):
    return linear_multistep(sigmas, rule=rules.ipndm, order=1)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"options": {"eta": 1.0}}, "options of mine must be pairs in a tuple"),
        ({"options": ("eta",)}, "options of mine must be pairs in a tuple"),
        ({"options": (("eta", 1.0, 2.0),)}, "options of mine must be pairs in a tuple"),
        ({"options": [("eta", 1.0)]}, "options of mine must be pairs in a tuple"),
        ({"options": (("eta", "1"),)}, "eta of mine must be finite, got '1'"),
        ({"options": (("eta", float("nan")),)}, "eta of mine must be finite, got nan"),
        (
            {"options": (("eta", 2.0),), "ranges": (("eta", Range(0, 1)),)},
            "eta of mine must be at least 0 and at most 1, got 2.0",
        ),
        ({"options": (("theta", 1.0),)}, "'theta' is not both one of them and a keyword"),
        ({"ranges": (("eta", Range(0, 1)),)}, "'eta' is not both one of them and a keyword"),
    ],
)
def test_options_are_checked_when_a_solver_is_made(given, words):
    with pytest.raises(ValueError, match="mine") as caught:
        Solver("mine", ops, "x0", 1, 1, **given)
    assert words in str(caught.value)


def test_options_that_fit_are_taken():
    made = Solver("mine", ops, "x0", 1, 1, options=(("eta", 1.0),))
    assert made.with_options(eta=0.5).name == "mine:eta=0.5"


@pytest.mark.parametrize(
    "words",
    [
        ("train", "solver", "--out", "out"),
        ("train", "network", "--data", "data", "--out", "out"),
        ("serve",),
        ("demo",),
    ],
)
def test_several_processes_are_refused_before_any_work(words, tmp_path):
    before = sorted(tmp_path.iterdir())
    found = command(*words, env={"WORLD_SIZE": "2", "RANK": "1"})
    assert (found.exit_code, found.stderr.count("\n")) == (2, 1)
    assert "WORLD_SIZE is 2" in found.stderr
    assert "without torchrun" in found.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_processes_that_share_work_need_the_store_of_torchrun(name, tmp_path, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    more = ["pictures"] if name == "evaluate" else []
    found = command(name, *more, "--out", tmp_path / "out", env={"WORLD_SIZE": "2", "RANK": "1"})
    assert (found.exit_code, found.stderr.count("\n")) == (2, 1)
    assert "torchrun's store cannot be reached" in found.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", ["1", "", "none"])
def test_one_process_is_not_refused(count):
    assert command("plan", "ddim", env={"WORLD_SIZE": count}).exit_code == 0
    assert command("sample", "--help", env={"WORLD_SIZE": "4"}).exit_code == 0
