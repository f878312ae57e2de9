"""`fewstep train network`: exact resume, the recipe's laws, and bad input."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import math
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewstep
from fewstep.cli.train import train_network_command
from fewstep.data.idx import load_idx_folder, read_idx
from fewstep.models import read_card
from fewstep.networks.unet_config import UNetConfig
from fewstep.noise import generator
from fewstep.report.terminal import TrainingBar
from fewstep.train.checkpoint import plain
from fewstep.train.loop import Progress
from fewstep.train.network import export_network, noise_levels, train_network
from fewstep.train.order import batch_indices
from fewstep.train.recipe import Recipe
from tests.support.trainings import step_of

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


@pytest.mark.slow
def test_ctrl_c_saves_says_how_to_go_on_and_a_second_run_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path / "data")
    out, often = tmp_path / "out", {"checkpoint_every": 10_000, "validate_every": 7}
    more = [f"--{key.replace('_', '-')}={value}" for key, value in often.items()]
    process = subprocess.Popen(
        command(tmp_path / "data", out, *more, "--pictures", "80000"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (out / "log.jsonl").exists() and process.poll() is None:  # after step 7 of 10,000
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == (
        f"fewstep: stopped; {out} holds what was done, run the same command again to go on"
    )
    assert "fewstep: stopping after this step; again, and it stops at once" in error
    assert "Traceback" not in error
    step = step_of(out)
    assert 7 <= step < 10_000
    short = {"pictures": 8 * (step + 1), "batch": 8, "widths": "16,16", **often}
    train_network_command(data=tmp_path / "data", out=out, **short)
    assert f"resumed at step {step}\n" in capsys.readouterr().err
    assert (out / "model.safetensors").exists()


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
    seen = torch.cat([batch_indices(20, 8, 0, step) for step in range(5)])  # two epochs
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


# In this process, on the smallest of networks.

TINY = UNetConfig(size=8, widths=(16,), blocks=1, embedding=16, classes=3)
RECIPE = Recipe(pictures=16, batch=4, dtype="float32", warmup=0, network=TINY)
IMAGES = torch.arange(12 * 64).mul(37).remainder(256).to(torch.uint8).reshape(12, 1, 8, 8)
LABELS = torch.arange(12) % 3


def train(out: Path, **changes: Any) -> tuple[Any, list[int]]:
    """The network, and the steps that were made."""
    given = {"images": IMAGES, "labels": LABELS, "held_out": (IMAGES, LABELS), "recipe": RECIPE}
    steps: list[int] = []
    net = train_network(
        **{"out": out, **given, "report": lambda progress: steps.append(progress.step), **changes}
    )
    return net, steps


def longer(pictures: int) -> Recipe:
    return Recipe(**{**asdict(RECIPE), "pictures": pictures, "network": TINY})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_dropout": 7.0}, "label_dropout must be between 0 and 1, got 7"),
        ({"label_dropout": math.nan}, "label_dropout"),
        ({"lr": -1e-3}, "lr must be positive"),
        ({"lr": math.inf}, "lr"),
        ({"warmup": -1}, "warmup"),
        ({"cooldown": 1.5}, "cooldown"),
        ({"cooldown": -0.1}, "cooldown"),
        ({"sigma_min": 80.0}, "sigma_min must be positive and below sigma_max"),
        ({"sigma_max": math.inf}, "sigma_max"),
        ({"sigma_data": 0.0}, "sigma_data"),
        ({"seed": 2**64}, "seed"),
        ({"batch": 3}, "batch"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_recipes_that_cannot_be_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "toaster"}, "device 'toaster' is not available"),
        ({"device": "meta"}, "device 'meta' is not available"),
        ({"labels": LABELS + 1}, "labels must lie below the 3 classes"),
        ({"labels": LABELS - 1}, "labels must lie below the 3 classes"),
        ({"labels": LABELS % 2}, "class 2 has 0"),
        ({"labels": torch.tensor([0, 1] * 5 + [2, 0])}, "class 2 has 1"),
        ({"labels": LABELS[:5]}, "with a label each"),
        ({"images": IMAGES.float()}, "uint8"),
        ({"images": IMAGES[..., :4]}, "must be uint8 of shape"),
        ({"images": IMAGES[:3], "labels": LABELS[:3]}, "batch must be at most the 3"),
        ({"held_out": (IMAGES[:1], LABELS[:1])}, "at least 2 held-out"),
        ({"held_out": (IMAGES, LABELS + 1)}, "held-out labels must lie below"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"validate_every": 0}, "validate_every"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_step(
    tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        train(tmp_path / "out", **changes, report=lambda progress: pytest.fail("a step was made"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": "a,b"}, "classes must name 3 classes, got 2"),
        ({"classes": "a,b,c,d"}, "classes must name 3 classes, got 4"),
        ({"classes": "a,b,a"}, "no two the same"),
        ({"classes": "a,,c"}, "a name each"),
        ({"widths": "16,208"}, "3 attention heads"),
        ({"widths": "16,x"}, "widths are written like"),
        ({"label_dropout": 7.0}, "label_dropout"),
        ({"device": "toaster"}, "toaster"),
        ({"batch": 128}, "batch must be at most the 60 pictures"),
    ],
)
def test_the_command_refuses_bad_options_before_any_step(
    tmp_path: Path, options: dict, message: str
) -> None:
    write_data(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        train_network_command(
            data=tmp_path / "data",
            out=tmp_path / "out",
            **{"pictures": 16, "batch": 8, "widths": "16,16", **options},
        )
    assert not (tmp_path / "out").exists()


def test_the_bar_shows_no_number_before_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = TrainingBar(100)
    shown = io.StringIO()
    bar.console.file = shown
    bar.console.print(bar.bar.get_renderable())
    assert "nan" not in shown.getvalue()
    bar.report(Progress(1, 100, 0.25, 1e-3, per_second=10.0))
    bar.console.print(bar.bar.get_renderable())
    assert "loss 0.2500" in shown.getvalue()


def test_a_run_taken_further_is_on_the_longer_path_up_to_the_cooldown(tmp_path: Path) -> None:
    """Of 40 steps the last 12 are the cool-down; a checkpoint at step 20 does not know how long."""
    recipe = longer(160)

    def stop(progress: Any) -> None:
        if progress.step == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "a", recipe=recipe, checkpoint_every=20, report=stop)
    train(tmp_path / "a", recipe=longer(200))
    train(tmp_path / "b", recipe=longer(200))
    ours, theirs = (hashes(tmp_path / name)["checkpoint.safetensors"] for name in "ab")
    assert ours == theirs


def test_a_folder_that_cannot_be_written_is_found_before_any_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        train(tmp_path / "file", report=lambda progress: pytest.fail("a step was made"))


def test_an_exported_card_says_how_it_was_made(tmp_path: Path) -> None:
    net, _ = train(tmp_path)
    for _ in range(2):  # again from its checkpoint is allowed
        export_network(
            net, RECIPE, IMAGES, LABELS, tmp_path, name="x", about={"licence": "Apache-2.0"}
        )
    about = read_card(tmp_path).about
    assert about["fewstep"] == fewstep.__version__
    assert about["licence"] == "Apache-2.0"
    assert about["recipe"] == plain(asdict(RECIPE))
    assert fewstep.sample(fewstep.load(tmp_path), nfe=2, seeds=[0]).images.shape == (1, 8, 8, 1)


def test_training_leaves_the_random_state_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train(tmp_path)
    assert torch.equal(before, torch.get_rng_state())
