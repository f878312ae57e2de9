"""Coloured pictures of clothes with captions, made on the fly from Fashion-MNIST.

A scene is one garment, or two side by side, each of a kind and a colour, before a background. Scene
i of a split is a pure function of i: what is in it, which of the split's pictures is tinted, its
place and size, and its caption. Pictures are 32x32 RGB. Garments are scaled with integer weights,
so a picture is the same to the bit on every machine and in every batch.

Two of the ten classes are left out, shirts and coats: no network tells them from t-shirts and
pullovers more than nine times in ten, so a judge of pictures could not be trusted.

Source of the pictures: Xiao, Rasul and Vollgraf 2017 (Fashion-MNIST), arXiv:1708.07747.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.data.idx import load_idx_folder
from fewstep.noise import generator

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "KINDS",
    "SIZE",
    "SPLITS",
    "WORDS",
    "Garment",
    "Garments",
    "Scene",
    "caption",
    "scene",
]

SIZE = 32
SOURCE = 28  # Fashion-MNIST's pixels to a side
PAIRS = 0.2  # share of scenes with two garments
TOLD = 0.8  # share of captions that name the background
UNIT = 4096  # integer weights of a scaled pixel sum to this
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Kind:
    """A class of Fashion-MNIST and what it is called: (one, several) of each synonym."""

    label: int
    names: tuple[tuple[str, str], ...]


KINDS = {
    "t-shirt": Kind(0, (("t-shirt", "t-shirts"), ("tee", "tees"))),
    "trousers": Kind(1, (("pair of trousers", "pairs of trousers"), ("pair of pants", "pants"))),
    "pullover": Kind(2, (("pullover", "pullovers"), ("sweater", "sweaters"))),
    "dress": Kind(3, (("dress", "dresses"), ("gown", "gowns"))),
    "sandal": Kind(5, (("sandal", "sandals"),)),
    "sneaker": Kind(7, (("sneaker", "sneakers"), ("trainer", "trainers"))),
    "bag": Kind(8, (("bag", "bags"), ("handbag", "handbags"))),
    "ankle boot": Kind(9, (("ankle boot", "ankle boots"), ("boot", "boots"))),
}


@dataclass(frozen=True)
class Colour:
    """rgb in [0, 255], and synonyms."""

    rgb: tuple[int, int, int]
    names: tuple[str, ...]


COLOURS = {
    "red": Colour((215, 30, 35), ("red", "scarlet")),
    "orange": Colour((250, 135, 20), ("orange",)),
    "yellow": Colour((250, 225, 45), ("yellow",)),
    "green": Colour((40, 160, 55), ("green",)),
    "teal": Colour((0, 140, 145), ("teal",)),
    "blue": Colour((35, 75, 215), ("blue",)),
    "purple": Colour((130, 45, 175), ("purple", "violet")),
    "pink": Colour((250, 125, 180), ("pink",)),
    "brown": Colour((115, 65, 30), ("brown",)),
    "black": Colour((22, 22, 24), ("black",)),
    "white": Colour((252, 252, 250), ("white",)),
    "grey": Colour((125, 125, 128), ("grey", "gray")),
}
BACKGROUNDS = {
    "white": Colour((250, 250, 250), ("white",)),
    "black": Colour((8, 8, 8), ("black",)),
    "grey": Colour((160, 160, 160), ("grey", "gray")),
    "pale blue": Colour((180, 215, 250), ("pale blue", "light blue")),
    "pale green": Colour((190, 238, 190), ("pale green", "light green")),
    "pale pink": Colour((252, 208, 215), ("pale pink", "light pink")),
    "pale yellow": Colour((252, 244, 180), ("pale yellow", "cream")),
    "lilac": Colour((212, 192, 240), ("lilac", "lavender")),
}
OPENINGS = ("", "", "photo of ", "a photo of ", "a picture of ", "an image of ")
PLACES = (
    " on a {} background",
    " on a {} background",
    ", {} background",
    " in front of a {} wall",
    " on {}",
)
PAIR_PLACES = (" side by side", " next to each other", "")
WORDS = 28  # tokens of the longest caption, with its start and end


@dataclass(frozen=True)
class Garment:
    """kind and colour: names, the keys of KINDS and COLOURS."""

    kind: str
    colour: str

    def __post_init__(self) -> None:
        for what, value, names in (("kind", self.kind, KINDS), ("colour", self.colour, COLOURS)):
            if value not in names:
                raise ValueError(f"{what} must be one of {', '.join(names)}, got {value!r}")


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    garments: one, or two from left to right
    background: a key of BACKGROUNDS, and not the name of a garment's colour
    """

    garments: tuple[Garment, ...]
    background: str

    def __post_init__(self) -> None:
        if len(self.garments) not in (1, 2):
            raise ValueError(f"a scene has 1 or 2 garments, got {len(self.garments)}")
        if self.background not in BACKGROUNDS:
            known = ", ".join(BACKGROUNDS)
            raise ValueError(f"background must be one of {known}, got {self.background!r}")
        if self.background in (one.colour for one in self.garments):
            raise ValueError(f"a {self.background} garment cannot be seen on its background")


def draws(split: str, index: int, stream: str, count: int) -> list[float]:
    """Numbers in [0, 1) that belong to a scene. Raises: ValueError for a split or index."""
    if split not in SPLITS or index < 0:
        raise ValueError(f"a scene is of {' or '.join(SPLITS)} and from 0 on, got {split} {index}")
    gen = generator("garments", split, stream, index)
    return torch.rand(count, generator=gen, dtype=torch.float64).tolist()


def pick(names: Sequence[str], u: float) -> str:
    return names[int(u * len(names))]


def scene(split: str, index: int) -> Scene:
    """Scene `index` of a split, "train" or "test". Raises: ValueError."""
    u = draws(split, index, "scene", 6)
    background = pick(tuple(BACKGROUNDS), u[1])
    colours = [name for name in COLOURS if name != background]
    pair = u[0] < PAIRS
    garments = [Garment(pick(tuple(KINDS), u[2]), pick(colours, u[3]))]
    if pair:
        garments.append(Garment(pick(tuple(KINDS), u[4]), pick(colours, u[5])))
    return Scene(tuple(garments), background)


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(split: str, index: int) -> tuple[str, bool]:
    """The caption of scene `index`, and whether it names the background. Raises: ValueError."""
    made = scene(split, index)
    u = iter(draws(split, index, "caption", 12))
    colours = [pick(COLOURS[one.colour].names, next(u)) for one in made.garments]
    spoken = [KINDS[one.kind].names for one in made.garments]
    choice = next(u)
    nouns = [names[int(choice * len(names))] for names in spoken]
    things = [_tinted(colour, noun[0]) for colour, noun in zip(colours, nouns, strict=True)]
    if len(things) == 1:
        text = with_article(things[0])
        if next(u) < 0.25:
            text = things[0]
    else:
        same = made.garments[0].kind == made.garments[1].kind
        if same and next(u) < 0.7:
            text = f"two {nouns[0][1]}, one {colours[0]}, one {colours[1]}"
        else:
            text = f"{with_article(things[0])} and {with_article(things[1])}"
            text += pick(PAIR_PLACES, next(u))
    text = pick(OPENINGS, next(u)) + text
    told = next(u) < TOLD
    if told:
        place = pick(PLACES, next(u))
        text += place.format(pick(BACKGROUNDS[made.background].names, next(u)))
    return text, told


def _tinted(colour: str, noun: str) -> str:
    """The colour before the noun: "red bag", "pair of red trousers"."""
    pair, _, rest = noun.rpartition(" of ")
    return f"{pair} of {colour} {rest}" if pair else f"{colour} {noun}"


def resampling(size: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Weights of SIZE pixels from the SOURCE pixels of frames of `size` pixels that begin at
    `offset`, by a triangle as wide as a pixel of the coarser grid.

    size, offset: float64 [n], in pixels of the picture

    Returns:
        float64 of integers, [n, SIZE, SOURCE]; a row in the frame sums to about UNIT.
    """
    scale = (SOURCE / size)[:, None, None]  # source pixels to one of the picture
    at = (np.arange(SIZE)[:, None] + 0.5 - offset[:, None, None]) * scale - 0.5
    spare = SOURCE  # empty pixels around the source, so that every row has its whole triangle
    nodes = np.arange(-spare, SOURCE + spare)
    weights = np.maximum(0.0, 1 - np.abs(at - nodes) / np.maximum(scale, 1.0))
    weights /= np.maximum(weights.sum(2, keepdims=True), 1e-6)
    return np.rint(UNIT * weights[:, :, spare : spare + SOURCE])


class Garments:
    """Pictures of scenes, from the idx files of one split.

    Args:
        folder: that holds Fashion-MNIST's four idx files
        split: "train" or "test"

    Raises:
        ValueError, OSError: where the files are not what they should be.
    """

    def __init__(self, folder: Path | str, split: str = "train") -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        images, labels = load_idx_folder(folder, split, SOURCE)
        self.split = split
        self.sources = {
            name: images[labels == kind.label, 0].numpy() for name, kind in KINDS.items()
        }
        for name, pictures in self.sources.items():
            if not len(pictures):
                raise ValueError(f"{folder} has no picture of a {name} in its {split} split")

    def digest(self) -> str:
        """SHA-256 of all its source pictures, in hexadecimal."""
        found = hashlib.sha256(self.split.encode())
        for name, pictures in self.sources.items():
            found.update(f"{name} {pictures.shape}".encode())
            found.update(pictures.tobytes())
        return found.hexdigest()

    def pictures(self, indices: Sequence[int]) -> Tensor:
        """Pictures of scenes, uint8 [n, 3, SIZE, SIZE]. Raises: ValueError."""
        count = len(indices)
        scenes = [scene(self.split, index) for index in indices]
        u = np.array([draws(self.split, i, "picture", 16) for i in indices]).reshape(count, 16)
        canvas = np.array([BACKGROUNDS[one.background].rgb for one in scenes], dtype=np.float64)
        canvas = canvas.reshape(count, 3) + np.rint(12 * (u[:, :3] - 0.5))
        canvas = np.repeat(canvas[:, None, None, :], SIZE, 1).repeat(SIZE, 2)  # [n, h, w, 3]
        paired = np.array([len(one.garments) == 2 for one in scenes], dtype=bool)
        for slot in (0, 1):
            rows = np.arange(count) if slot == 0 else np.flatnonzero(paired)
            if len(rows):
                some = [scenes[row].garments[slot] for row in rows]
                v = u[rows][:, 3 + 6 * slot : 9 + 6 * slot]
                canvas[rows] = self._draw(canvas[rows], some, v, paired[rows], slot)
        out = np.rint(canvas).clip(0, 255).astype(np.uint8)
        return torch.from_numpy(np.ascontiguousarray(out.transpose(0, 3, 1, 2)))

    def _draw(
        self,
        canvas: np.ndarray,
        garments: Sequence[Garment],
        u: np.ndarray,
        paired: np.ndarray,
        slot: int,
    ) -> np.ndarray:
        """The canvases [n, h, w, 3] with a garment each, in the left or right half of a pair."""
        pools = [self.sources[one.kind] for one in garments]
        grey = np.stack([pool[int(v * len(pool))] for pool, v in zip(pools, u[:, 0], strict=True)])
        size = np.where(paired, 16 + 2 * u[:, 1], 22 + 8 * u[:, 1])
        room = np.where(paired, 18.0, SIZE) - size  # of a pair, each has 18 columns
        left = room * u[:, 2] + np.where(paired & (slot == 1), SIZE - 18.0, 0.0)
        top = (SIZE - size) * np.where(paired, 0.25 + 0.5 * u[:, 3], u[:, 3])
        rows, columns = resampling(size, top), resampling(size, left)
        shade = rows @ grey.astype(np.float64) @ columns.transpose(0, 2, 1)  # exact: below 2^53
        shade = shade / UNIT**2 / 255  # [n, h, w]
        cover = np.minimum(1.0, 5 * shade)[..., None]
        light = (0.68 + 0.32 * np.minimum(1.0, shade))[..., None]
        tint = np.array([COLOURS[one.colour].rgb for one in garments], dtype=np.float64)
        tint = tint * (0.94 + 0.12 * u[:, 4])[:, None]
        return canvas * (1 - cover) + cover * light * tint[:, None, None, :]
