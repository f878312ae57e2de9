"""What a student is trained on: clean states with their conditions, by index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.denoiser import Condition
from fewstep.models import Model
from fewstep.models.data import load_idx_folder, to_unit
from fewstep.models.training import data_hash

__all__ = ["Data", "Pictures", "mapped", "read_data"]


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


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures in memory with a class each.

    images: uint8 [n, c, h, w]
    labels: int64 [n]

    Errors: ValueError for other dtypes, or numbers that do not match.
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


def read_data(data: Data | tuple[Tensor, Tensor] | Path | str, model: Model) -> Data:
    """Data as it comes, (images, labels), or a folder of idx files that is read at the model's
    size.

    Errors: ValueError for pictures or labels that do not go with the model, or files that cannot be
    read; FileNotFoundError where there are none.
    """
    if isinstance(data, str | Path):
        data = load_idx_folder(data, size=model.shape[-1])
    found = _labelled(*data, model) if isinstance(data, tuple) else data
    if not len(found):
        raise ValueError("the data are empty: give at least one picture")
    shape = tuple(found.batch(torch.zeros(1, dtype=torch.int64))[0].shape[1:])
    if shape != tuple(model.shape):
        raise ValueError(
            f"the data have shape {shape}, {model.card.name} takes {tuple(model.shape)}"
        )
    return found


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
