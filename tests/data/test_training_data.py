"""What a student is trained on: files of all kinds, their classes, and what cannot be used."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewstep.data.training import read_data
from fewstep.distillation import Pictures, distill
from fewstep.models.network import NetworkModel
from fewstep.networks.unet import UNet
from tests.distillation.test_distill import CONFIG, pictures, run_tiny, tiny_model, write_idx

CLASSES = ("a", "b", "c")


def write_folder(folder: Path, classes: bool = True) -> Path:
    """The pictures of `pictures()` as PNGs, each in its class's folder, in the order of their
    names."""
    for i, (image, label) in enumerate(zip(*pictures(), strict=True)):
        path = folder / (CLASSES[int(label)] if classes else "") / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
    return folder


def unconditional() -> NetworkModel:
    config = replace(CONFIG, classes=0)
    net = UNet(config).eval().requires_grad_(False)
    model = tiny_model()
    stats = {name: value[-1:] for name, value in model.stats.items()}
    card = replace(model.card, network={**model.card.network, "classes": 0}, classes=())
    return NetworkModel(card, net, stats, net, net.image_shape)


@pytest.mark.parametrize("kind", ["idx", "folder", "zip", "npz", "arr_1"])
def test_every_kind_of_file_holds_the_same_pictures(tmp_path: Path, kind: str) -> None:
    images, labels = pictures()
    path = tmp_path / "data"
    if kind == "idx":
        path.mkdir()
        write_idx(path / "train-images-idx3-ubyte", images[:, 0].numpy())
        write_idx(path / "train-labels-idx1-ubyte", labels.numpy().astype(np.uint8))
    elif kind in ("folder", "zip"):
        write_folder(path)
        order = labels.argsort(stable=True)  # by folder, then by name
        images, labels = images[order], labels[order]
        if kind == "zip":
            with zipfile.ZipFile(path := tmp_path / "data.zip", "w") as archive:
                for file in sorted((tmp_path / "data").rglob("*.png")):
                    archive.write(file, f"train/{file.relative_to(tmp_path / 'data')}")
    else:
        names = ("images", "labels") if kind == "npz" else ("arr_0", "arr_1")
        path = tmp_path / "data.npz"
        values = images.permute(0, 2, 3, 1).numpy(), labels.numpy().astype(np.uint8)
        np.savez(path, **dict(zip(names, values, strict=True)))
    found = read_data(path, tiny_model(), 0.5)
    assert found.digest == Pictures(images, labels).digest


def test_pictures_without_classes_serve_a_network_without_or_a_student_without(tmp_path) -> None:
    flat = write_folder(tmp_path / "flat", classes=False)
    model = tiny_model()
    words = r"flat has no classes and tiny has 3: put .* its name \(a, b, ...\), or give label_drop"
    with pytest.raises(ValueError, match=words):
        read_data(flat, model, 0.5)
    expected = Pictures(pictures()[0], 0 * pictures()[1]).digest
    assert read_data(flat, model, 1.0).digest == expected
    assert read_data(flat, unconditional(), 0.5).digest == expected
    array = tmp_path / "all.npy"
    np.save(array, pictures()[0][:, 0].numpy())
    assert read_data(array, unconditional(), 0.5).digest == expected


def test_of_photographs_the_middle_square_is_taken_and_made_smaller(tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (24, 40), dtype=np.uint8)
    (tmp_path / "b").mkdir()
    Image.fromarray(photo).save(tmp_path / "b" / "photo.png")
    images, labels = read_data(tmp_path, tiny_model(), 0.5).batch(pictures()[1][:1])
    square = Image.fromarray(photo[:, 8:32]).resize((8, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(((images[0, 0].numpy() + 1) * 127.5).round(), np.asarray(square))
    assert labels.tolist() == [1]


def save(path: Path, shape: tuple[int, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros(shape, np.uint8)).save(path)


def test_data_that_cannot_be_used_are_one_line_before_any_work(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("small", "colour", "mixed", "torn", "empty")}
    save(folders["small"] / "a" / "x.png", (6, 8))
    save(folders["colour"] / "a" / "x.png", (8, 8, 3))
    save(folders["mixed"] / "a" / "x.png", (8, 8))
    save(folders["mixed"] / "odd" / "y.png", (8, 8))
    torn = write_folder(folders["torn"]) / "b" / "001.png"
    torn.write_bytes(torn.read_bytes()[:50])
    folders["empty"].mkdir()
    floats, foreign = tmp_path / "floats.npz", tmp_path / "text.npz"
    images = np.zeros((2, 8, 8, 1), np.uint8)
    np.savez(floats, images=images, labels=np.zeros(2))
    np.savez(foreign, images=images, labels=np.array([0, 7]))
    cut = tmp_path / "cut"
    cut.mkdir()
    write_idx(cut / "train-images-idx3-ubyte", images[..., 0])
    (cut / "train-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01\x00\x00\x00\x02\x00")
    for path, words in (
        (folders["small"], r"a/x\.png has 6x8 pixels, tiny takes 8x8; pad or enlarge"),
        (folders["colour"], r"a/x\.png is in colour, tiny takes pictures of 1 channels"),
        (folders["mixed"], r"odd/y\.png lies in no class's folder, and others do"),
        (folders["torn"], r"b/001\.png cannot be read"),
        (folders["empty"], "empty has no pictures"),
        (floats, "labels must be integers, got float64"),
        (foreign, "labels must lie below the 3 classes of tiny, got 0 to 7"),
        (cut, "labels-idx1-ubyte is cut short"),
        (tmp_path / "nowhere", "nowhere"),
    ):
        with pytest.raises((ValueError, OSError), match=words) as caught:
            distill(tiny_model(), path, out=tmp_path / "out", points=5, pictures=8, batch=8)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_settings_that_a_network_without_classes_cannot_feel_are_refused() -> None:
    images, labels = pictures()
    for name, value in (("guidance", 3.0), ("label_dropout", 0.1)):
        settings: dict[str, Any] = {name: value}
        words = f"{name}={value} has no effect, as tiny has no classes"
        with pytest.raises(ValueError, match=words):
            distill(unconditional(), (images, 0 * labels), points=5, **settings)
    with pytest.raises(ValueError, match="guidance has no effect at label_dropout 1"):
        run_tiny(None, guidance=3.0, label_dropout=1.0)
    student = distill(
        unconditional(), (images, 0 * labels), points=5, pictures=16, batch=8, validation_seeds=2
    )
    assert student.card.about["validation"]["step"] == 2
    assert student.card.about["data"]["pictures"] == 40
