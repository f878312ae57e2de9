"""Files are whole or not there, and what killed writers leave is swept, in every folder."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from fewstep import cache, files
from fewstep.cache import cache_folder, recall
from fewstep.files import alike, alone, open_folder, sweep, write_whole

KILLED = (
    "import os, signal, sys; from fewstep.files import write_whole;"
    "os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL);"
    "write_whole(sys.argv[1], bytes(9))"
)


def killed_write(path: Path) -> None:
    found = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert found.returncode == -signal.SIGKILL


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("opened", [sweep, open_folder])
def test_a_folder_that_is_opened_again_loses_what_killed_writers_left(tmp_path, opened):
    kept = {"a.png", ".a.png.original", ".a.png.my-own.partial", "b.partial"}
    for name in kept:
        (tmp_path / name).write_bytes(b"mine")
    for name in ("a.png", "checkpoint.safetensors", "log.jsonl"):
        killed_write(tmp_path / name)
    assert len(names(tmp_path)) == len(kept) + 3
    opened(tmp_path)
    assert names(tmp_path) == kept


def test_what_another_process_is_writing_stays(tmp_path):
    path = tmp_path / ".a.png.abcdefgh.partial"
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        sweep(tmp_path)
        assert path.exists()
    sweep(tmp_path)
    assert not path.exists()


def test_where_files_cannot_be_locked_age_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    old, new = tmp_path / ".a.png.abcdefgh.partial", tmp_path / ".b.png.abcdefgh.partial"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 3600, time.time() - 3600))
    write_whole(tmp_path / "c", b"whole")
    sweep(tmp_path)
    assert names(tmp_path) == {new.name, "c"}


def test_a_write_that_loses_its_temporary_is_made_again(tmp_path, monkeypatch):
    replace, lost = os.replace, []

    def once(source, target):
        if not lost:
            lost.append(source)
            os.unlink(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", once)
    write_whole(tmp_path / "a", b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert names(tmp_path) == {"a"}


# The cache.


def test_an_array_is_made_once_for_a_key(tmp_path):
    made = []

    def make():
        made.append(1)
        return torch.arange(6.0).reshape(2, 3) * len(made)

    for _ in range(2):
        assert torch.equal(
            recall(tmp_path, {"seed": 1}, (2, 3), make), torch.arange(6.0).reshape(2, 3)
        )
    assert recall(tmp_path, {"seed": 2}, (2, 3), make)[1, 2] == 10
    assert len(made) == 2


@pytest.mark.parametrize("change", ["version", "cut", "shape", "empty"])
def test_what_does_not_fit_is_made_again(tmp_path, monkeypatch, change):
    recall(tmp_path, {"seed": 1}, (2,), lambda: torch.ones(2))
    (path,) = tmp_path.iterdir()
    shape = (3,) if change == "shape" else (2,)
    if change == "version":
        monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    if change in ("cut", "empty"):
        path.write_bytes(path.read_bytes()[: -4 if change == "cut" else 0])
    found = recall(tmp_path, {"seed": 1}, shape, lambda: torch.zeros(shape))
    assert torch.equal(found, torch.zeros(shape))


def test_what_is_not_finite_is_not_kept(tmp_path):
    recall(tmp_path / "new", {}, (1,), lambda: torch.tensor([torch.nan]))
    assert not (tmp_path / "new").exists()


def test_a_write_to_the_cache_sweeps_it(tmp_path):
    killed_write(tmp_path / "a.safetensors")
    assert names(tmp_path)
    recall(tmp_path, {}, (1,), lambda: torch.zeros(1))
    assert not [name for name in names(tmp_path) if name.endswith(".partial")]


def test_a_cache_that_cannot_be_written_is_said_once(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for seed in range(3):
            found = recall(tmp_path / "file", {"seed": seed}, (1,), lambda: torch.ones(1))
            assert found == 1
    (only,) = told
    assert str(only.message).startswith(f"nothing is kept in {tmp_path / 'file'}: ")


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FEWSTEP_CACHE", raising=False)
    assert cache_folder() == tmp_path / "fewstep"
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_a_folder_is_free_again_when_its_process_was_killed(tmp_path):
    code = "import sys, time\nfrom fewstep.files import alone\n"
    code += "with alone(sys.argv[1]):\n    print('in', flush=True)\n    time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "in\n"
        with pytest.raises(ValueError, match="another process is writing to"), alone(tmp_path):
            pass
        holder.kill()
    with alone(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [".", "state.npz"])
def test_a_folder_or_a_file_is_one_process_s_at_a_time(tmp_path, name):
    target = tmp_path / name
    with alone(target):  # a second handle of this process is to the lock as another process is
        with pytest.raises(ValueError, match="another process is writing to"), alone(target):
            pass
        with alone(tmp_path / "other.npz"):
            pass
    with alone(target):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_is_shared_by_what_is_alike_alone(tmp_path):
    with alike(tmp_path, "a"):
        with alike(tmp_path, "a"):
            pass
        with pytest.raises(ValueError, match="with other settings"), alike(tmp_path, "b"):
            pass
    with alike(tmp_path, "b"):
        pass
    assert not list(tmp_path.iterdir())


def test_where_there_are_no_locks_nothing_is_locked(tmp_path, monkeypatch):
    monkeypatch.setattr("fewstep.files.fcntl", None)
    with alone(tmp_path), alone(tmp_path), alike(tmp_path, "a"), alike(tmp_path, "b"):
        pass
    assert not list(tmp_path.iterdir())
