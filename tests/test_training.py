"""`fewstep train network`: exact resume, the recipe's laws, and bad input."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.models.data import load_idx_folder, read_idx
from fewstep.models.training import Recipe, batch_indices, noise_levels
from fewstep.noise import generator

WRITERS = {"": open, ".gz": gzip.open, ".xz": lzma.open}


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    with WRITERS[path.suffix](path, "wb") as file:
        file.write(header + array.tobytes())


def write_data(folder: Path, count: int = 60, suffix: str = ".gz") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(
            folder / f"{prefix}-labels-idx1-ubyte{suffix}", np.arange(count, dtype=np.uint8) % 3
        )


def command(data: Path, out: Path, *more: str) -> list[str]:
    base = [sys.executable, "-m", "fewstep", "train", "network"]
    small = ["--pictures", "192", "--batch", "8", "--widths", "16,16"]
    often = ["--checkpoint-every", "1", "--validate-every", "7"]
    return [*base, "--data", str(data), "--out", str(out), *small, *often, *more]


def run(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(a) for a in args], capture_output=True, text=True, env=env, timeout=300
    )


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.iterdir() if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_killed_and_resumed_equals_undisturbed_to_the_bit(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = run(*command(tmp_path / "data", whole))
    assert done.returncode == 0, done.stderr
    step = random.randrange(2, 20)  # of 24
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(tmp_path / "data", broken), env=env, stdout=subprocess.DEVNULL
    )
    checkpoint, saves, last = broken / "checkpoint.safetensors", 0, None
    while saves < step and process.poll() is None:
        if checkpoint.exists() and (stamp := checkpoint.stat().st_mtime_ns) != last:
            saves, last = saves + 1, stamp
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f"it ended before it could be killed (step {step})"
    assert not (broken / "model.safetensors").exists()
    resumed = run(*command(tmp_path / "data", broken))
    assert resumed.returncode == 0, resumed.stderr
    ours = {k: v for k, v in hashes(broken).items() if not k.startswith(".")}
    assert ours == hashes(whole)
    assert set(ours) == {"card.json", "checkpoint.safetensors", "log.jsonl", "model.safetensors"}


def test_another_recipe_does_not_resume(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    assert run(*command(tmp_path / "data", tmp_path / "out")).returncode == 0
    before = hashes(tmp_path / "out")
    other = run(*command(tmp_path / "data", tmp_path / "out", "--lr", "0.5"))
    assert other.returncode == 2
    assert "another recipe" in other.stderr
    assert other.stderr.count("\n") == 1
    assert hashes(tmp_path / "out") == before


def test_a_longer_run_goes_on_from_a_shorter_one(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    assert run(*command(tmp_path / "data", tmp_path / "out")).returncode == 0
    done = run(*command(tmp_path / "data", tmp_path / "out", "--pictures", "320"))
    assert done.returncode == 0, done.stderr
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "out/log.jsonl").read_text().split("\n")[:-1]
    ]
    assert steps == [7, 14, 21, 24, 28, 35, 40]


@pytest.mark.parametrize("damage", ["cut", "foreign", "pickle"])
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, damage: str) -> None:
    write_data(tmp_path / "data")
    path = tmp_path / "out" / "checkpoint.safetensors"
    path.parent.mkdir()
    if damage == "cut":
        assert run(*command(tmp_path / "data", tmp_path / "out")).returncode == 0
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "foreign":
        path.write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    else:
        torch.save({"weights": torch.zeros(2)}, path)
    size = path.stat().st_size
    done = run(*command(tmp_path / "data", tmp_path / "out"))
    assert done.returncode == 2
    assert "checkpoint.safetensors" in done.stderr
    assert done.stderr.count("\n") == 1
    assert path.stat().st_size == size


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_idx_files_are_read_raw_and_compressed(tmp_path: Path, suffix: str) -> None:
    array = np.random.default_rng(1).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    write_idx(tmp_path / f"a-ubyte{suffix}", array)
    np.testing.assert_array_equal(read_idx(tmp_path / f"a-ubyte{suffix}"), array)


def test_pictures_are_padded_to_the_middle(tmp_path: Path) -> None:
    write_data(tmp_path, count=4, suffix=".xz")
    images, labels = load_idx_folder(tmp_path)
    assert images.shape == (4, 1, 32, 32)
    raw = read_idx(tmp_path / "train-images-idx3-ubyte.xz")
    np.testing.assert_array_equal(images[:, 0, 2:30, 2:30].numpy(), raw)
    assert images.sum().item() == raw.sum(dtype=np.int64)
    assert labels.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("cut", [3, 20, 700])
def test_a_cut_idx_file_is_named(tmp_path: Path, cut: int) -> None:
    write_data(tmp_path, count=4, suffix="")
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte"):
        load_idx_folder(tmp_path)


def test_a_missing_file_says_which(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train-images-idx3"):
        load_idx_folder(tmp_path)


def test_every_picture_is_seen_once_per_epoch() -> None:
    recipe = Recipe(batch=8)
    seen = torch.cat([batch_indices(20, recipe, step) for step in range(5)])  # two epochs
    assert sorted(seen[:20].tolist()) == list(range(20))
    assert sorted(seen[20:].tolist()) == list(range(20))
    assert seen[:20].tolist() != seen[20:].tolist()


def test_noise_levels_follow_their_two_laws() -> None:
    recipe = Recipe(batch=20_000)
    sigma = noise_levels(recipe, generator(3)).double()
    log_normal, log_uniform = sigma[:10_000].log(), sigma[10_000:].log()
    # stratified: quantiles are exact to one stratum, 1e-4 of the mass
    for level, z in ((0.1, -1.2815516), (0.5, 0.0), (0.9, 1.2815516)):
        assert log_normal.quantile(level).item() == pytest.approx(-1.2 + 1.2 * z, abs=2e-3)
        ends = math.log(0.002), math.log(80.0)
        expected = ends[0] + level * (ends[1] - ends[0])
        assert log_uniform.quantile(level).item() == pytest.approx(expected, abs=5e-3)


def test_learning_rate_rises_holds_and_falls_to_zero() -> None:
    recipe = Recipe(pictures=128 * 1000, warmup=128 * 10, cooldown=0.3)
    rates = [recipe.lr_at(step) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9:700] == [1e-3] * 691
    assert all(a > b for a, b in pairwise(rates[700:]))
    assert 0 < rates[-1] < 5e-6
