"""Prompt agreement: whether pictures of `garments` show what their prompts say.

The head of `garments-a`, a feature network that recipes/garments_features.py trains, tells the
garment and its colour in each of two places, and the background. A picture agrees where all that
its prompt names is told right; the two garments of a pair may have changed places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from fewstep.data.garments import BACKGROUNDS, COLOURS, KINDS, Scene, caption, scene
from fewstep.data.idx import to_unit
from fewstep.evaluate.features import own_features
from fewstep.networks.features import FeatureNetwork, load_feature_network

__all__ = [
    "HEADS",
    "Agreement",
    "Prompt",
    "agreement",
    "judge_of",
    "told_right",
    "prompts",
    "targets",
]

NONE = "none"  # of the second place in a picture of one garment
HEADS = {
    "first kind": (*KINDS, NONE),
    "first colour": (*COLOURS, NONE),
    "second kind": (*KINDS, NONE),
    "second colour": (*COLOURS, NONE),
    "background": tuple(BACKGROUNDS),
}
FIELDS = ("garment", "colour", "background")


@dataclass(frozen=True)
class Prompt:
    """A caption and what it names.

    background: whether it names the background of the scene
    """

    text: str
    scene: Scene
    background: bool


def prompts(count: int, start: int = 0, split: str = "test") -> list[Prompt]:
    """The captions of scenes from `start` on; those of "test" were never trained on.
    Raises: ValueError."""
    numbers = range(start, start + count)
    return [
        Prompt(text, scene(split, i), told) for i in numbers for text, told in [caption(split, i)]
    ]


def judge_of(name: str) -> FeatureNetwork | None:
    """The judge that comes with a model of this name; None where there is none."""
    for one in own_features(name):
        network = load_feature_network(one)
        if _heads(network) == HEADS:
            return network
    return None


def _heads(judge: FeatureNetwork) -> dict[str, tuple[str, ...]]:
    return {n: tuple(v) for n, v in judge.card.about.get("heads", {}).items()}


def targets(scenes: Sequence[Scene]) -> Tensor:
    """The right answers, int64 [n, len(HEADS)]."""
    rows = []
    for one in scenes:
        pairs = [(g.kind, g.colour) for g in one.garments] + [(NONE, NONE)]
        names = (*pairs[0], *pairs[1], one.background)
        rows.append([told.index(n) for told, n in zip(HEADS.values(), names, strict=True)])
    return torch.tensor(rows).reshape(len(rows), len(HEADS))


@torch.no_grad()
def answers(network: FeatureNetwork, images: np.ndarray | Tensor, part: int = 500) -> Tensor:
    """What the judge sees in pictures uint8 [n, h, w, 3], int64 [n, len(HEADS)]."""
    pictures = torch.as_tensor(images).permute(0, 3, 1, 2)
    sizes = [len(names) for names in HEADS.values()]
    rows = []
    for some in pictures.split(part):
        logits = network.logits(to_unit(some))
        rows.append(torch.stack([one.argmax(1) for one in logits.split(sizes, 1)], 1))
    return torch.cat(rows)


def told_right(found: Tensor, asked: Sequence[Prompt]) -> np.ndarray:
    """Whether garments, colours and the background are those of the prompts, bool [n, 3].

    found: answers of the judge. What a prompt does not name is right. Of a pair, the order that is
    right in more is taken.
    """
    right = np.zeros((len(asked), len(FIELDS)), dtype=bool)
    wanted = targets([one.scene for one in asked]).tolist()
    for row, (seen, want, prompt) in enumerate(zip(found.tolist(), wanted, asked, strict=True)):
        places = [tuple(seen[0:2]), tuple(seen[2:4])]
        asked_for = [tuple(want[0:2]), tuple(want[2:4])]
        best = max(
            (
                tuple(
                    all(p[part] == w[part] for p, w in zip(order, asked_for, strict=True))
                    for part in (0, 1)
                )
                for order in permutations(places)
            ),
            key=sum,
        )
        right[row] = (*best, not prompt.background or seen[4] == want[4])
    return right


@dataclass(frozen=True)
class Agreement:
    """Shares of pictures.

    all: in which everything is right; error is its standard error
    garment, colour, background: in which these are
    single, pair: `all` of the prompts for one garment and for two; None where there are none
    """

    all: float
    error: float
    garment: float
    colour: float
    background: float
    single: float | None
    pair: float | None
    count: int


def agreement(images: np.ndarray, asked: Sequence[Prompt], judge: FeatureNetwork) -> Agreement:
    """How well pictures go with their prompts.

    Args:
        images: uint8 [n, h, w, 3].
        judge: `garments-a`, as recipes/garments_features.py writes it.

    Raises:
        ValueError: for other counts, or a network that was not trained to tell all this.
    """
    if _heads(judge) != HEADS:
        raise ValueError(
            f"judge must tell {', '.join(HEADS)}, as garments-a does, got {judge.name}; "
            "recipes/garments_features.py makes it"
        )
    if len(images) != len(asked) or not len(asked):
        raise ValueError(f"there must be a picture per prompt, got {len(images)} of {len(asked)}")
    right = told_right(answers(judge, images), asked)
    whole = np.all(right, axis=1)
    paired = np.array([len(one.scene.garments) == 2 for one in asked])
    return Agreement(
        all=share(whole),
        error=float(np.sqrt(share(whole) * (1 - share(whole)) / len(asked))),
        garment=share(right[:, 0]),
        colour=share(right[:, 1]),
        background=share(right[:, 2]),
        single=None if paired.all() else share(whole[~paired]),
        pair=share(whole[paired]) if paired.any() else None,
        count=len(asked),
    )


def share(values: np.ndarray) -> float:
    """Of those that are true."""
    return float(values.mean())
