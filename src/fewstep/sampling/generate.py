"""From a model to pictures: names, seeds and labels in, uint8 images and their provenance out."""

from __future__ import annotations

import hashlib
import math
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from fewstep.data.images import fit_picture, read_picture
from fewstep.denoiser import Counted, Denoiser, calls_per_eval
from fewstep.grid import check_grid
from fewstep.loop import (
    DEFAULT_GRID,
    DEFAULT_NFE,
    Runnable,
    check_mean_start,
    far_mean,
    find,
    is_folder,
    iterate,
    resolve,
    solve,
    starts_at,
)
from fewstep.plan import Combine, Plan, Program
from fewstep.solver import Solver, get, intervals_for

if TYPE_CHECKING:
    from fewstep.models import Card, Model, PictureModel

__all__ = [
    "Run",
    "Samples",
    "Settings",
    "describe",
    "locate",
    "plan_for",
    "sample",
    "usual_batch",
]

AVERAGED = range(1_000_000, 1_000_064)  # seeds behind the plan of a solver that reads features
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


@dataclass(frozen=True)
class Settings:
    """How a solver is run on a model: itself, the budget, the grid, the first and the last step.

    solver: a name, a Solver, a Plan, or what else has a method `program()`
    nfe: the budget, or what follows from the grid where that is sigmas
    grid: a name, sigmas, or None where the solver has its own
    """

    solver: str | Solver | Runnable
    nfe: int
    grid: str | tuple[float, ...] | None
    afs: str = "none"
    final: bool = False
    end: str = "sigma_min"

    @classmethod
    def choose(
        cls,
        model: Model,
        solver: str | Solver | Runnable = "auto",
        nfe: int | None = None,
        grid: str | Sequence[float] | None = None,
        afs: str | None = None,
        final: bool = False,
        head_start: float | None = None,
        end: str | None = None,
    ) -> Settings:
        """Fill in what was left open, and check that everything fits.

        "auto" is the best that the model's card knows for the budget: a learned solver, where one
        comes with the model for it, else a named one. Where the caller names grid, afs, final,
        end or a head start it is the named one, with these. Beside sigmas it is a solver alone, one
        that spends one evaluation on each interval, and afs is "none" unless given. A solver that
        is named without a grid or an end has those of the card.
        head_start: the level at which sampling starts; sigma_max where left out
        Errors: ValueError, also where the grid does not start where sampling does.
        """
        known: dict[str, Any] = {}
        asked, nfe = nfe, DEFAULT_NFE if nfe is None else nfe
        if grid is not None and not isinstance(grid, str):
            grid = check_grid(grid)
        if isinstance(solver, str) and solver == "auto":
            top = head_start is None or starts_at(head_start, model.card.sigma_max)
            known = _known(model.card, nfe, grid, afs, final, end, top)
            free = (grid, afs, end) == (None, None, None) and not final and top
            learned = model.card.learned(nfe) if free else None
            solver = known.get("solver", "dpmpp-2m") if learned is None else str(learned)
        if isinstance(solver, str | Path):
            found = locate(model, solver, asked)  # speaks up now about an unknown name
            solver = found.name if isinstance(found, Solver) else found
        if model.card.distilled and grid is None and isinstance(solver, str | Solver):
            grid = _own_levels(model.card, nfe)
        if not isinstance(solver, str | Solver):
            program = resolve(solver, asked, grid, afs or "none", final, end=end or "sigma_min")
            _check_start(model, program.sigmas[0], head_start, own=True)
            _check_weights(model, program)
            return cls(solver, program.evaluations, None)
        chosen = known.get("grid", model.card.grid) if grid is None else grid
        start = known.get("afs", "none") if afs is None else afs
        if start == "mean":
            level = model.card.sigma_max if head_start is None else head_start
            check_mean_start(level if isinstance(chosen, str) else chosen[0], model.card.sigma_max)
        if not isinstance(chosen, str):
            chosen = tuple(float(sigma) for sigma in chosen)
            program = resolve(solver, nfe, chosen, start, final, end=end or "sigma_min")
            _check_start(model, chosen[0], head_start)
            return cls(solver, program.evaluations, chosen, start, final)
        stop = "sigma_min" if final else known.get("end", model.card.end)
        return cls(solver, nfe, chosen, start, final, stop if end is None else end)

    @property
    def stochastic(self) -> bool:
        """Whether this may draw noise on the way: the solver or plan does, and is not a consistency
        function that ends at once."""
        if isinstance(self.solver, Plan):
            return any(isinstance(op, Combine) and op.noise != 0 for op in self.solver.ops)
        if not isinstance(self.solver, str | Solver):
            return False
        solver = get(self.solver) if isinstance(self.solver, str) else self.solver
        at_once = self.nfe == 1 and isinstance(self.grid, tuple) and self.grid[-1] == 0
        return solver.stochastic and not (solver.consistency and at_once)

    def arguments(self, head_start: float | None = None) -> dict[str, Any]:
        """Keyword arguments of `solve` and `iterate`.

        head_start: a level to which the prior is carried, where a named grid then begins
        """
        named = isinstance(self.grid, str) and head_start is not None
        start = {"sigma_max": head_start} if named else {}
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | start

    def record(self) -> dict[str, Any]:
        """The same for provenance, JSON-ready; a plan is known by a hash of its numbers. Where the
        solver has its own grid, its first step and its end are its own too: null."""
        name = self.solver
        if isinstance(name, Plan):
            digest = hashlib.sha256(name.to_json().encode()).hexdigest()[:16]
            name = f"{name.solver}, plan {digest}"
        elif not isinstance(name, str):
            name = name.name if isinstance(name, Solver) else name.program().name
        grid = list(self.grid) if isinstance(self.grid, tuple) else self.grid
        own = {"afs": None, "end": None} if grid is None else {}
        return {**self.arguments(), "solver": name, "grid": grid, **own}


def locate(model: Model, solver: str | Path, nfe: int | None) -> Solver | Runnable:
    """A solver by name, or a learned one by its folder, or by the name under which it comes with
    the model, which goes before a folder of that name. Errors: ValueError where there is none."""
    comes = model.card.shipped(str(solver))
    if comes and is_folder(solver):
        warnings.warn(
            f"{solver} is what comes with {model.card.name}; the folder of that name here is "
            f"./{solver}",
            stacklevel=2,
        )
    return find(comes or solver, nfe)


def _known(
    card: Card,
    nfe: int,
    grid: str | tuple[float, ...] | None,
    afs: str | None,
    final: bool,
    end: str | None,
    top: bool,
) -> dict[str, Any]:
    """The card's entry for the budget, or for the next lower one that it has, where that fits what
    the caller has named.

    top: whether the start is at sigma_max; below it, afs="mean" does not hold
    """
    sigmas = None if grid is None or isinstance(grid, str) else grid
    if sigmas is not None:
        nfe = len(sigmas) - 1
    below = [int(budget) for budget in card.auto if int(budget) <= nfe]
    entry = card.auto[str(max(below))].given() if below else {}
    if not top and entry.get("afs") == "mean":
        del entry["afs"]
    begin = entry.get("afs", "none") if afs is None else afs
    stop = end or ("sigma_min" if final else entry.get("end", card.end))
    try:
        solver = get(entry["solver"])
        if sigmas is not None:
            fits = solver.on(sigmas).evaluations == nfe
            return {"solver": entry["solver"]} if fits else {}
        intervals_for(solver, nfe, begin, final, stop)
    except (KeyError, ValueError):
        return {}
    return entry


def _own_levels(card: Card, nfe: int) -> Sequence[float]:
    """The levels that a distilled network was trained on for this budget, whatever the solver."""
    choice = card.auto.get(str(nfe))
    if choice is None or choice.grid is None:
        have = ", ".join(card.auto) or "none"
        raise ValueError(
            f"{card.name} is distilled and has levels for {have} evaluations, not for {nfe}; "
            "take one of these, or give a grid"
        )
    return choice.grid


def _check_weights(model: Model, program: Program) -> None:
    """Warn of a solver that was trained on another network, where both are known."""
    known = model.card.weights_sha256
    if program.learned_on and known and program.learned_on != known:
        warnings.warn(
            f"{program.name} was trained on other weights than those of {model.card.name}; "
            "expect less of it, or train one for this model",
            stacklevel=4,
        )


def _check_start(model: Model, sigma: float, head_start: float | None, own: bool = False) -> None:
    """own: whether it is the solver's own grid that starts at sigma, which cannot be moved."""
    start = model.card.sigma_max if head_start is None else head_start
    if own and not starts_at(sigma, start):
        raise ValueError(
            f"this solver has its own grid, which starts at sigma {sigma:g}, and sampling starts "
            f"at {start:g}; take a solver without one, or head_start={sigma:g}"
        )
    if not starts_at(sigma, start):
        raise ValueError(
            f"the grid starts at sigma {sigma:g}, but sampling at {start:g}; start the grid there, "
            f"or sampling at the grid's: head_start={sigma:g} of noise, strength of a picture"
        )


def plan_for(
    solver: str,
    nfe: int | None = None,
    model: Model | None = None,
    *,
    grid: str | Sequence[float] | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    afs: str | None = None,
    final: bool = False,
    end: str | None = None,
) -> Plan:
    """The plan that a run would follow, on a model, or without one on the range of EDM.

    solver: a name, a learned solver's folder, or "auto" where there is a model; the others as in
        `sample`
    Of a learned solver that reads features the numbers are means over some of the model's samples.
    Errors: ValueError, also where the solver adapts to the network, and there is no model.
    """
    from fewstep.learned.solver import LearnedSolver  # most runs have no use for it

    if model is None:
        if solver == "auto":
            raise ValueError("auto is the best that a model's card knows; name a model too")
        found = find(solver, nfe)
        denoiser, chosen = None, found.name if isinstance(found, Solver) else found
        named = DEFAULT_GRID if grid is None else grid
        begin, stop = afs or "none", end or "sigma_min"
    else:
        settings = Settings.choose(model, solver, nfe, grid, afs, final, sigma_max, end)
        denoiser, chosen = model.denoiser(), settings.solver
        nfe, named, begin, stop = settings.nfe, settings.grid, settings.afs, settings.end
    if isinstance(chosen, LearnedSolver):
        resolve(chosen, nfe, grid, begin, final, sigma_min, sigma_max, end=stop)
        return chosen.plan(denoiser, model.prior(AVERAGED) if model else None)
    assert isinstance(chosen, str)  # of a name comes a solver's, or a learned one
    ends = (sigma_min, sigma_max) if isinstance(named, str) else (None, None)
    program = resolve(chosen, nfe, named, begin, final, *ends, denoiser, stop)
    name = named if isinstance(named, str) else "custom"
    return get(chosen).plan(program.sigmas, begin, final, grid=name)


def describe(
    model: Model,
    settings: Settings,
    *,
    prompt: str | None = None,
    guidance: float | Sequence[float] | None = None,
    head_start: float | None = None,
) -> dict[str, Any]:
    """What makes a picture, besides its seed and label, JSON-ready: known before it is made."""
    return {
        "model": model.card.name,
        "weights": model.card.weights_sha256,
        **settings.record(),
        "prompt": prompt,
        "guidance": guidance,
        "head_start": head_start,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


@dataclass(frozen=True, eq=False)
class Run:
    """What `sample` was asked for, checked and filled in; it makes the pictures part by part.

    given: label, prompt, negative, guidance and image (uint8 [n, h, w, c]), as far as there are any
    each: those of them that have one value per seed
    level: the noise level at which it starts; None where that is the prior's
    """

    model: Model
    settings: Settings
    seeds: tuple[int, ...]
    given: dict[str, Any]
    each: frozenset[str]
    head_start: float | None
    strength: float | None
    level: float | None

    @classmethod
    def of(
        cls,
        model: Model,
        seeds: Sequence[int],
        *,
        solver: str | Solver | Runnable = "auto",
        nfe: int | None = None,
        label: Any = None,
        prompt: str | Sequence[str] | None = None,
        negative: str | Sequence[str] | None = None,
        guidance: float | Sequence[float] | Tensor | None = None,
        image: Any = None,
        strength: float | None = None,
        grid: str | Sequence[float] | None = None,
        afs: str | None = None,
        final: bool = False,
        head_start: float | None = None,
        end: str | None = None,
    ) -> Run:
        """Arguments and errors as in `sample`."""
        if not hasattr(model, "denoiser"):
            raise ValueError(
                f"model must be a loaded model, got {model!r:.80}; load it first: fewstep.load(...)"
            )
        seeds = _whole_seeds(seeds)
        given = {"label": label, "prompt": prompt, "negative": negative, "guidance": guidance}
        given = {name: _plain(value) for name, value in given.items()}
        each = {name for name, value in given.items() if _one_per_seed(name, value, len(seeds))}
        level = head_start
        if image is not None:
            taken = {"afs": afs not in (None, "none"), "head_start": head_start is not None}
            for name in (name for name, is_given in taken.items() if is_given):
                raise ValueError(
                    f"{name} is for a start from noise alone, and image starts from a picture; "
                    "leave one of them out"
                )
            if not hasattr(model, "start"):
                raise ValueError(f"{model.card.name} cannot start from a picture; leave out image")
            able = cast("PictureModel", model)
            afs, strength = "none", DEFAULT_STRENGTH if strength is None else strength
            level = able.level(strength)
            images = given["image"] = load_images(image, *able.picture)
            if len(images) > 1 and _one_per_seed("image", images, len(seeds)):
                each.add("image")
        elif strength is not None:
            raise ValueError("strength says how far to leave an image; give image too")
        settings = Settings.choose(model, solver, nfe, grid, afs, final, level, end)
        return cls(model, settings, seeds, given, frozenset(each), head_start, strength, level)

    def part(self, start: int, size: int) -> dict[str, Any]:
        """What is given for seeds[start : start + size]."""
        chosen = slice(start, start + size)
        return {n: v[chosen] if n in self.each else v for n, v in self.given.items()}

    def denoiser(self, given: dict[str, Any]) -> Denoiser:
        """D for one part, its texts encoded."""
        text = {"negative": given["negative"]}
        has_text = given["prompt"] is not None or given["negative"] is not None
        conditions = given["label"], given["prompt"], given["guidance"]
        return self.model.denoiser(*conditions, **(text if has_text else {}))

    def begin(self, given: dict[str, Any], seeds: Sequence[int]) -> Tensor:
        """x at the first level: noise, carried down or not, or a picture with noise."""
        if self.strength is not None:
            able = cast("PictureModel", self.model)
            return able.start(given["image"], seeds, self.strength)[0]
        carried = {"sigma": self.head_start, "label": given["label"]}
        return self.model.prior(seeds, **(carried if self.head_start is not None else {}))

    def check(self, size: int) -> int:
        """Network calls of an evaluation. Whatever does not fit speaks up, as far as a first part
        of `size` pictures and all labels tell, before a network is called for a picture."""
        if "label" in self.each:
            self.model.denoiser(list(dict.fromkeys(self.given["label"])))
        denoiser = self.denoiser(self.part(0, size))
        self.begin(self.part(0, 1), self.seeds[:1])
        resolve(**self.settings.arguments(self.level), denoiser=denoiser)
        if self.settings.afs == "mean":
            far_mean(denoiser)
        return calls_per_eval(denoiser)

    @torch.no_grad()
    def make(self, start: int, size: int) -> tuple[np.ndarray, int, int]:
        """The pictures of seeds[start : start + size], uint8 [n, h, w, c], with the evaluations and
        network calls of each. Errors: FloatingPointError."""
        given, seeds = self.part(start, size), self.seeds[start : start + size]
        denoiser = Counted(self.denoiser(given))
        x_T = self.begin(given, seeds)
        arguments = {**self.settings.arguments(self.level), "seeds": seeds}
        x = solve(denoiser, x_T, **arguments)
        if not torch.isfinite(x).all():
            raise FloatingPointError(_diagnose(denoiser, x_T, arguments))
        return self.model.decode(x), denoiser.evaluations, denoiser.network_calls

    def record(self) -> dict[str, Any]:
        """What makes the pictures besides their seeds, JSON-ready: known before they are made. What
        is given per seed is a list; a picture stands as the hash of its pixels."""
        given = dict(self.given)
        images = [hashlib.sha256(one.tobytes()).hexdigest() for one in given.pop("image", ())]
        return {
            **describe(self.model, self.settings, head_start=self.head_start),
            **given,
            "image": images if "image" in self.each else images[0] if images else None,
            "strength": self.strength,
        }


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
    batch: int | None = None,
    grid: str | Sequence[float] | None = None,
    afs: str | None = None,
    final: bool = False,
    head_start: float | None = None,
    end: str | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> Samples:
    """Sample one picture per seed in `nfe` evaluations each.

    solver: a name, "auto" (the best that the model's card knows for the budget), a Solver, a Plan,
        a learned solver, or its folder
    nfe: the budget; it follows from the grid or the plan where sigmas or a Plan are given
    label: a class, by name or index; one for all pictures or one per seed (a sequence or a tensor).
        Text that is a class's name means that class, other text of digits an index; a number is
        always an index.
    prompt: a text, for models that take one; one for all pictures or one per seed
    negative: a text that guidance leads away from; one for all pictures or one per seed
    guidance: classifier-free guidance scale, one for all pictures or one per seed; None or 1 is
        none
    image: a picture to start from in place of noise alone: a file, or uint8 [h, w, c]; or one per
        seed. Its largest middle part of the model's shape is resized to the model's size.
    strength: how far image is left, in (0, 1], 0.8 unless given: the share of the grid's time that
        is gone through again, all `nfe` evaluations within it
    batch: pictures at a time; unless given 64, and fewer of large ones (see `usual_batch`)
    grid, afs, final, end: as in `solve`; the card's grid and end where left out
    head_start: a noise level to which the prior is carried analytically, as the flow of a Gaussian,
        at no evaluation
    report: called with the number of pictures done after each batch

    Picture i depends on seed i alone, and on what is given for it.
    Errors: ValueError for what the model or the solver cannot do; FloatingPointError, with the step
    and the seeds, where the network returns NaN or infinity.
    """
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    run = Run.of(
        model,
        seeds,
        solver=solver,
        nfe=nfe,
        label=label,
        prompt=prompt,
        negative=negative,
        guidance=guidance,
        image=image,
        strength=strength,
        grid=grid,
        afs=afs,
        final=final,
        head_start=head_start,
        end=end,
    )
    size, images, evals, calls = batch or usual_batch(model), [], 0, 0
    for start in range(0, len(run.seeds), size):
        made, evals, calls = run.make(start, size)
        images.append(made)
        report(min(start + size, len(run.seeds)))
    provenance = {**run.record(), "nfe": evals, "network_calls": calls}
    return Samples(np.concatenate(images), run.seeds, evals, calls, provenance)


def usual_batch(model: Model) -> int:
    """Pictures at a time: 64, or as many as have 2^17 numbers in their states, 8 of Stable
    Diffusion at 512 pixels."""
    return max(1, min(MOST_AT_A_TIME, NUMBERS_AT_A_TIME // math.prod(model.shape)))


def load_images(image: Any, height: int, width: int, channels: int) -> np.ndarray:
    """Pictures of one size, uint8 [n, h, w, c], from files or arrays: one, or a sequence of them.

    Errors: ValueError for what is neither; OSError where there is no such file.
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


def _whole_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    try:
        whole = tuple(operator.index(seed) for seed in seeds)
    except TypeError:
        raise ValueError(
            f"seeds must be whole numbers, one per picture, such as range(16), got {seeds!r:.80}"
        ) from None
    if not whole:
        raise ValueError("seeds must name at least one picture")
    return whole


def _plain(value: Any) -> Any:
    """The same with the numbers of torch and numpy as Python's, which JSON knows."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _one_per_seed(name: str, value: Any, count: int) -> bool:
    """Whether a condition is given for each picture. Errors: ValueError for another number."""
    if value is None or isinstance(value, str) or not hasattr(value, "__len__"):
        return False
    if len(value) != count:
        raise ValueError(f"{name} must be one or one per seed, got {len(value)} for {count}")
    return True


def _diagnose(denoiser: Denoiser, x_T: Tensor, run: dict) -> str:
    """Where the first value that is not finite came up; walks the same path again, looking at every
    state."""
    for step, state in enumerate(iterate(denoiser, x_T, **run)):
        good = torch.isfinite(state.x).flatten(1).all(dim=1)
        if not good.all():
            bad = [seed for seed, fine in zip(run["seeds"], good.tolist(), strict=True) if not fine]
            named = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
            return (
                f"the network returned NaN or infinity in step {step + 1}, on the way to "
                f"sigma {state.sigma:.4g}, for seeds {named}; "
                "try dtype float32, or another guidance scale"
            )
    return (
        "the result is not finite, but a second run over the same path was; is the device at fault?"
    )
