"""A study's commands, and the end of its time."""

from __future__ import annotations

import subprocess
import sys

import pytest

from studies import distill_study, learned_study

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
