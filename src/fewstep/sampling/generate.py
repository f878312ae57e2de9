"""From a model to pictures: names, seeds and labels in, uint8 images and their provenance out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from fewstep.arguments import whole
from fewstep.data.images import fit_picture, read_picture
from fewstep.denoiser import Counted, Denoiser, calls_per_eval
from fewstep.loop import check_known, finish, run, starts_at
from fewstep.models.students import phased
from fewstep.plan import Program
from fewstep.sampling.choose import choose, describe, warn_of_gain
from fewstep.sampling.request import CONDITIONS, Request, one_per_seed
from fewstep.sampling.settings import Filled, Settings
from fewstep.solver import Solver
from fewstep.solving import Runnable, resolve

if TYPE_CHECKING:
    from fewstep.models import Model, PictureModel

__all__ = ["Batch", "Run", "Samples", "batch_size", "load_images", "sample", "usual_batch"]

DEFAULT_STRENGTH = 0.8  # that of diffusers' image-to-image pipeline for Stable Diffusion
MOST_AT_A_TIME, NUMBERS_AT_A_TIME = 64, 2**17  # pictures, and numbers of their states, in a batch


@dataclass(frozen=True, repr=False)
class Samples:
    """Pictures and how they came about.

    images: uint8 [n, h, w, c]
    seeds: one per picture
    nfe: evaluations of the denoiser per picture
    network_calls: forward passes of the network per picture (twice nfe under guidance)
    provenance: everything needed to make them again, JSON-ready
    """

    images: np.ndarray
    seeds: tuple[int, ...]
    nfe: int
    network_calls: int
    provenance: dict[str, Any]

    def __repr__(self) -> str:
        count, *shape = self.images.shape
        size = "x".join(map(str, shape))
        spent = f"{self.nfe} evaluations and {self.network_calls} network calls each"
        return f"Samples({count} of {size}, {spent}, solver {self.provenance.get('solver')})"


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of finished pictures.

    Attributes:
        seeds: one per picture
        images: uint8 [n, h, w, c]
        nfe: evaluations of the denoiser per picture
        network_calls: forward passes of the network per picture
    """

    seeds: tuple[int, ...]
    images: np.ndarray
    nfe: int
    network_calls: int


@dataclass(frozen=True, eq=False)
class Run:
    """What is sampled and how, checked and filled in; it makes the pictures part by part.

    The solver is found, planned and hashed here, once, whatever the number of batches.

    Attributes:
        settings: filled in
        images: the pictures to start from, uint8 [n, h, w, c], or None
        each: the conditions, and perhaps image, that have one value per seed
        level: the noise level at which it starts; None where that is the prior's
        program: what runs
        calls: network calls of an evaluation
    """

    model: Model
    request: Request
    settings: Filled
    images: np.ndarray | None
    each: frozenset[str]
    level: float | None
    program: Program
    calls: int

    @classmethod
    def of(cls, model: Model, request: Request, settings: Settings, batch: int) -> Run:
        """Check what was asked for and fill it in, before a network is called for a picture.

        Args:
            batch: pictures in the first part, whose texts are encoded

        Raises:
            ValueError: what the model or the solver cannot do.
        """
        if not hasattr(model, "denoiser"):
            raise ValueError(
                f"model must be a loaded model, got {model!r:.80}; load it first: fewstep.load(...)"
            )
        getattr(model, "picture", None)  # raises now where the samples are no pictures
        if request.size is not None:
            if not hasattr(model, "with_size"):
                raise ValueError(f"{model.card.name} has one size of pictures; leave out size")
            model = model.with_size(*request.size)  # type: ignore[attr-defined]
        count = len(request.seeds)
        each = {name for name, value in request.given.items() if one_per_seed(name, value, count)}
        level, images = settings.head_start, None
        if level is not None and starts_at(level, model.card.sigma_max):
            settings, level = replace(settings, head_start=None), None  # nothing to be carried
        if request.image is not None:
            request, settings, level = _from_pictures(model, request, settings)
            images = load_images(request.image, *cast("PictureModel", model).picture)
            if len(images) > 1 and one_per_seed("image", images, count):
                each.add("image")
        filled = choose(model, settings, level)
        model = phased(model, filled.nfe)
        if "label" in each:  # raises now for an unknown one in a later part
            model.denoiser(list(dict.fromkeys(request.label)))
        denoiser = _denoiser(model, _part(request, frozenset(each), 0, batch))
        high = level if isinstance(filled.grid, str) else None
        program = resolve(filled, denoiser, sigma_max=high)
        warn_of_gain(filled, program)
        check_known(program, denoiser)
        calls = calls_per_eval(denoiser)
        made = cls(model, request, filled, images, frozenset(each), level, program, calls)
        made.begin(0, 1)  # raises now for a start that the model cannot make
        return made

    def begin(self, start: int, size: int) -> Tensor:
        """x at the first level: noise, carried down or not, or a picture with noise."""
        given, seeds = self._given(start, size), self.request.seeds[start : start + size]
        if self.images is not None:
            able, chosen = cast("PictureModel", self.model), slice(start, start + size)
            images = self.images[chosen] if "image" in self.each else self.images
            return able.start(images, seeds, cast(float, self.request.strength))[0]
        if self.level is None:
            return self.model.prior(seeds)
        return self.model.prior(seeds, sigma=self.level, label=given["label"])

    def denoiser(self, start: int, size: int) -> Denoiser:
        """D for seeds[start : start + size], under what is given for them."""
        return _denoiser(self.model, self._given(start, size))

    def make(self, start: int, size: int) -> Batch:
        """The pictures of seeds[start : start + size].

        Raises:
            FloatingPointError: the network returned NaN or infinity; names the step and the seeds.
        """
        seeds = self.request.seeds[start : start + size]
        with torch.no_grad():
            denoiser = Counted(self.denoiser(start, size))
            x_T = self.begin(start, size)
            x = finish(self.program, denoiser, x_T, seeds)
            if not torch.isfinite(x).all():
                raise FloatingPointError(_diagnose(self.program, denoiser, x_T, seeds))
        calls = denoiser.evaluations, denoiser.network_calls
        return Batch(seeds, self.model.decode(x), *calls)

    def record(self) -> dict[str, Any]:
        """What makes the pictures besides their seeds, JSON-ready: known before they are made. What
        is given per seed is a list; a picture stands as the hash of its pixels."""
        found = () if self.images is None else self.images
        images = [hashlib.sha256(one.tobytes()).hexdigest() for one in found]
        strength = self.request.strength
        return {
            **describe(self.model, self.settings, **self.request.given),
            "image": images if "image" in self.each else images[0] if images else None,
            "strength": strength,
        }

    def _given(self, start: int, size: int) -> dict[str, Any]:
        return _part(self.request, self.each, start, size)


def sample(
    model: Model,
    *,
    solver: str | Solver | Runnable = "auto",
    nfe: int | None = None,
    seeds: Sequence[int],
    label: Any = None,
    prompt: str | Sequence[str] | None = None,
    negative: str | Sequence[str] | None = None,
    guidance: float | Sequence[float] | Tensor | None = None,
    image: Any = None,
    strength: float | None = None,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    grid: str | Sequence[float] | None = None,
    afs: str | None = None,
    final: bool = False,
    head_start: float | None = None,
    end: str | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> Samples:
    """Sample one picture per seed in `nfe` evaluations each.

    Picture i depends on seed i alone, and on what is given for it.

    Args:
        solver, nfe, grid, afs, final, end, head_start: how, see `Settings`; solver may also be a
            Solver, a Plan, or a learned solver
        seeds, label, prompt, negative, guidance, image, strength, size: what, see `Request`; image
            is a file, or uint8 [h, w, c], or one per seed
        batch: pictures at a time; unless given 64, and fewer of large ones (see `usual_batch`)
        report: called with the number of pictures done after each batch

    Returns:
        The pictures, what they cost, and everything needed to make them again.

    Raises:
        ValueError: what the model or the solver cannot do, before any work.
        FloatingPointError: the network returned NaN or infinity; names the step and the seeds.
    """
    settings = Settings(solver, nfe, grid, afs, final, end, head_start)  # type: ignore[arg-type]
    request = Request(seeds, label, prompt, negative, guidance, image, strength, size)  # type: ignore[arg-type]
    at_a_time = batch_size(model, batch)
    made = Run.of(model, request, settings, at_a_time)
    batches = []
    for start in range(0, len(request.seeds), at_a_time):
        batches.append(made.make(start, at_a_time))
        report(start + len(batches[-1].seeds))
    spent = {"nfe": batches[-1].nfe, "network_calls": batches[-1].network_calls}
    images = np.concatenate([one.images for one in batches])
    return Samples(images, request.seeds, **spent, provenance={**made.record(), **spent})


def usual_batch(model: Model) -> int:
    """Pictures at a time: 64, or as many as have 2^17 numbers in their states, 8 of Stable
    Diffusion at 512 pixels."""
    return max(1, min(MOST_AT_A_TIME, NUMBERS_AT_A_TIME // math.prod(model.shape)))


def load_images(image: Any, height: int, width: int, channels: int) -> np.ndarray:
    """Pictures of one size, uint8 [n, h, w, c], from files or arrays: one, or a sequence of them.

    Raises:
        ValueError: for what is neither.
        OSError: there is no such file.
    """
    if isinstance(image, str | Path):
        found = [read_picture(image)]
    elif isinstance(image, list | tuple):
        return np.concatenate([load_images(one, height, width, channels) for one in image])
    else:
        array = np.asarray(image)
        found = list(array if array.ndim == 4 else array[None])
        if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] not in (1, 3):
            raise ValueError(
                "image must be a file or uint8 [h, w, 1 or 3], or one per seed, got "
                f"{array.dtype} {list(array.shape)}"
            )
    return np.stack([fit_picture(one, height, width, channels) for one in found])


def batch_size(model: Model, batch: int | None) -> int:
    """Pictures at a time: as asked for, else the usual number.

    Raises:
        ValueError: for fewer than 1.
    """
    batch = None if batch is None else whole("batch", batch, 1)
    return batch or (usual_batch(model) if hasattr(model, "shape") else 1)


def _from_pictures(
    model: Model, request: Request, settings: Settings
) -> tuple[Request, Settings, float]:
    """The same with strength and afs filled in, and the level at which it starts."""
    taken = {
        "afs": settings.afs not in (None, "none"),
        "head_start": settings.head_start is not None,
    }
    for name in (name for name, is_given in taken.items() if is_given):
        raise ValueError(
            f"{name} is for a start from noise alone, and image starts from a picture; "
            "leave one of them out"
        )
    if not hasattr(model, "start"):
        raise ValueError(f"{model.card.name} cannot start from a picture; leave out image")
    strength = DEFAULT_STRENGTH if request.strength is None else request.strength
    level = cast("PictureModel", model).level(strength)
    return replace(request, strength=strength), replace(settings, afs="none"), level


def _part(request: Request, each: frozenset[str], start: int, size: int) -> dict[str, Any]:
    """The conditions of seeds[start : start + size]."""
    chosen = slice(start, start + size)
    return {n: v[chosen] if n in each else v for n, v in request.given.items()}


def _denoiser(model: Model, given: dict[str, Any]) -> Denoiser:
    """D for one part. Texts that the model knows already are not encoded again."""
    label, prompt, negative, guidance = (given[name] for name in CONDITIONS)
    text = {} if negative is None else {"negative": negative}
    return model.denoiser(label, prompt, guidance, **text)


def _diagnose(program: Program, denoiser: Denoiser, x_T: Tensor, seeds: Sequence[int]) -> str:
    """Where the first value that is not finite came up; walks the same path again, looking at every
    state."""
    for step, state in enumerate(run(program, denoiser, x_T, seeds)):
        good = torch.isfinite(state.x).flatten(1).all(dim=1)
        if not good.all():
            bad = [seed for seed, fine in zip(seeds, good.tolist(), strict=True) if not fine]
            named = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
            return (
                f"the network returned NaN or infinity in step {step + 1}, on the way to "
                f"sigma {state.sigma:.4g}, for seeds {named}; "
                "try dtype float32, or another guidance scale"
            )
    return (
        "the result is not finite, but a second run over the same path was; is the device at fault?"
    )
