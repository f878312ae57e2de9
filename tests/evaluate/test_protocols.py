"""Published protocols: their counts are enforced, they explain themselves, and they run from end to
end on stand-ins of small size."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.cli import main
from fewstep.data.captions import read_captions
from fewstep.data.sources import array_images, open_images
from fewstep.evaluate.features import Extractor, Preprocessing, module_features
from fewstep.evaluate.gather import open_reference
from fewstep.evaluate.measure import evaluate
from fewstep.evaluate.protocols import check_protocol, explain, get_protocol, protocols

# name: pictures, size, reference pictures, captions; as the papers have them
PUBLISHED = {
    "cifar10-50k": (50_000, (32, 32), 50_000, False),
    "ffhq64-50k": (50_000, (64, 64), 70_000, False),
    "imagenet64-50k": (50_000, (64, 64), 1_281_167, False),
    "lsun-bedroom-50k": (50_000, (256, 256), 3_033_042, False),
    "coco-30k": (30_000, (512, 512), 30_000, True),
    "coco-5k": (5_000, (512, 512), 5_000, True),
}


def test_the_protocols_are_those_of_the_papers():
    assert set(protocols()) == set(PUBLISHED)
    for name, (count, size, of, captions) in PUBLISHED.items():
        found = get_protocol(name)
        assert (found.pictures, found.size) == (count, size)
        assert (found.reference_pictures, found.captions) == (of, captions)
        assert found.features == "inception"
        assert found.metrics == (("fd", "clip") if captions else ("fd",))


@pytest.mark.parametrize("name", PUBLISHED)
def test_too_few_pictures_and_another_size_are_refused_in_one_line(name):
    protocol = get_protocol(name)
    check_protocol(protocol, protocol.pictures, protocol.size)
    with pytest.raises(
        ValueError, match=f"{name} needs {protocol.pictures:,} pictures, got 49"
    ) as e:
        check_protocol(protocol, 49)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="got 16x17"):
        check_protocol(protocol, protocol.pictures, (17, 16))


def test_a_protocol_is_frozen_and_unknown_ones_are_refused():
    with pytest.raises(FrozenInstanceError):
        get_protocol("coco-5k").pictures = 10  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"there are cifar10-50k, .*coco-5k"):
        get_protocol("coco-10k")


@pytest.mark.parametrize("name", PUBLISHED)
def test_explain_prints_every_field(name, capsys):
    protocol = get_protocol(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fewstep", "evaluate", "--explain", name])
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code
    words = re.sub(r"\s+", " ", capsys.readouterr().out)
    for heading, text in explain(protocol):
        assert heading in words
        assert text.split()[0] in words
    for text in (protocol.resize, protocol.reference, protocol.seeds, *protocol.notes):
        for word in text.split():
            assert word in words
    assert f"{protocol.pictures:,}" in words
    assert json.loads(json.dumps(protocol.to_dict()))["name"] == name


def inception_like() -> Extractor:
    """A small network that passes for Inception, whose file tests cannot fetch."""
    weights = torch.linspace(-1, 1, 3 * 6).reshape(3, 6)
    net = module_features(
        lambda x: torch.tanh(x.mean(dim=(2, 3)) @ weights),
        "i",
        Preprocessing(channels="rgb"),
        dim=6,
    )
    return replace(net, label="inception", is_inception=True)


class WordCount:
    """Scores by the caption's length, so that the order shows."""

    name = "words"

    def __call__(self, images: np.ndarray, captions: list[str]) -> np.ndarray:
        return np.array([float(len(text.split())) for text in captions])


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Photographs of all sizes, their captions in the format of COCO's, and samples."""
    rng = np.random.default_rng(0)
    lines = ["image_id,source,prompt,evaluation_seed"]
    for folder in ("photos", "samples"):
        (tmp_path / folder).mkdir()
    for i in range(8):
        h, w = 18 + 3 * i, 40 - 2 * i
        photo = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        Image.fromarray(photo[..., 0] if i == 0 else photo).save(
            tmp_path / "photos" / f"{1000 + i:012d}.png"
        )
        sample = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(sample).save(tmp_path / "samples" / f"{i:06d}.png")
        lines.append(f'{1000 + i:012d},coco-30k,"{" ".join(["word,"] * (i + 1))}",{7 * i}')
    (tmp_path / "captions.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_a_coco_protocol_runs_on_photographs_captions_and_samples(coco):
    protocol = replace(
        get_protocol("coco-5k"), pictures=6, size=(16, 16), reference_pictures=8, reference_fit=16
    )
    judge, scorer = inception_like(), WordCount()
    some: Any = scorer
    reference = open_reference(coco / "photos", judge, fit=protocol.reference_fit)
    result = evaluate(
        open_images(coco / "samples"),
        reference,
        judge,
        metrics=protocol.metrics,
        clip=some,
        captions=read_captions(coco / "captions.csv"),
        protocol=protocol,
        batch=4,
    )
    fid, score = result.record["metrics"]
    assert (fid["metric"], score["metric"]) == ("FID", "CLIP score")
    assert score["value"] == pytest.approx(np.mean([1, 2, 3, 4, 5, 6]))  # the first six of eight
    assert result.record["images"]["count"] == 6
    assert result.record["protocol"]["name"] == "coco-5k"
    assert fid["reference_count"] == 8


def test_a_protocol_refuses_other_features_references_and_lost_pictures(coco):
    protocol = replace(get_protocol("cifar10-50k"), pictures=8, size=(16, 16), reference_pictures=5)
    judge = inception_like()
    plain = replace(judge, is_inception=False)
    reference = open_reference(coco / "samples", judge)
    samples = open_images(coco / "samples")
    with pytest.raises(ValueError, match="takes Inception's features"):
        evaluate(samples, reference, plain, protocol=protocol)
    with pytest.raises(ValueError, match="has 5 pictures in its reference"):
        evaluate(samples, reference, judge, protocol=protocol)
    (coco / "samples" / "000003.png").write_bytes(b"broken")
    protocol = replace(protocol, reference_pictures=8)
    with pytest.raises(ValueError, match="needs 8 pictures, got 7"):
        evaluate(
            open_images(coco / "samples"), reference, judge, protocol=protocol, skip_corrupt=True
        )
    large = array_images(np.zeros((8, 20, 20, 3), np.uint8))
    with pytest.raises(ValueError, match="takes pictures of 16x16, got 20x20"):
        evaluate(large, reference, judge, protocol=protocol)
