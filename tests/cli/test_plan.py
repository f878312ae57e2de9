"""fewstep plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewstep import solvers as solver_names
from fewstep.models import read_card
from tests.support.command import command, in_process


def test_plan_shows_what_auto_is_on_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process("plan", "auto", "--model", "fashion-mnist", "--nfe", "5", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    known = read_card("fashion-mnist").auto["5"].given()
    assert known["learned"] == "tuned"
    assert (plan["solver"], plan["grid"]) == (f"tuned from {known['solver']}", "learned")
    assert sum(op["op"] == "eval" and op.get("source", "net") == "net" for op in plan["ops"]) == 5
    assert (plan["sigmas"][0], plan["sigmas"][-1]) == (80.0, 0.002)


def test_plan_lists_the_solvers_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process("plan", "--list", "--json") == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert set(solver_names()) <= set(listed)
    assert "euler-a" in listed["ddim-eta"]["aliases"]
    assert listed["ddim-eta"]["options"]["eta"]["default"] == 1.0


def test_plan_shows_the_coefficients(capsys: pytest.CaptureFixture[str]) -> None:
    in_process("plan", "dpmpp-2m", "--nfe", 3)
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert rows.count("eval") == rows.count("combine") == 3
    in_process("plan", "ddim", "--grid", "80,8,1", "--json")
    plan = json.loads(capsys.readouterr().out)
    combine = [op for op in plan["ops"] if op["op"] == "combine"]
    assert [op["a"] for op in combine] == pytest.approx([0.1, 0.125])
    assert [op["b"][0] for op in combine] == pytest.approx([0.9, 0.875])


def test_plan_lists_every_solver(capsys: pytest.CaptureFixture[str]) -> None:
    in_process("plan", "--list")
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert {"ddim", "unipc-3-bh1", "dpmpp-2m-sde"} <= listed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('raise RuntimeError("boom")', "RuntimeError: boom"),
        ("def rule(:", "SyntaxError: "),
        ("import no_such_module_here", "No module named 'no_such_module_here'"),
        ("from fewstep import no_such_name", "ImportError: "),
        (None, "looked for here and on PYTHONPATH"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(
    text: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"rules_{abs(hash(text))}"
    if text is not None:
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    ran = command("plan", "ddim", "--nfe", 2, "--import", name)
    assert ran.exit_code == 2
    assert ran.stderr.count("\n") == 1
    assert f"--import {name}: " in ran.stderr
    assert words in ran.stderr
