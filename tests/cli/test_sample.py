"""fewstep sample."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fewstep.data.images import read_png
from fewstep.files import alike
from tests.support.command import fewstep, hashes, in_process


def test_sample_writes_skips_and_refuses_to_mix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    first = fewstep("sample", "--out", out, "--seeds", "0-2", "--nfe", 3, "--solver", "ddim")
    assert first.returncode == 0, first.stderr
    before = hashes(out)
    assert set(before) == {"000000.png", "000001.png", "000002.png", "sheet.png"}
    picture, metadata = read_png(out / "000001.png")
    assert picture.shape == (32, 32, 1)
    assert metadata is not None
    known = {key: metadata[key] for key in ("seed", "solver", "nfe")}
    assert known == {"seed": 1, "solver": "ddim", "nfe": 3}
    assert len(metadata["weights"]) == 64

    base = ("sample", "--out", out, "--seeds", "0-3", "--solver", "ddim")
    assert in_process(*base, "--nfe", 3, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["skipped"] == 3
    assert result["network_calls"] == 3
    assert [Path(p).name for p in result["files"]] == [f"00000{i}.png" for i in range(4)]
    after = hashes(out)
    assert all(after[name] == before[name] for name in before if name != "sheet.png")

    assert in_process(*base, "--nfe", 4) == 2
    assert "nfe=3 (now 4)" in capsys.readouterr().err
    assert hashes(out) == after


@pytest.mark.slow
def test_running_twice_gives_the_same_files(tmp_path: Path) -> None:
    more = ("--seeds", "7,9", "--label", "bag,1", "--guidance", 2)
    for name in "ab":
        assert fewstep("sample", "--out", tmp_path / name, *more).returncode == 0
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_a_lost_picture_alone_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("sample", "--out", tmp_path, "--seeds", "0-3", "--nfe", 2)
    assert in_process(*arguments) == 0
    before, lost = hashes(tmp_path), read_png(tmp_path / "000002.png")[0]
    (tmp_path / "000002.png").unlink()
    capsys.readouterr()
    assert in_process(*arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == 3
    kept = {k: v for k, v in before.items() if k not in ("000002.png", "sheet.png")}
    assert {k: hashes(tmp_path)[k] for k in kept} == kept
    # alone in its batch now: equal to float32 rounding, one grey level
    made = read_png(tmp_path / "000002.png")[0]
    assert np.abs(made.astype(int) - lost.astype(int)).max() <= 1


@pytest.mark.slow
def test_batches_and_processes_give_the_same_pictures(tmp_path: Path) -> None:
    base = ("sample", "--nfe", 3, "--solver", "dpmpp-2m-sde")
    assert in_process(*base, "--out", tmp_path / "one", "--seeds", "0-5") == 0
    for seeds, batch in (("3-5", 2), ("0-2", 1)):
        done = fewstep(*base, "--out", tmp_path / "two", "--seeds", seeds, "--batch", batch)
        assert done.returncode == 0, done.stderr
    for seed in range(6):
        a, b = (read_png(tmp_path / n / f"{seed:06d}.png")[0].astype(int) for n in ("one", "two"))
        assert np.abs(a - b).max() <= 1  # one grey level: float32 rounding


@pytest.mark.slow
def test_ctrl_c_says_so_and_keeps_what_was_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = ["sample", "--out", out, "--seeds", "0-9999", "--batch", "1", "--nfe", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fewstep", *map(str, line)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not (out / "000001.png").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert error == (
        f"fewstep: stopped; {out} holds what was done, run the same command again to go on\n"
    )
    for path in out.glob("*.png"):
        assert read_png(path)[0].shape == (32, 32, 1)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (["--nfe", "3"], "nfe=2 (now 3)"),
        (["--nfe", "2", "--solver", "dpmpp-2s"], "solver=ddim (now dpmpp-2s)"),
        (["--nfe", "2", "--label", "1", "--guidance", "2"], "guidance=None (now 2.0)"),
    ],
)
@pytest.mark.parametrize("left", ["all", "no sheet", "no pictures"])
def test_one_folder_holds_one_kind_of_pictures_whatever_their_seeds(
    left: str, change: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["sample", "--out", tmp_path, "--solver", "ddim"]
    assert in_process(*base, "--seeds", "0-1", "--nfe", "2") == 0
    if left == "no sheet":  # as after Ctrl-C
        (tmp_path / "sheet.png").unlink()
    elif left == "no pictures":
        for path in tmp_path.glob("0*.png"):
            path.unlink()
    before = hashes(tmp_path)
    assert in_process(*base, "--seeds", "5-6", *change) == 2
    assert word in capsys.readouterr().err
    assert hashes(tmp_path) == before
    assert in_process(*base, "--seeds", "5-6", "--nfe", "2") == 0


def test_a_cut_picture_of_ours_may_be_removed_a_foreign_one_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["sample", "--out", tmp_path, "--seeds", "0", "--nfe", "2"]
    assert in_process(*line) == 0
    path = tmp_path / "000000.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert in_process(*line) == 2
    assert capsys.readouterr().err == f"fewstep: {path} was cut short; remove it\n"
    for foreign in (b"my holiday", whole[:20], b""):
        path.write_bytes(foreign)
        assert in_process(*line) == 2
        error = capsys.readouterr().err
        assert "not made by fewstep; choose another --out" in error
        assert "remove" not in error


def test_a_plan_in_a_file_stands_for_a_solver(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    assert in_process("plan", "unipc_2", "--nfe", "3", "--grid", "log-snr", "--json") == 0
    file.write_text(capsys.readouterr().out)
    one, two = tmp_path / "one", tmp_path / "two"
    base = ["sample", "--seeds", "0-2", "--out"]
    assert in_process(*base, one, "--plan", file) == 0
    assert "unipc-2, plan " in capsys.readouterr().out
    same = ["--solver", "unipc-2", "--nfe", "3", "--grid", "log-snr"]
    assert in_process(*base, two, *same) == 0
    for seed in range(3):
        a, b = (read_png(out / f"{seed:06d}.png")[0] for out in (one, two))
        np.testing.assert_array_equal(a, b)
    capsys.readouterr()
    assert in_process(*base, tmp_path / "three", "--plan", file, "--nfe", "3") == 2
    assert "leave out --nfe" in capsys.readouterr().err
    for text in ("{}", "[1]", "no json", "\xff"):
        file.write_text(text, encoding="latin-1")
        assert in_process(*base, tmp_path / "three", "--plan", file) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "plan.json" in error


def test_the_line_at_the_end_says_what_was_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_process("sample", "--out", tmp_path / "a", "--seeds", "4", "--nfe", "2") == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("1 picture: ")
    assert not any(word in line for word in ("label", "guidance", "head start", "end="))
    more = ["--label", "bag,boot", "--guidance", "2", "--head-start", "20", "--end", "zero"]
    out = ["--out", tmp_path / "b"]
    assert in_process("sample", *out, "--seeds", "4-5", "--nfe", "2", *more) == 0
    line = capsys.readouterr().out
    given = [read_png(tmp_path / "b" / f"00000{seed}.png")[1] for seed in (4, 5)]
    assert [metadata["label"] for metadata in given if metadata] == ["bag", "boot"]
    for word in ("label bag,boot", "guidance 2", "head start 20", "end=zero", "4 network calls"):
        assert word in line, line
    final = ["--solver", "ddim", "--grid", "80,9,0.1", "--final", "--seeds", "0"]
    assert in_process("sample", "--out", tmp_path / "c", *final) == 0
    assert "ddim on sigmas 80, 9, 0.1, final, 3 evaluations" in capsys.readouterr().out


def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert in_process("sample", "--out", tmp_path, "--seeds", "0", "--nfe", "2") == 2
    error = capsys.readouterr().err
    assert error == f"fewstep: {tmp_path / '000000.png'}: No space left on device\n"
    assert not list(tmp_path.iterdir())


def test_what_killed_runs_left_is_swept_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / ".000003.png.abcdefgh.partial", tmp_path / ".000004.png.abcd_fgh.partial"
    other = tmp_path / ".notes.txt.my-own.partial"
    for path in (old, other):
        path.write_bytes(b"half")
    with new.open("wb") as file:  # a process beside this one writes it
        fcntl.flock(file, fcntl.LOCK_EX)
        assert in_process("sample", "--out", tmp_path, "--seeds", "0", "--nfe", "2") == 0
    assert not old.exists()
    assert new.exists()
    assert other.exists()


def test_a_file_in_the_way_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "000000.png").write_bytes(b"my holiday")
    assert in_process("sample", "--out", tmp_path, "--seeds", "0") == 2
    assert "000000.png" in capsys.readouterr().err
    assert (tmp_path / "000000.png").read_bytes() == b"my holiday"


@pytest.mark.slow
def test_of_two_processes_with_other_settings_one_goes_on(tmp_path: Path) -> None:
    """Started together, in one folder: the other is refused, and touches nothing."""
    base = [sys.executable, "-m", "fewstep", "sample", "--out", str(tmp_path), "--batch", "1"]
    base += ["--seeds", "0-39", "--solver", "ddim", "--nfe"]
    started = [
        subprocess.Popen(
            [*base, nfe],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for nfe in ("2", "3")
    ]
    told = [one.communicate(timeout=240)[1] for one in started]
    codes = [one.returncode for one in started]
    assert sorted(codes) == [0, 2], told
    winner = codes.index(0)
    assert told[1 - winner].count("\n") == 1
    assert "settings" in told[1 - winner] or "nfe=" in told[1 - winner]
    spent = {(read_png(path)[1] or {})["nfe"] for path in tmp_path.glob("0*.png")}
    assert spent == {2 + winner}
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_another_process_samples_into_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with alike(tmp_path, '{"nfe": 17}'):
        assert in_process("sample", "--out", tmp_path, "--seeds", "0", "--nfe", "2") == 2
    assert "another process is sampling into" in capsys.readouterr().err
    assert in_process("sample", "--out", tmp_path, "--seeds", "0", "--nfe", "2") == 0
