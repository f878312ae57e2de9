"""From a model to pictures: names, seeds and labels in, uint8 images and their provenance out."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fewstep.denoiser import Counted, Denoiser
from fewstep.loop import DEFAULT_GRID, Runnable, iterate, resolve, solve
from fewstep.plan import Plan
from fewstep.solver import Solver, get, intervals_for

if TYPE_CHECKING:
    from fewstep.models import Model

__all__ = ["Samples", "Settings", "describe", "sample"]


@dataclass(frozen=True)
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
    first: str = "none"
    final: bool = False
    end: str = "sigma_min"

    @classmethod
    def choose(
        cls,
        model: Model,
        solver: str | Solver | Runnable = "auto",
        nfe: int = 5,
        grid: str | Sequence[float] | None = None,
        first: str | None = None,
        final: bool = False,
        head_start: float | None = None,
        end: str | None = None,
    ) -> Settings:
        """Fill in what was left open, and check that everything fits.

        "auto" is the best that the model's card knows for the budget; what the caller did name
        (grid, first, end) is kept.
        Errors: ValueError, also where the grid does not start where the prior does.
        """
        known: dict[str, Any] = {}
        if solver == "auto":
            known = _known(model.card.auto, nfe)
            solver = known.get("solver", "dpmpp-2m")
        if isinstance(solver, str):
            get(solver)  # speaks up now about an unknown name
        elif not isinstance(solver, Solver):
            program = resolve(solver, nfe, grid, first or "none", final, end=end or "sigma_min")
            _check_start(model, program.sigmas[0], head_start)
            return cls(solver, program.evaluations, None)
        chosen = known.get("grid", DEFAULT_GRID) if grid is None else grid
        start = known.get("first", "none") if first is None else first
        if not isinstance(chosen, str):
            chosen = tuple(float(sigma) for sigma in chosen)
            program = resolve(solver, nfe, chosen, start, final, end=end or "sigma_min")
            _check_start(model, chosen[0], head_start)
            return cls(solver, program.evaluations, chosen, start, final)
        stop = "sigma_min" if final else known.get("end", "sigma_min")
        return cls(solver, nfe, chosen, start, final, stop if end is None else end)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `solve` and `iterate`."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def record(self) -> dict[str, Any]:
        """The same for provenance, JSON-ready; a plan is known by a hash of its numbers."""
        name = self.solver
        if isinstance(name, Plan):
            digest = hashlib.sha256(name.to_json().encode()).hexdigest()[:16]
            name = f"{name.solver}, plan {digest}"
        elif not isinstance(name, str):
            name = name.name if isinstance(name, Solver) else name.program().name
        grid = list(self.grid) if isinstance(self.grid, tuple) else self.grid
        return {**self.arguments(), "solver": name, "grid": grid}


def _known(auto: dict[str, dict[str, Any]], nfe: int) -> dict[str, Any]:
    """The card's entry for the budget, or for the next lower one that it has, where that fits."""
    below = [int(budget) for budget in auto if int(budget) <= nfe]
    entry = auto[str(max(below))] if below else {}
    try:
        end = entry.get("end", "sigma_min")
        intervals_for(get(entry["solver"]), nfe, entry.get("first", "none"), end=end)
    except (KeyError, ValueError):
        return {}
    return entry


def _check_start(model: Model, sigma: float, head_start: float | None) -> None:
    start = head_start or model.card.sigma_max
    if not math.isclose(sigma, start, rel_tol=1e-6):
        raise ValueError(
            f"the grid starts at sigma {sigma:g}, but the prior at {start:g}; "
            f"start the grid there, or carry the prior down with head_start={sigma:g}"
        )


def describe(
    model: Model,
    settings: Settings,
    *,
    prompt: str | None = None,
    guidance: float | None = None,
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


@torch.no_grad()
def sample(
    model: Model,
    *,
    solver: str | Solver | Runnable = "auto",
    nfe: int = 5,
    seeds: Sequence[int],
    label: Any = None,
    prompt: Any = None,
    guidance: float | None = None,
    batch: int | None = None,
    grid: str | Sequence[float] | None = None,
    first: str | None = None,
    final: bool = False,
    head_start: float | None = None,
    end: str | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> Samples:
    """Sample one picture per seed in `nfe` evaluations each.

    solver: a name, "auto" (the best that the model's card knows for the budget), a Solver or a Plan
    label: a class, by index or name; one for all pictures or one per seed
    prompt: a text, for models that take one; one for all pictures or one per seed
    guidance: classifier-free guidance scale; None or 1 is none
    batch: pictures at a time, 64 unless given
    grid, first, final, end: as in `solve`
    head_start: a noise level to which the prior is carried analytically, as the flow of a Gaussian,
        at no evaluation
    report: called with the number of pictures done after each batch

    Picture i depends on seed i alone.
    Errors: ValueError for what the model or the solver cannot do; FloatingPointError, with the step
    and the seeds, where the network returns NaN or infinity.
    """
    seeds = tuple(operator.index(seed) for seed in seeds)
    if not seeds:
        raise ValueError("seeds must name at least one picture")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    many = _one_per_seed("label", label, len(seeds)), _one_per_seed("prompt", prompt, len(seeds))
    settings = Settings.choose(model, solver, nfe, grid, first, final, head_start, end)
    run = settings.arguments()
    if isinstance(settings.grid, str):
        run["sigma_max"] = head_start
    size, images, evals, calls = batch or 64, [], 0, 0
    for start in range(0, len(seeds), size):
        part = slice(start, start + size)
        labels, prompts = (
            value[part] if each else value
            for value, each in zip((label, prompt), many, strict=True)
        )
        denoiser = Counted(model.denoiser(labels, prompts, guidance))
        carried = {} if head_start is None else {"sigma": head_start, "label": labels}
        x_T = model.prior(seeds[part], **carried)
        x = solve(denoiser, x_T, **run, seeds=seeds[part])
        if not torch.isfinite(x).all():
            raise FloatingPointError(_diagnose(denoiser, x_T, {**run, "seeds": seeds[part]}))
        images.append(model.decode(x))
        evals, calls = denoiser.evaluations, denoiser.network_calls
        report(min(start + size, len(seeds)))
    provenance = {
        **describe(model, settings, guidance=guidance, head_start=head_start),
        "nfe": evals,
        "network_calls": calls,
        "label": list(label) if many[0] else label,
        "prompt": list(prompt) if many[1] else prompt,
    }
    return Samples(np.concatenate(images), seeds, evals, calls, provenance)


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
