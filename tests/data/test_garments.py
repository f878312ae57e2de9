"""Scenes of coloured clothes: what they hold, their captions, and that they are always the same."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest
import torch

from fewstep.data.garments import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    SIZE,
    Garment,
    Garments,
    Scene,
    caption,
    scene,
)
from tests.support.clothes import write_clothes

COUNT = 2000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clothes(tmp_path_factory.mktemp("clothes"))


@pytest.fixture(scope="module")
def data(folder) -> Garments:
    return Garments(folder)


def test_a_picture_depends_on_its_index_alone(data, folder):
    together = data.pictures(range(64))
    assert together.shape == (64, 3, SIZE, SIZE)
    assert together.dtype == torch.uint8
    order = [17, 3, 63]
    assert torch.equal(Garments(folder).pictures(order), together[order])
    assert torch.equal(data.pictures([5]), together[5:6])
    assert data.pictures([]).shape == (0, 3, SIZE, SIZE)


def test_pictures_and_captions_are_those_of_every_other_machine(data):
    found = hashlib.sha256(data.pictures(range(200)).numpy().tobytes())
    assert found.hexdigest() == "e8f098ea8321063655710b310f5de30de79ce207c8b0464a6c53d8f37f29c2b0"
    texts = "\n".join(caption(split, i)[0] for split in ("train", "test") for i in range(200))
    assert (
        hashlib.sha256(texts.encode()).hexdigest()
        == "64c325ef767aa371f12f948d278de0428a840d3e4d2b43c9784bce2f24755fc9"
    )


def test_splits_have_other_scenes_and_other_captions():
    same = [scene("train", i) == scene("test", i) for i in range(COUNT)]
    assert np.mean(same) < 0.01


def test_every_kind_colour_and_background_comes_in_its_share():
    scenes = [scene("train", i) for i in range(COUNT)]
    garments = [one for made in scenes for one in made.garments]
    for values, names in (
        ([one.kind for one in garments], KINDS),
        ([one.colour for one in garments], COLOURS),
        ([made.background for made in scenes], BACKGROUNDS),
    ):
        counts = np.array([values.count(name) for name in names])
        expected = len(values) / len(names)
        assert (abs(counts - expected) < 6 * np.sqrt(expected)).all()  # and colours yield a little
    pairs = np.mean([len(made.garments) == 2 for made in scenes])
    assert abs(pairs - 0.2) < 4 * np.sqrt(0.2 * 0.8 / COUNT)


def test_no_garment_has_the_colour_of_its_background():
    for made in (scene("test", i) for i in range(COUNT)):
        assert made.background not in {one.colour for one in made.garments}
    with pytest.raises(ValueError, match="a black garment cannot be seen on its background"):
        Scene((Garment("bag", "black"),), "black")


def names_of(table, name: str) -> tuple[str, ...]:
    return table[name].names


def test_captions_name_all_garments_and_colours():
    for i in range(COUNT):
        text, told = caption("train", i)
        made = scene("train", i)
        for one in made.garments:
            assert any(re.search(rf"\b{name}\b", text) for name in names_of(COLOURS, one.colour))
            nouns = {word for pair in KINDS[one.kind].names for name in pair for word in [name]}
            heads = {noun.split(" of ")[-1] for noun in nouns}
            assert any(re.search(rf"\b{head}\b", text) for head in heads), text
        there = any(
            text.endswith(f"{name}{end}")
            for name in names_of(BACKGROUNDS, made.background)
            for end in ("", " background", " wall")
        )
        assert there or not told, text


def test_captions_read_well():
    texts = [caption("train", i)[0] for i in range(COUNT)]
    for text in texts:
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |^ | $", text), text
    assert len(set(texts)) > COUNT / 2
    assert {caption("train", i)[1] for i in range(50)} == {True, False}


def test_the_garment_has_its_colour_and_the_corners_the_background(data):
    scenes, errors = [scene("train", i) for i in range(400)], []
    pictures = data.pictures(range(400)).double().numpy()
    for made, picture in zip(scenes, pictures, strict=True):
        if len(made.garments) == 2:
            continue
        ground = np.array(BACKGROUNDS[made.background].rgb)
        tint = np.array(COLOURS[made.garments[0].colour].rgb)
        far = np.abs(picture - ground[:, None, None]).max(0)
        assert (far <= 9).sum() > 50  # jitter of 6, and rounding
        if (far > 60).sum() > 60:
            covered = picture[:, far > 60].mean(1)
            errors.append(np.abs(0.85 * tint - covered).sum())
    assert np.median(errors) < 45
    assert np.quantile(errors, 0.95) < 120  # thin cloth lets the background through


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: scene("val", 0), "a scene is of train or test"),
        (lambda: scene("train", -1), "from 0 on"),
        (lambda: Garment("hat", "red"), "kind must be one of t-shirt"),
        (lambda: Garment("bag", "beige"), "colour must be one of red"),
        (lambda: Scene((), "white"), "a scene has 1 or 2 garments, got 0"),
        (lambda: Scene((Garment("bag", "red"),), "sky"), "background must be one of white"),
    ],
)
def test_what_is_no_scene_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_split_without_a_kind_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="split must be one of train, test"):
        Garments(folder, "t10k")
    with pytest.raises(FileNotFoundError, match="give the folder that holds the four idx files"):
        Garments(tmp_path)
