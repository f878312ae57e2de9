"""A file of a paper's network becomes a model folder of ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.files import open_folder
from fewstep.models.card import CARD_FILE, Card
from fewstep.models.formats.native import STATISTICS, write_folder
from fewstep.models.formats.papers import open_source
from fewstep.models.network import NetworkModel
from fewstep.models.statistics import far_means
from fewstep.records import as_slug
from fewstep.tensors import Entry
from fewstep.text import clean

__all__ = ["convert"]

STORED = {"float32": "F32", "float16": "F16"}
MOST_DRAWS, NUMBERS = 256, 2**22  # of the mean at sigma_max: draws, and numbers in all of them


def convert(
    path: Path | str,
    out: Path | str,
    *,
    dtype: str = "float32",
    name: str | None = None,
    draws: int | None = None,
    device: str = "cpu",
    report: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Card:
    """Write the network in a file as a model folder, one tensor at a time.

    The mean of D at sigma_max is measured for each class, which allows the first step afs="mean".

    Args:
        path: of the file
        out: folder, which must not hold a model yet
        dtype: of the weights in the folder, float32 or float16; tables and biases stay float32
        name: of the model; the file's where left out
        draws: of noise for each mean; 0 leaves the means out
        device: where the means are measured
        report: called with what is done, of how many classes
        options: as of `fewstep.models.formats.papers.open_source`

    Returns:
        The card, with the hash of the weights.

    Raises:
        OSError: where a file cannot be read or written.
        ValueError: where the file holds no such network, or an argument does not fit.
    """
    out = Path(out)
    if dtype not in STORED:
        raise ValueError(f"dtype must be {' or '.join(STORED)}, got {dtype!r}")
    if draws is not None and draws < 0:
        raise ValueError(f"draws must be at least 0, got {draws}")
    if (out / CARD_FILE).exists():
        raise ValueError(f"{clean(out)} holds a model already; name another folder")
    source = open_source(path, **options)
    open_folder(out)
    about = {**source.card.about, "source_sha256": source.card.weights_sha256}
    about |= {"preset": source.preset, "parameters": source.parameters}
    card = replace(source.card, about=about, name=as_slug(name) if name else source.card.name)
    stats: dict[str, Tensor] = {}
    if draws != 0:
        stats["far_mean"] = _means(source.model(device), draws, report)
    layout = {key: _entry(key, shape, dtype) for key, shape in source.shapes.items()}
    for key, value in stats.items():
        layout[STATISTICS + key] = Entry("F32", tuple(value.shape))

    def values() -> Iterable[tuple[str, Tensor]]:
        yield from source.values()
        for key, value in stats.items():
            yield STATISTICS + key, value

    return write_folder(out, card, layout, values)


def _entry(name: str, shape: tuple[int, ...], dtype: str) -> Entry:
    """How a tensor is stored: narrow where it is a weight, and never where it is a table."""
    narrow = len(shape) > 1 and not name.endswith("resample_filter")
    return Entry(STORED[dtype] if narrow else "F32", shape)


def _means(
    model: NetworkModel, draws: int | None, report: Callable[[int, int], None] | None
) -> Tensor:
    classes = len(model.card.classes)
    if draws is None:
        most = NUMBERS // (math.prod(model.shape) * (classes + 1))
        draws = max(1, min(MOST_DRAWS, most))
    with torch.inference_mode():
        means = far_means(
            model.conditional(),
            model.shape,
            classes,
            model.card.sigma_max,
            draws,
            model.device,
            report or (lambda done, count: None),
            none=not model.needs_label,
        )
    return means.cpu().clone()
