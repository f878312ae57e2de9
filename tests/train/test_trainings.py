"""What holds for every training: exact resume, refusals before work, one line a fault."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from fewstep.files import alone
from fewstep.train.checkpoint import CHECKPOINT, read_head, restore, save
from fewstep.train.interrupts import Stopped
from fewstep.train.run import Identity, Run
from tests.support.trainings import LONGER, OTHER, PIPELINES, RESULTS, TRAININGS, step_of

every = pytest.mark.parametrize("name", TRAININGS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(name: str, out: Path, report: Any = lambda progress: None, **changes: Any) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        {**TRAININGS, **PIPELINES}[name](out, report, **changes)
    finally:
        torch.set_num_threads(threads)


def hashes(*folders: Path) -> dict[str, str]:
    return {
        f"{i}/{path.relative_to(folder)}": hashlib.sha256(path.read_bytes()).hexdigest()
        for i, folder in enumerate(folders)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@every
def test_a_second_process_in_the_same_folder_is_refused(name, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with alone(out), pytest.raises(ValueError, match="another process is writing to"):
        run(name, out)
    assert not list(out.iterdir())
    run(name, out)
    assert not (out / ".lock").exists()


# --- Kills and interrupts ---------------------------------------------------------------------


def killed(name: str, out: Path, cache: Path, chance: random.Random, write: int | None) -> None:
    """Run in a process that dies by SIGKILL: in a write, or at a random moment of a random step."""
    more = [] if write is None else [str(write)]
    arguments = [sys.executable, "-m", "tests.support.trainings", name, str(out), *more]
    env = {**os.environ, "FEWSTEP_CACHE": str(cache)}
    with subprocess.Popen(arguments, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if write is None:
            for _ in range(chance.randrange(1, 3)):
                process.stdout.readline()
            time.sleep(chance.uniform(0, 0.01))
            process.kill()
        process.communicate()
    done = () if write else (0,)  # of so short a run, which may end just before
    assert process.returncode in (-signal.SIGKILL, *done)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in a write", "in a step"])
@pytest.mark.parametrize("name", [*TRAININGS, *PIPELINES])
def test_a_killed_and_resumed_training_leaves_equal_bytes_of_every_file(name, moment, tmp_path):
    """The folder and the cache, and no temporary in either."""
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    whole, cut = (tmp_path / "whole", tmp_path / "whole-cache"), (tmp_path / "cut", tmp_path / "c")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(whole[1]))
        run(name, whole[0])
    for _ in range(2):
        most = 10 if name in PIPELINES else 3  # five of them are in the cache of latents
        write = chance.randrange(1, most) if moment == "in a write" else None
        killed(name, *cut, chance, write)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(cut[1]))
        run(name, cut[0])
    assert hashes(*cut) == hashes(*whole), f"seed {seed}"
    assert not list(tmp_path.rglob("*.partial")), f"seed {seed}"
    cached = ("tuned", "distillation", *PIPELINES)
    assert name not in cached or hashes(whole[1])  # they have a cache


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
@every
def test_a_stopped_training_saves_and_ends_where_the_other_does(name, number, tmp_path):
    def stop(progress: Any) -> None:
        if progress.step == 2:
            os.kill(os.getpid(), number)  # in step 3, which is finished first

    run(name, tmp_path / "whole")
    with pytest.raises(Stopped) as stopped:
        run(name, tmp_path / "cut", stop)
    assert stopped.value.code == 128 + number
    assert step_of(tmp_path / "cut") == 3
    run(name, tmp_path / "cut")
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


# --- Refusals ---------------------------------------------------------------------------------


def rewritten(path: Path, change: Any) -> None:
    """A checkpoint with other tensors and the same head."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    change(tensors, max(tensors, key=lambda name: tensors[name].numel()))
    path.write_bytes(safetensors.torch.save(tensors, metadata))


def shape(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].flatten()[:1].clone()  # one that would broadcast


def dtype(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].half()


def missing(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def more(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors["more"] = torch.zeros(1)


DAMAGES: dict[str, Any] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "cut head": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}"),
    "pickle": lambda path: torch.save({"weights": torch.zeros(2)}, path),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "shape": lambda path: rewritten(path, shape),
    "dtype": lambda path: rewritten(path, dtype),
    "missing": lambda path: rewritten(path, missing),
    "more": lambda path: rewritten(path, more),
}


@every
def test_a_checkpoint_that_does_not_fit_is_one_line_and_nothing_is_changed(name, tmp_path):
    run(name, tmp_path / "out", steps=2)
    path = tmp_path / "out" / CHECKPOINT
    good = path.read_bytes()

    def refused(words: str, **changes: Any) -> None:
        before = hashes(tmp_path / "out")
        with pytest.raises(ValueError, match=words) as error:
            run(name, tmp_path / "out", **{"steps": 2, **changes})
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500
        assert hashes(tmp_path / "out") == before

    named = rf"{CHECKPOINT}"
    for damage in DAMAGES.values():
        damage(path)
        refused(named)
        if path.is_dir():
            path.rmdir()
        path.write_bytes(good)
    refused(rf"{named} is of a run with lr=.* \(now 0.0123\)", **OTHER)
    refused(rf"{named} is of a run (on other|with weights=)", data=1)
    if name in LONGER:
        refused(f"{named} is at step 2, past the 1 asked for", steps=1)
    log = tmp_path / "out" / "log.jsonl"
    if log.exists():
        for text in ('{"epoch": 3}\n', "not json\n", "[]\n", '{"step": "x"}\n'):
            log.write_text(text)
            refused("log.jsonl is not a training log")


@pytest.mark.parametrize("name", RESULTS)
def test_the_result_of_something_else_is_not_overwritten(name, tmp_path):
    (tmp_path / RESULTS[name]).write_bytes(b"mine")
    with pytest.raises(ValueError, match=f"has a {RESULTS[name]} but no {CHECKPOINT}"):
        run(name, tmp_path)
    assert hashes(tmp_path).keys() == {f"0/{RESULTS[name]}"}


@pytest.mark.parametrize("name", LONGER)
def test_a_longer_run_goes_on_from_a_shorter_one(name, tmp_path):
    run(name, tmp_path, steps=2)
    steps: list[int] = []
    run(name, tmp_path, lambda progress: steps.append(progress.step), steps=4)
    assert steps == [3, 4]


@pytest.mark.parametrize("kind", ["network", "tuned"])
def test_a_checkpoint_of_another_kind_of_training_is_refused(kind, tmp_path):
    run("features", tmp_path, steps=1)
    with pytest.raises(ValueError, match=f"{CHECKPOINT} is not a checkpoint of a"):
        run(kind, tmp_path, steps=1)


# --- The file ---------------------------------------------------------------------------------


def small_run(**identity: Any) -> Run:
    tensors = {name: torch.arange(3.0) for name in ("b", "a", "c")}
    return Run(Identity("a test", {"lr": 0.1, "net": {"width": 2}}, **identity), tensors)


def test_equal_states_are_equal_bytes_in_any_order(tmp_path):
    one = small_run()
    other = Run(one.identity, dict(reversed(list(one.tensors.items()))))
    for i, state in enumerate([one, other] * 6):
        save(tmp_path / str(i), state)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_no_tensor_is_copied_where_one_does_not_fit(tmp_path):
    saved = small_run()
    saved.state["step"] = 2
    save(tmp_path / CHECKPOINT, saved)
    for name in saved.tensors:
        wanted = small_run()
        wanted.tensors[name].resize_(1)  # into which three would not go, and from which they would
        for value in wanted.tensors.values():
            value.fill_(7.0)
        with pytest.raises(ValueError, match=rf"{name} has shape \[3\], not \[1\]"):
            restore(tmp_path / CHECKPOINT, wanted, 5)
        assert all((value == 7).all() for value in wanted.tensors.values())
        assert wanted.step == 0


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("[]", "cannot be read"),
        ("not json", "cannot be read"),
        ('{"kind": 3}', "cannot be read"),
        ('{"kind": "a test", "settings": {}, "inputs": {}, "follows": {}}', "its step is None"),
        (
            '{"kind": "a test", "settings": {}, "inputs": {}, "follows": {}, '
            '"state": {"step": true}}',
            "its step is True",
        ),
        (
            '{"kind": "a test", "settings": {"lr": 0.1, "net": {"width": 3}}, "inputs": {}, '
            '"follows": {}, "state": {"step": 1}}',
            r"width=3 \(now 2\)",
        ),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_head_is_checked(tmp_path, head, words):
    path = tmp_path / CHECKPOINT
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(1)}, {"fewstep": head}))
    with pytest.raises(ValueError, match=words) as error:
        read_head(path, small_run().identity)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_has_no_hash_is_known_by_a_look_but_for_rounding(tmp_path):
    look = torch.randn(100, generator=torch.Generator().manual_seed(0))
    save(tmp_path / CHECKPOINT, small_run(looks={"denoiser": look}))
    restore(tmp_path / CHECKPOINT, small_run(looks={"denoiser": look * 1.001}), 5)
    with pytest.raises(ValueError, match="of a run on another denoiser"):
        restore(tmp_path / CHECKPOINT, small_run(looks={"denoiser": look * 1.1}), 5)
