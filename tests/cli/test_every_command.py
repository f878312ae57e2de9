"""What holds for every command."""

from __future__ import annotations

import inspect
import re
import resource
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from fewstep import __version__
from fewstep.cli.parsing import parse_seeds
from fewstep.cli.run import app
from fewstep.cli.work import resumable
from tests.support.command import command, fewstep, in_process

# Every command: what it needs to get as far as its first check, and something that it must refuse.
COMMANDS: dict[str, list[str]] = {
    "sample": [],
    "plan": [],
    "convert": ["nowhere", "--out", "out"],
    "models": [],
    "demo": [],
    "compare": [],
    "evaluate": [],
    "geometry": [],
    "serve": [],
    "status": ["nowhere"],
    "train network": ["--data", "nowhere", "--out", "out"],
    "train solver": ["fashion-mnist", "--out", "out"],
    "distill splam": ["fashion-mnist", "--data", "nowhere", "--out", "out"],
    "distill levels": ["fashion-mnist-splam"],
}
BAD: dict[str, list[list[str]]] = {
    "sample": [
        *(["nope"], ["--nfe", "0"], ["--seeds", "x"], ["--solver", "dimm"], ["--shards", "0"]),
        *(["--executor", "slurm"], ["--keep", "jpg"], ["--keep", "none"], ["--workers", "0"]),
    ],
    "plan": [["dimm"], ["ddim", "--nfe", "0"], ["ddim", "--grid", "1,2"]],
    "convert": [[], ["--dtype", "int8"], ["--draws", "-1"]],
    "models": [["nope"], ["../fashion-mnist"]],
    "demo": [["--model", "nope"], ["--seeds", "9-1"], ["--nfe", "0"]],
    "compare": [["nope"], ["--nfe", "x"], ["--reference-nfe", "1001"], ["--reference-nfe", "7"]],
    "evaluate": [[], ["nowhere"], ["nowhere", "--metrics", "fid"], ["nowhere", "--batch", "0"]],
    "geometry": [
        ["nope"],
        ["--points", "3"],
        ["--points", "10001"],
        ["--seeds", "x"],
        ["--grid", "1,2"],
    ],
    "serve": [["nope"], ["--port", "70000"], ["--host", "0.0.0.0"], ["--batch", "0"]],
    "status": [[], ["--check"]],
    "train network": [["--lr", "nan"], ["--batch", "3"], ["--widths", "a"], []],
    "train solver": [["--method", "x"], ["--nfe", "0"], ["--batch", "x"], ["--grid", "1,2"]],
    "distill levels": [
        ["fashion-mnist"],
        ["--lowest", "0"],
        ["--nfe", "x"],
        ["--validation-seeds", "9"],
    ],
    "distill splam": [["--lr", "0"], ["--guidance", "x"], ["--method", "x"], []],
}


def test_the_commands_are_these() -> None:
    found = set()
    for name in app.resolved_commands():
        inner = app[name].resolved_commands() if not name.startswith("-") else {}
        words = [one for one in inner if not one.startswith("-")]
        found |= {f"{name} {one}" for one in words} or ({name} - {"--help", "-h", "--version"})
    assert found == set(COMMANDS) == set(BAD)


@pytest.mark.parametrize(
    "more", [["--no-such-option"], ["--nfe", ""], ["--out", ""], ["a", "b", "c"]]
)
@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_usage_is_one_line_and_writes_nothing(
    name: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(name, [*COMMANDS[name], *more], tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("name", "more"), [(name, more) for name, cases in BAD.items() for more in cases]
)
def test_bad_input_is_one_line_and_writes_nothing(
    name: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(name, [*COMMANDS[name], *more], tmp_path, monkeypatch)


@pytest.mark.parametrize("value", ["2.5", "1e1", "0x4", "1_0", "True"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_whole_number_is_written_in_digits(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: Any = app
    for word in name.split():
        found = found[word]
    every = inspect.signature(found.default_command).parameters.values()
    kinds = {one.name: typing.get_args(one.annotation) for one in every}
    whole = [n for n, kind in kinds.items() if kind and int in (kind[0], *typing.get_args(kind[0]))]
    for option in whole[:2]:
        refused(
            name, [*COMMANDS[name], f"--{option.replace('_', '-')}", value], tmp_path, monkeypatch
        )


def refused(name: str, arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    ran = command(*name.split(), *arguments)
    assert ran.exit_code == 2, ran.output
    assert ran.stdout == ""
    assert ran.stderr.count("\n") == 1
    assert ran.stderr.startswith("fewstep: ")
    assert "Traceback" not in ran.stderr
    assert not list(folder.iterdir())


@pytest.mark.parametrize("columns", [60, 100])
@pytest.mark.parametrize("name", ["", "train", "distill", *COMMANDS])
def test_help_fits_the_terminal(name: str, columns: int) -> None:
    ran = command(*name.split(), "--help", env={"COLUMNS": str(columns)})
    assert ran.exit_code == 0
    lines = ran.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert not [line for line in lines if "…" in line or "BOOL" in line.upper()]
    options = re.findall(r"^│ (?:\*  |   )?(--[a-z0-9-]+)", ran.stdout, re.MULTILINE)
    assert options or name in ("", "train", "distill")
    assert len(options) == len(set(options))


def test_every_option_has_help() -> None:
    for name in COMMANDS:
        lines = command(*name.split(), "--help", env={"COLUMNS": "400"}).stdout.splitlines()
        for line in lines:
            if match := re.match(r"^│\s\*?\s*((?:-\S+ ?)+)(?:[A-Z]+)?\s*(.*?)\s*│$", line):
                assert len(match[2].split()) > 1, (name, line)


def test_help_waits_neither_for_torch_nor_for_numpy() -> None:
    code = (
        "import sys; from fewstep.cli.run import run\n"
        "for name in sys.argv[1:]: assert run([*name.split(), '--help']) == 0, name\n"
        "sys.exit(bool({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code, *COMMANDS], capture_output=True).returncode == 0
    )


def test_help_takes_less_than_half_a_second() -> None:
    fewstep("--help")  # so that what it reads is in memory
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        fewstep("sample", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    # of the processor, for the machine may be busy
    assert min(taken) < 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "nope"], ["nope", "fewstep models"]),
        (["sample", "fashion-mnits"], ["fashion-mnist"]),
        (["sample", "--solver", "dpmp"], ["dpmp", "dpmpp-2m"]),
        (["sample", "--solver", "heun", "--nfe", "5", "--afs", "none"], ["heun", "4, 6"]),
        (["sample", "--seeds", "9-1"], ["seeds", "9-1"]),
        (["sample", "--seeds", "a"], ["seeds", "0-63"]),
        (["sample", "--seeds", "0-99999999999"], ["at most"]),
        (["sample", "--grid", "80,1,2"], ["decreas"]),
        (["sample", "--grid", "8,x"], ["80,9,1"]),
        (["sample", "--label", "hat"], ["hat", "boot"]),
        (["sample", "--guidance", "2"], ["label"]),
        (["sample", "--device", "cuda:9"], ["cuda:9"]),
        (["sample", "--device", "toaster"], ["toaster"]),
        (["sample", "--dtype", "int8"], ["int8", "bfloat16"]),
        (["sample", "--out", "/proc/nowhere"], ["/proc/nowhere"]),
        (["plan", "unknown-solver"], ["unknown-solver"]),
        (["plan", "dpm-solver-3", "--nfe", "4"], ["3, 6"]),
        (["plan", "ddim", "--sigma-max", "0.001"], ["sigma_max"]),
        (["models", "nope"], ["nope"]),
        (["train", "network", "--data", "nowhere", "--out", "x"], ["train-images-idx3"]),
        (["demo", "--model", "nope"], ["nope"]),
        (["demo", "--seeds", "x"], ["seeds"]),
    ],
)
def test_what_is_refused_says_what_is_wrong(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert in_process(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("fewstep: ")
    assert all(word in error for word in words), error
    assert not list(tmp_path.rglob("*.png"))


def test_an_error_leaves_no_traceback_in_a_real_process() -> None:
    done = fewstep("sample", "--seeds", "9-1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fewstep: seeds must rise and stay below 2^63, got '9-1'\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "--nfe", "x"], ["--nfe"]),
        (["sample", "--gird", "karras"], ["--gird", "--grid"]),
        (["nope"], ["nope"]),
        (["sample", "--grid", ""], ["--grid is empty"]),
        (["sample", "--out", ""], ["--out is empty"]),
        (["sample", "--label="], ["--label is empty"]),
        (["plan", ""], ["empty"]),
        (["sample", "--grid", ","], ["80,9,1"]),
        (["sample", "--label", "bag,"], ["''"]),
        (["sample", "--label", "troser"], ["troser", "did you mean trouser?"]),
        (["sample", "--guidance", "nan", "--label", "bag"], ["guidance"]),
        (["sample", "--head-start", "nan"], ["head_start"]),
        (["sample", "--head-start", "0"], ["head_start"]),
        (["sample", "--afs", "mean", "--head-start", "20"], ["afs='mean'", "80", "20"]),
        (["sample", "--grid", "80,9,1", "--nfe", "2"], ["sigmas", "--nfe"]),
        (["sample", "--grid", "80,9,1", "--nfe", "0"], ["sigmas", "--nfe"]),
        (["sample", "--grid", "80,9,1", "--end", "zero"], ["sigmas", "--end"]),
        (["sample", "--final", "--end", "zero"], ["final", "0"]),
        (["sample", "--grid", "discrete"], ["discrete", "karras"]),
        (["sample", "--solver", "dpm-solver-2:r=0"], ["r of dpm-solver-2"]),
        (["sample", "--plan", "nowhere.json"], ["nowhere.json"]),
        (["plan", "auto"], ["auto", "model"]),
        (["plan", "ddim", "--grid", "9,1", "--nfe", "1"], ["sigmas", "--nfe"]),
        (["plan", "ddim", "--grid", "9,1", "--sigma-max", "9"], ["sigmas", "--sigma-max"]),
        (["plan", "ddim", "--grid", "trailing"], ["trailing", "karras"]),
    ],
)
def test_usage_errors_and_contradictions_are_one_line_and_leave_no_folder(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert in_process(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("fewstep: ")
    assert all(word in error for word in words), error
    assert "schedule=" not in error
    assert not list(tmp_path.iterdir())


def test_ctrl_c_anywhere_else_says_so_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fewstep.models.builtin", stop)
    assert in_process("models") == 130
    assert capsys.readouterr().err == "fewstep: stopped; what was finished is kept\n"


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process("--version") == 0
    assert capsys.readouterr().out == f"fewstep {__version__}\n"
    assert in_process("sample", "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if "bool" in line and "--help" not in line]
    assert in_process() == 2  # no command: the help
    assert "Commands" in capsys.readouterr().out


def test_seeds_are_kept_in_order_and_once() -> None:
    assert parse_seeds("5,0-2,1") == [5, 0, 1, 2]


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ("file", "holds what was done, run the same command again to go on"),
        ("full", "holds what was done, run the same command again to go on"),
        ("empty", "nothing was saved yet"),
        ("hidden", "nothing was saved yet"),
        ("none", "nothing was saved yet"),
    ],
)
def test_what_is_said_of_stopped_work_is_so(made, told, tmp_path, capsys):
    path = tmp_path / "out"
    if made == "file":
        path.write_bytes(b"state")
    elif made != "none":
        path.mkdir()
        if made in ("full", "hidden"):
            (path / ("a" if made == "full" else ".a.partial")).write_bytes(b"")
    with pytest.raises(SystemExit) as stopped, resumable(path):
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert told in capsys.readouterr().err
