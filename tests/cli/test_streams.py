"""Surroundings: closed streams, poor encodings, odd folder names, signals at any moment."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.command import some_idx, some_pictures

SHORT = {
    "plan": "plan ddim --nfe 2",
}
LONG = {
    "sample": "sample --seeds 0-1 --nfe 2 --out {out}",
    "models": "models",
    "evaluate": "evaluate {pictures} --features fashion-b --resamples 0 --out {out}/numbers.json",
    "demo": "demo --seeds 0-1 --nfe 2 --out {out}",
    "geometry": "geometry --seeds 0-1 --points 5 --out {out}",
    "compare": "compare --solvers ddim --nfe 2 --seeds 0-3 --screen 0 --features none "
    "--reference-nfe 8 --out {out}",
    "train solver": "train solver fashion-mnist --nfe 2 --trajectories 4 --batch 4 --inner 2 "
    "--validation-seeds 2 --out {out}",
    "train network": "train network --data {data} --pictures 4 --batch 2 --widths 16,16 "
    "--out {out}",
    "distill splam": "distill splam fashion-mnist --data {pictures} --pictures 2 --batch 2 "
    "--label-dropout 1 --validation-seeds 0 --out {out}",
}
EVERY = [
    *(pytest.param(line, id=name) for name, line in SHORT.items()),
    *(pytest.param(line, id=name, marks=pytest.mark.slow) for name, line in LONG.items()),
]
WRITES = [one for one in EVERY if "{out}" in str(one.values[0])]


def typed(line: str, folder: Path, out: Path | None = None) -> str:
    """The command as a shell reads it."""
    pictures = data = ""
    if "{pictures}" in line:
        pictures = shlex.quote(str(some_pictures(folder / "pictures")))
    if "{data}" in line:
        data = shlex.quote(str(some_idx(folder / "data")))
    target = shlex.quote(os.fsdecode(os.fsencode(out or folder / "out")))
    command = line.format(out=target, pictures=pictures, data=data)
    return f"{shlex.quote(sys.executable)} -m fewstep {command}"


def shell(line: str, folder: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    known = {"OMP_NUM_THREADS": "1", "FEWSTEP_CACHE": str(folder / "cache"), **env}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LC_")}
    return subprocess.run(
        ["sh", "-c", line], capture_output=True, env={**kept, **known}, timeout=300
    )


@pytest.mark.parametrize("line", EVERY)
def test_closed_streams_change_no_result(line: str, tmp_path: Path) -> None:
    done = shell(f"{typed(line, tmp_path)} >&- 2>&- <&-", tmp_path)
    assert done.returncode == 0
    if "{out}" in line:
        assert any(not path.name.startswith(".") for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("line", EVERY)
def test_a_reader_that_leaves_changes_no_result(line: str, tmp_path: Path) -> None:
    done = shell(f"({typed(line, tmp_path)}; echo $? >&2) | true", tmp_path)
    assert done.stderr.splitlines()[-1] == b"0", done.stderr


POOR = [
    {"PYTHONIOENCODING": "ascii"},
    {"LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
]


@pytest.mark.parametrize("env", POOR, ids=("ascii", "C"))
@pytest.mark.parametrize("line", EVERY)
def test_an_output_that_knows_ascii_alone_is_enough(
    line: str, env: dict[str, str], tmp_path: Path
) -> None:
    done = shell(typed(line, tmp_path), tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert done.stderr.isascii()


@pytest.mark.parametrize("line", WRITES)
def test_a_folder_may_have_a_name_that_is_no_utf_8(line: str, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    done = shell(typed(line, tmp_path, folder / "out"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert any(not path.name.startswith(".") for path in (folder / "out").iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", [0.0, 0.02, 0.1, 0.3])
def test_a_signal_in_the_first_moments_is_one_line(
    after: float, number: signal.Signals, tmp_path: Path
) -> None:
    code = "from fewstep.cli import main; print('begins', flush=True); main()"
    line = [sys.executable, "-c", code, "demo", "--out", str(tmp_path / "out")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begins\n"
        time.sleep(after)
        process.send_signal(number)
        output, error = process.communicate(timeout=60)
    assert (output, error.count(b"\n")) in ((b"", 0), (b"", 1))
    assert process.returncode == 128 + number or (process.returncode, error) == (-number, b"")
    assert b"Traceback" not in error
    assert not (tmp_path / "out").exists()
