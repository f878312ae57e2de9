"""A set is gathered alike whatever its batches, and says how its pictures were taken."""

from __future__ import annotations

import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.cli import main
from fewstep.data.sources import open_images
from fewstep.evaluate.features import Preprocessing, module_features
from fewstep.evaluate.gather import gather, open_reference
from fewstep.evaluate.measure import evaluate
from fewstep.evaluate.protocols import explain, get_protocol
from fewstep.networks.features import feature_networks


class Either(nn.Module):
    """Takes one channel or three, and sees which."""

    def forward(self, x: Tensor) -> Tensor:
        counted = torch.full((len(x), 1), float(x.shape[1]))
        return torch.cat([x.mean(dim=(1, 2, 3))[:, None], counted], dim=1)


def files(path: Path, channels: str, turn: dict[int, int] | None = None, side: int = 8) -> Path:
    """A folder of random pictures; channels: "g" or "c" for each; turn: orientation by index."""
    path.mkdir()
    rng = np.random.default_rng(0)
    for i, kind in enumerate(channels):
        shape = (side, side) if kind == "g" else (side, side, 3)
        exif = Image.Exif()
        if turn and i in turn:
            exif[0x0112] = turn[i]
        picture = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        picture.save(path / f"{i:03d}.png", exif=exif)
    return path


@pytest.mark.parametrize("words", ["as-is", "rgb"])
def test_grey_among_coloured_gives_the_same_at_every_batch(words, tmp_path):
    images = open_images(files(tmp_path / "p", "cggcgccg"))
    judge = module_features(Either(), "either", Preprocessing.parse(words))
    means = [gather(images, judge, batch=n, save_every=3 * n).statistics for n in (1, 2, 3, 8)]
    for one in means:
        assert one is not None
        assert means[0] is not None
        assert np.abs(one.mean - means[0].mean).max() < 1e-6  # features are float32
        assert one.mean[1] == 3


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_coloured_picture_among_grey_ones_is_refused_by_name_where_channels_count(
    batch, tmp_path
):
    images = open_images(files(tmp_path / "p", "ggcg"))
    with pytest.raises(ValueError, match=r"002\.png has colours, but 000\.png is grey"):
        gather(images, module_features(Either(), "either", shape=(8, 8, 1)), batch=batch)
    found = gather(images, module_features(Either(), "either", Preprocessing(channels="rgb")))
    assert found.count == 4


def test_how_photographs_lie_is_counted_said_and_held_against_the_protocol(tmp_path):
    judge = replace(
        module_features(lambda x: x[:, :2, 0, 0], "i", Preprocessing(channels="rgb"), dim=2),
        is_inception=True,
    )
    path = files(tmp_path / "p", "cccc", {1: 6, 2: 3})
    upright, stored = open_images(path), open_images(path, upright=False)
    protocol = replace(get_protocol("cifar10-50k"), pictures=4, size=(8, 8), reference_pictures=4)
    reference = open_reference(path, judge)
    record = evaluate(upright, reference, judge, protocol=protocol, resamples=0).record
    assert (record["images"]["turned"], record["images"]["askew"]) == (2, 0)
    assert record["reference"]["turned"] == 2
    assert any("2 pictures were turned upright" in text for text in record["warnings"])
    with pytest.raises(ValueError, match=r"takes pictures upright.* 2 of .* are taken otherwise"):
        evaluate(stored, reference, judge, protocol=protocol, resamples=0)
    strict, theirs = replace(protocol, upright=False), open_reference(path, judge, upright=False)
    record = evaluate(stored, theirs, judge, protocol=strict, resamples=0).record
    assert (record["images"]["turned"], record["images"]["askew"]) == (0, 2)
    with pytest.raises(ValueError, match="takes pictures as stored"):
        evaluate(stored, reference, judge, protocol=strict, resamples=0)
    for one in (protocol, strict):
        assert "orientation" in dict(explain(one))
        assert one.to_dict()["upright"] == one.upright


def test_further_frames_and_other_files_are_counted_aloud(tmp_path):
    path = files(tmp_path / "p", "ccc")
    frames = [Image.new("RGB", (8, 8), (50 * i, 0, 0)) for i in range(3)]
    frames[0].save(path / "x.gif", save_all=True, append_images=frames[1:])
    (path / "y.heic").write_bytes(b"x")
    judge = module_features(Either(), "either", Preprocessing(channels="rgb"))
    record = evaluate(open_images(path), None, judge, metrics=()).record
    texts = " ".join(record["warnings"])
    assert "1 pictures have more frames: the first of each was taken" in texts
    assert "1 .heic" in texts
    assert record["images"]["left_out"] == {".heic": 1}
    assert record["images"]["more_frames"] == 1


@pytest.mark.parametrize("dim", [1 << 15, 200_000])
def test_features_without_end_are_refused_before_their_covariance(dim):
    with pytest.raises(ValueError, match=f"wide gives {dim} features per picture, the most are"):
        module_features(lambda x: torch.zeros(len(x), dim), "wide")


@pytest.mark.skipif(not feature_networks(), reason="the built-in networks are not there")
@pytest.mark.parametrize("kind", ["zip", "npz", "npy", "folder"])
def test_the_command_measures_every_kind_of_file_alike(kind, tmp_path, capsys, monkeypatch):
    folder = files(tmp_path / "p", "g" * 6, side=32)
    arrays = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
    path: Any = {"folder": folder}.get(kind, tmp_path / f"p.{kind}")
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for one in folder.iterdir():
                archive.write(one, f"deep/{one.name}")
    elif kind == "npz":
        np.savez_compressed(path, arr_0=arrays)
    elif kind == "npy":
        np.save(path, arrays)
    said = []
    for one in (path, folder):
        monkeypatch.setattr(
            sys, "argv", ["fewstep", "evaluate", str(one), "--features", "fashion-b"]
        )
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        said.append(capsys.readouterr().out)
    value = [
        next(line for line in text.splitlines() if "FD-fashion-b" in line).split() for text in said
    ]
    assert value[0] == value[1]
    assert "the distance is to training data" in said[0]
