"""A study's commands, and the end of its time."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from studies import distill_study, learned_study
from studies.commands import at_least, ended

LONG = ["timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"]


@pytest.mark.parametrize(
    "work", [f"run({LONG!r})", "import time; time.sleep(60)"], ids=["a child", "the study itself"]
)
def test_a_study_stops_by_ctrl_c_when_its_minutes_are_over(work: str) -> None:
    program = f"from studies.commands import run, stop_after\nstop_after(0.01)\n{work}\nprint(7)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50
    )
    assert done.returncode not in (0, 143)
    assert "the 0.01 minutes are over" in done.stderr
    assert "KeyboardInterrupt" in done.stderr
    assert "7" not in done.stdout.splitlines()


def test_a_command_that_fails_ends_the_study_with_its_code() -> None:
    program = "from studies.commands import run; run(['fewstep', 'models', 'nothing-there'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert "$ fewstep models nothing-there" in done.stdout


@pytest.mark.parametrize("study", [distill_study, learned_study])
@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "soon"])
def test_other_minutes_are_refused(study, given, capsys) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit) as ended:
        study.parse(["--data", "x", "--out", "y", "--minutes", given])
    assert ended.value.code == 2
    assert "above 0" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "", "9" * 13])
def test_a_whole_number_that_is_too_small_is_refused(text) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="a whole number, at least 1, got"):
        at_least(1)(text)


def test_what_a_user_can_mend_is_one_line(capsys) -> None:
    def refuse() -> None:
        raise ValueError("nfe must be\n1, got \x1b[31m")

    assert ended(refuse) == 2
    assert capsys.readouterr().err == "error: nfe must be 1, got \\x1b[31m\n"
    assert ended(lambda: at_least(1)("1")) == 0
