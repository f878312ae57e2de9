"""The judges of garments: the shipped files and what their heads can tell."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from fewstep.data.garments import Garments, scene
from fewstep.evaluate.agreement import HEADS, answers, targets
from fewstep.evaluate.features import own_features, resolve_features
from fewstep.evaluate.statistics import Statistics
from fewstep.networks.features import load_feature_network, reference_path
from tests.support.clothes import write_clothes

NAMES = ["garments-a", "garments-b"]
# Of the second the head is a linear probe, which says only that its features see all this.
LEAST = {
    "garments-a": {"garment": 0.94, "colour": 0.99, "background": 0.99, "number of garments": 0.99},
    "garments-b": {"garment": 0.4, "colour": 0.8, "background": 0.9, "number of garments": 0.9},
}


def card_of(name: str) -> dict:
    return json.loads((reference_path(name).parent / "card.json").read_text())


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> tuple[torch.Tensor, torch.Tensor]:
    """400 scenes of the stored sample, uint8 [n, h, w, 3], and the right answers."""
    data = Garments(write_clothes(tmp_path_factory.mktemp("clothes")), "test")
    pictures = data.pictures(range(400)).permute(0, 2, 3, 1)
    return pictures, targets([scene("test", i) for i in range(400)])


def test_they_are_the_models_own_features():
    assert own_features("garments") == tuple(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_cards_hold_for_the_files_beside_them(name):
    card, folder = card_of(name), reference_path(name).parent
    for key, file in (("weights", "model.safetensors"), ("reference", "reference.npz")):
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == card[f"{key}_sha256"]
    net = load_feature_network(name)
    assert (net.inputs, net.dim, net.head.out_features) == (3, 128, sum(map(len, HEADS.values())))
    assert {head: tuple(names) for head, names in card["heads"].items()} == HEADS
    assert sum(w.numel() for w in net.trunk.parameters()) == card["parameters"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2e6


@pytest.mark.parametrize("name", NAMES)
def test_the_heads_are_as_good_as_their_cards_say(name, sample):
    stated = card_of(name)["accuracy"]
    assert stated["pictures"] >= 10_000
    for what, least in LEAST[name].items():
        assert stated[what] >= least, what
    pictures, right = sample
    hits = (answers(load_feature_network(name), pictures) == right).double().mean(0)
    for what, column in (("colour", 1), ("background", 4)):
        # five standard deviations of a share of 400
        spread = np.sqrt(stated[what] * (1 - stated[what]) / len(right)) + 1 / len(right)
        assert abs(float(hits[column]) - stated[what]) < 5 * spread


@pytest.mark.parametrize("name", NAMES)
def test_the_distance_grows_with_less_colour_and_with_blur(name, sample):
    pictures = sample[0].double().numpy()
    extract = resolve_features(name)
    data = extract.data
    assert data is not None

    def distance(changed: np.ndarray) -> float:
        found = extract(changed.round().astype(np.uint8))
        return Statistics.of(found, extract.name).frechet(data)

    grey = pictures.mean(3, keepdims=True)
    faded = [distance(pictures + share * (grey - pictures)) for share in (0, 0.3, 0.7)]
    assert np.all(np.diff(faded) > 0), faded
    soft = (pictures + np.roll(pictures, 1, 1) + np.roll(pictures, 1, 2)) / 3
    assert distance(soft) > distance(pictures)


def test_answers_do_not_depend_on_the_batch(sample):
    net = load_feature_network("garments-a")
    together = answers(net, sample[0][:20])
    assert torch.equal(answers(net, sample[0][7:9]), together[7:9])
