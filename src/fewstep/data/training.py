"""What a student is trained on: clean states with their conditions, by index."""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.data.archives import read_arrays
from fewstep.data.bounds import check_room
from fewstep.data.idx import load_idx_folder, to_unit
from fewstep.data.images import fit_picture
from fewstep.data.sources import Positions, open_images, told
from fewstep.denoiser import Condition
from fewstep.models import Model
from fewstep.text import clean
from fewstep.train.network import data_hash

__all__ = ["Data", "NoData", "Pictures", "mapped", "read_data"]

IDX = "train-images-idx3-ubyte*"
LABELS = ("labels", "arr_1")  # beside `images` and `arr_0` in an .npz


class Data(Protocol):
    """The role: pictures or latents, as many as `len`.

    digest: a hash of all of it; a run resumes on the same data only
    batch: (x_0 [b, ...] in the units of the network's clean states, condition of b rows), of the
        indices [b]
    """

    @property
    def digest(self) -> str: ...
    def __len__(self) -> int: ...
    def batch(self, chosen: Tensor, /) -> tuple[Tensor, Condition]: ...


@dataclass(frozen=True)
class NoData:
    """For what starts from noise: no pictures, and all classes in turn.

    shape: of one state; classes: how many
    """

    shape: tuple[int, ...]
    classes: int = 0

    digest = "noise alone"

    def __len__(self) -> int:
        return max(1, self.classes) << 16

    def batch(self, chosen: Tensor) -> tuple[Tensor, Condition]:
        return torch.zeros(1).expand(len(chosen), *self.shape), chosen % max(1, self.classes)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures in memory with a class each.

    images: uint8 [n, c, h, w]
    labels: int64 [n]

    Raises:
        ValueError: for other dtypes, or numbers that do not match.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or not len(self.images):
            raise ValueError(
                "images must be uint8 [n, c, h, w] with n > 0, "
                f"got {self.images.dtype}, {tuple(self.images.shape)}"
            )
        if self.labels.shape != (len(self.images),) or self.labels.is_floating_point():
            raise ValueError(
                f"labels must be {len(self.images)} integers, one per picture, "
                f"got {self.labels.dtype}, {tuple(self.labels.shape)}"
            )

    @property
    def digest(self) -> str:
        return data_hash(self.images, self.labels)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, chosen: Tensor, /) -> tuple[Tensor, Tensor]:
        return to_unit(self.images[chosen]), self.labels[chosen]


def read_data(
    data: Data | tuple[Tensor, Tensor] | Path | str, model: Model, dropout: float
) -> Data:
    """Data as it comes, (images, labels), or what is on disk: a folder of idx files, or pictures in
    a folder, a .zip, an .npz or an .npy, all read into memory.

    idx pictures are padded to the model's size. Others are turned upright as their Exif data say,
    and the middle square is taken and made smaller; their classes are the folders that they lie in,
    or `labels` or `arr_1` of an .npz. Files that are no pictures are left out, with a warning that
    counts them.

    Args:
        dropout: the share of pictures that are shown without class; where it is 1 the data need
            none

    Raises:
        ValueError: pictures or labels do not go with the model, or files cannot be read.
        FileNotFoundError: there are none.
    """
    if isinstance(data, str | Path):
        data = _on_disk(Path(data), model, needed=dropout < 1)
    found = _labelled(*data, model) if isinstance(data, tuple) else data
    if not len(found):
        raise ValueError("the data are empty: give at least one picture")
    shape = tuple(found.batch(torch.zeros(1, dtype=torch.int64))[0].shape[1:])
    if shape != tuple(model.shape):
        raise ValueError(
            f"the data have shape {shape}, {model.card.name} takes {tuple(model.shape)}"
        )
    return found


def _on_disk(path: Path, model: Model, needed: bool) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [n, c, h, w] and labels [n]. needed: whether the labels will be looked at."""
    classes = model.card.classes
    if next(path.glob(IDX), None) is not None:
        images, labels = load_idx_folder(path, size=model.shape[-1])
        return images, labels if classes else torch.zeros_like(labels)
    source = open_images(path)
    check_room(len(source.names) * math.prod(model.shape), clean(path))
    images = torch.empty((len(source.names), *model.shape), dtype=torch.uint8)
    more = 0
    for place, entry in zip(images, source.stream(), strict=True):
        found = entry.picture()
        more += found.more
        picture = _at_size(found.pixels, model, f"{clean(path)}: {clean(entry.name)}")
        place.copy_(torch.from_numpy(picture.transpose(2, 0, 1).copy()))
    for text in told(source, more):
        warnings.warn(text, stacklevel=2)
    labels = _labels(path, source.names, classes) if classes else None
    if labels is None and classes and needed:
        some = ", ".join(classes[:2])
        raise ValueError(
            f"{path} has no classes and {model.card.name} has {len(classes)}: put the pictures of "
            f"each into a folder of its name ({some}, ...), or give label_dropout 1 to train "
            "without classes"
        )
    return images, torch.zeros(len(images), dtype=torch.int64) if labels is None else labels


def _at_size(picture: np.ndarray, model: Model, name: str) -> np.ndarray:
    """uint8 [h, w, c] as the model takes it.

    Raises:
        ValueError: for one that is too small, or has another number of channels.
    """
    channels, height, width = model.shape
    if picture.shape[2] != channels:
        kinds = {1: "grey", 3: "in colour"}
        raise ValueError(
            f"{name} is {kinds[picture.shape[2]]}, {model.card.name} takes pictures of "
            f"{channels} channels"
        )
    if height == width <= min(picture.shape[:2]):
        return fit_picture(picture, height, width)
    if picture.shape[:2] != (height, width):
        size = "x".join(map(str, picture.shape[:2]))
        raise ValueError(
            f"{name} has {size} pixels, {model.card.name} takes {height}x{width}; "
            "pad or enlarge such pictures first"
        )
    return picture


def _labels(path: Path, names: Sequence[str], classes: Sequence[str]) -> Tensor | None:
    """The class of each picture, int64 [n]; None where they have none.

    Raises:
        ValueError: some pictures lie in a class's folder and others do not.
    """
    if isinstance(names, Positions):  # an array has no folders
        found = (
            next(iter(read_arrays(path, LABELS).values()), None)
            if zipfile.is_zipfile(path)
            else None
        )
        if found is not None and found.dtype.kind not in "iu":
            raise ValueError(f"{path}: its labels must be integers, got {found.dtype}")
        return None if found is None else torch.from_numpy(found.astype(np.int64))
    folders = [PurePosixPath(name).parent.name for name in names]
    other = next((i for i, folder in enumerate(folders) if folder not in classes), None)
    if other is None:
        return torch.tensor([classes.index(folder) for folder in folders])
    if any(folder in classes for folder in folders):
        raise ValueError(
            f"{clean(path)}: {clean(names[other])} lies in no class's folder, and others do; the "
            f"classes are {', '.join(classes)}"
        )
    return None


def _labelled(images: Tensor, labels: Tensor, model: Model) -> Pictures:
    pictures = Pictures(images, labels)
    low, high = int(labels.min()), int(labels.max())
    classes = len(model.card.classes)
    if low < 0 or high >= max(1, classes):
        raise ValueError(
            f"labels must lie below the {classes} classes of {model.card.name}, got {low} to {high}"
        )
    return pictures


def mapped(function: Callable[..., Tensor], *trees: Condition) -> Any:
    """`function` of the tensors that stand in one place of several alike conditions (a tensor, or a
    tuple, list or dict of conditions, or None), as such a condition."""
    first = trees[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {key: mapped(function, *(tree[key] for tree in trees)) for key in first}
    if isinstance(first, tuple | list):
        return tuple(mapped(function, *parts) for parts in zip(*trees, strict=True))
    return function(*trees)
