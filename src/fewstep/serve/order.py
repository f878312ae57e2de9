"""What the engine is asked for: a checked request, its noise, and perhaps a region to paint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.noise import normal
from fewstep.sampling.generate import Run
from fewstep.sampling.request import Request
from fewstep.sampling.settings import Settings
from fewstep.serve.together import rows_per_sample

if TYPE_CHECKING:
    from fewstep.models import Model, PictureModel

__all__ = ["Mix", "Order", "mixed", "order"]

Mix = tuple[tuple[int, float], ...]  # seeds with weights whose squares sum to 1
MOST_MIXED = 16  # seeds in one noise


@dataclass(frozen=True, eq=False)
class Region:
    """What in-painting may change.

    Attributes:
        mask: bool [h, w] of pixels, true where they may change
        image: the picture, uint8 [h, w, c]
        free: the same mask at the size of the state, [1, 1, h, w], 1 where it may change
        clean: x_0 of the picture, [1, c, h, w]
    """

    mask: np.ndarray
    image: np.ndarray
    free: Tensor
    clean: Tensor


@dataclass(frozen=True, eq=False)
class Order:
    """Pictures that are asked for, ready to begin.

    Attributes:
        model: its name
        run: the request, checked and filled in
        denoiser: of all its pictures; texts are encoded
        mixes: the noise of each picture; None where it is that of its seed alone
        region: for in-painting
    """

    model: str
    run: Run
    denoiser: Any
    mixes: tuple[Mix, ...] | None = None
    region: Region | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.run.request.seeds

    @property
    def nfe(self) -> int:
        """Evaluations of each picture."""
        return self.run.program.evaluations

    @cached_property
    def rows(self) -> int:
        """Rows of the network's batch that each picture takes."""
        return rows_per_sample(self.denoiser)

    @property
    def lane(self) -> tuple[Any, ...]:
        """What may share an evaluation has the same."""
        return self.model, *self.run.model.shape

    def begin(self, start: int, count: int) -> Tensor:
        """x_T of some pictures, [count, ...]."""
        x = self.run.begin(start, count)
        if self.mixes is None:
            return x
        return _mixed_noise(self.run, x, self.mixes[start : start + count], start)


def order(
    name: str,
    model: Model,
    request: Request,
    settings: Settings,
    mixes: Sequence[Mix] | None = None,
    mask: np.ndarray | None = None,
) -> Order:
    """Check a request and encode its texts.

    Args:
        name: of the model
        model: loaded
        request, settings: what is sampled, and how
        mixes: the noise of each picture, whose last seed is that of the request
        mask: bool [h, w] of the picture's size, true where a picture may change

    Raises:
        ValueError: what the model or the solver cannot do.
    """
    with torch.no_grad():
        run = Run.of(model, request, settings, len(request.seeds))
        denoiser = run.denoiser(0, len(request.seeds))
        made = Order(name, run, denoiser, None if mixes is None else tuple(mixes))
        if mixes is not None and run.settings.head_start is not None:
            raise ValueError("a picture with a head start has no variations; leave out head_start")
        if mask is None:
            return made
        return replace(made, region=_region(run, mask))


def mixed(base: Mix, seed: int, strength: float) -> Mix:
    """Noise near another: cos(a) base + sin(a) z(seed), a = strength * pi / 2.

    It is standard normal again, at every strength: spherical interpolation.

    Raises:
        ValueError: strength is not in (0, 1], or the base is itself a mix of too many.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1], got {strength}")
    if len(base) >= MOST_MIXED:
        raise ValueError(f"at most {MOST_MIXED} variations in a row; start from an earlier picture")
    if any(seed == known for known, _ in base):
        raise ValueError(f"seed {seed} is in the picture's own noise already; take another one")
    near, far = math.cos(strength * math.pi / 2), math.sin(strength * math.pi / 2)
    return (*((known, weight * near) for known, weight in base), (seed, far))


def _mixed_noise(run: Run, x: Tensor, mixes: Sequence[Mix], start: int) -> Tensor:
    """x with the noise of mixes in place of that of the seeds."""
    rows = []
    for i, mix in enumerate(mixes):
        seeds, weights = zip(*mix, strict=True)
        if run.images is None:
            each = run.model.prior(seeds)
            rows.append(torch.tensordot(torch.tensor(weights).to(each), each, 1))
            continue
        z = normal(seeds, run.model.shape, "prior")
        change = torch.tensordot(torch.tensor(weights), z, 1) - z[-1]
        rows.append(x[i] + cast(float, run.level) * change.to(x))
    return torch.stack(rows)


def _region(run: Run, mask: np.ndarray) -> Region:
    """What a mask lets change. Errors: ValueError where there is no picture, or it has another
    size."""
    if run.images is None:
        raise ValueError("mask says what of an image may change; give image too")
    height, width, _ = cast("PictureModel", run.model).picture
    if mask.shape != (height, width):
        raise ValueError(f"mask must be [{height}, {width}], got {list(mask.shape)}")
    if not mask.any():
        raise ValueError("mask lets nothing change; make some of it transparent")
    model = cast("PictureModel", run.model)
    noisy, sigma = model.start(run.images[:1], [0], 0.5)  # a low level: nothing is rounded away
    clean = noisy - sigma * normal([0], model.shape, "prior").to(noisy)
    pixels = torch.from_numpy(mask).float()[None, None]
    # an element of the state may change where any of its pixels may
    free = F.adaptive_max_pool2d(pixels, tuple(model.shape[1:])).to(noisy)
    return Region(mask, run.images[0], free, clean)
