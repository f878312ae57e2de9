"""Prompt agreement: what the judge's answers count for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.data.garments import Garment, Scene, caption, scene
from fewstep.evaluate.agreement import (
    HEADS,
    Prompt,
    agreement,
    answers,
    prompts,
    targets,
    told_right,
)
from fewstep.networks.features import FeatureCard, FeatureNetwork

BAG, DRESS = Garment("bag", "red"), Garment("dress", "blue")
ONE = Scene((BAG,), "white")
TWO = Scene((BAG, DRESS), "white")


def right(seen: Scene, asked: Scene, background: bool = True) -> list[bool]:
    return told_right(targets([seen]), [Prompt("", asked, background)])[0].tolist()


def test_prompts_are_the_captions_of_test_scenes():
    made = prompts(20, start=7)
    assert [one.text for one in made] == [caption("test", i)[0] for i in range(7, 27)]
    assert [one.scene for one in made] == [scene("test", i) for i in range(7, 27)]


def test_a_scene_agrees_with_its_own_prompt():
    scenes = [scene("test", i) for i in range(300)]
    assert told_right(targets(scenes), prompts(300)).all()


@pytest.mark.parametrize(
    "seen, asked, expected",
    [
        (ONE, ONE, [True, True, True]),
        (Scene((Garment("bag", "pink"),), "white"), ONE, [True, False, True]),
        (Scene((Garment("dress", "red"),), "white"), ONE, [False, True, True]),
        (Scene((BAG,), "black"), ONE, [True, True, False]),
        (TWO, ONE, [False, False, True]),
        (ONE, TWO, [False, False, True]),
        (Scene((DRESS, BAG), "white"), TWO, [True, True, True]),
        (Scene((Garment("bag", "blue"), Garment("dress", "red")), "white"), TWO, None),
    ],
)
def test_what_is_right_of_what_was_asked(seen, asked, expected):
    found = right(seen, asked)
    if expected is None:  # colours changed places: not both can be right
        assert found[:2] in ([True, False], [False, True])
    else:
        assert found == expected


def test_a_background_that_was_not_named_may_be_any():
    assert right(Scene((BAG,), "black"), ONE, background=False) == [True, True, True]


def test_counts_must_agree():
    with pytest.raises(ValueError, match="there must be a picture per prompt, got 2 of 3"):
        agreement(np.zeros((2, 32, 32, 3), np.uint8), prompts(3), judge())


def judge(**about: object) -> FeatureNetwork:
    """A network that answers at random, but always the same."""
    network = {"kind": "residual", "widths": [8], "blocks": 1, "inputs": 3, "dim": 8}
    heads = {"heads": {name: list(names) for name, names in HEADS.items()}}
    outputs = sum(map(len, HEADS.values()))
    card = FeatureCard("test", network, "0" * 64, outputs, about or heads)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FeatureNetwork(card).requires_grad_(False)


def test_agreement_counts_what_the_judge_says():
    images = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    asked, network = prompts(60), judge()
    found = agreement(images, asked, network)
    right = told_right(answers(network, images), asked)
    assert found.count == 60
    assert (found.garment, found.colour, found.background) == tuple(right.mean(0))
    paired = np.array([len(one.scene.garments) == 2 for one in asked])
    assert found.all == right.all(1).mean()
    assert found.pair == right[paired].all(1).mean()
    assert found.single == right[~paired].all(1).mean()
    assert torch.equal(answers(network, images[7:9]), answers(network, images)[7:9])


def test_a_network_that_tells_something_else_is_no_judge():
    with pytest.raises(ValueError, match=r"judge must tell first kind, .* as garments-a does"):
        agreement(np.zeros((3, 32, 32, 3), np.uint8), prompts(3), judge(other=1))
