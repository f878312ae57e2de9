"""Shards and folders that several workers saw give the numbers of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fewstep.scale.evaluate as scaled
from fewstep.data.sources import open_images
from fewstep.evaluate.settings import Measuring
from fewstep.scale.executors import Local
from tests.support.command import command

NEAR = 1e-6  # features are float32, and their last bits depend on the batch
SAMPLE = ("sample", "--seeds", "0-39", "--nfe", "1", "--batch", "8")


def number(*arguments: Any) -> dict[str, Any]:
    ran = command("evaluate", *arguments, "--features", "fashion-a", "--resamples", "5", "--json")
    assert ran.exit_code == 0, ran.output
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures as a folder, as tars, as features alone, and as PNG with features."""
    out = tmp_path_factory.mktemp("made")
    looks = ("--shards", 3, "--features", "fashion-a", "--keep")
    ways = {"plain": (), "tar": ("--shards", 3), "none": (*looks, "none"), "png": (*looks, "png")}
    for name, more in ways.items():
        assert command(*SAMPLE, "--out", out / name, *more).exit_code == 0
    return out


def test_all_ways_to_keep_pictures_measure_alike(made: Path) -> None:
    plain, tar, none, png = (number(made / name) for name in ("plain", "tar", "none", "png"))
    assert png["metrics"] == none["metrics"]
    assert "3 of 3" in command("status", made / "png", "--check").stdout
    value = plain["metrics"][0]["value"]
    assert tar["metrics"] == plain["metrics"]
    assert none["metrics"][0]["value"] == pytest.approx(value, rel=NEAR)
    assert none["images"]["count"] == 40
    names = open_images(made / "tar").names
    assert names == open_images(made / "plain").names


def test_parts_that_workers_saw_merge_to_the_same_numbers(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaled, "PART", 16)
    how = Measuring(features="fashion-a", resamples=5)
    place = str(tmp_path / "parts")
    result = scaled.evaluate_parts(str(made / "tar"), how, Local(), place)
    assert result is not None
    [ours], [theirs] = result.record["metrics"], number(made / "plain")["metrics"]
    assert ours["value"] == pytest.approx(theirs["value"], rel=NEAR)
    assert ours["error"] == pytest.approx(theirs["error"], rel=NEAR)
    again = scaled.evaluate_parts(str(made / "tar"), how, Local(), place)
    assert again is not None
    assert again.record["metrics"] == result.record["metrics"]
    with pytest.raises(ValueError, match="another job"):
        scaled.evaluate_parts(str(made / "plain"), how, Local(), place)


def test_what_does_not_go_together_is_one_line(made: Path) -> None:
    for more, words in {
        ("--features", "fashion-b"): "has features of",
        ("--features", "fashion-a", "--limit", 3): "shards are merged whole",
        ("--features", "fashion-a", "--captions", "x.csv"): "leave out --captions",
        ("--features", "fashion-a", "--metrics", "clip"): "has no CLIP scores",
    }.items():
        ran = command("evaluate", made / "none", *more)
        assert (ran.exit_code, ran.stdout) == (2, "")
        assert words in ran.stderr
    ran = command("evaluate", made / "tar", "--features", "fashion-a", "--workers", 2)
    assert "--state" in ran.stderr


def test_missing_shards_are_told(made: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest").mkdir()
    (tmp_path / "job.json").write_bytes((made / "none" / "job.json").read_bytes())
    ran = command("evaluate", tmp_path, "--features", "fashion-a")
    assert ran.exit_code == 2
    assert "lacks 3 of 3 shards" in ran.stderr


def test_a_damaged_tar_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(np.arange(4000, dtype=np.uint8).tobytes())
    ran = command("evaluate", tmp_path, "--features", "fashion-a")
    assert ran.exit_code == 2
    assert ran.stderr.count("\n") == 1
    assert "a.tar" in ran.stderr
