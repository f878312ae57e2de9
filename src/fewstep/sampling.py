"""From a model to pictures: names, seeds and labels in, uint8 images and their provenance out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fewstep.denoiser import Counted
from fewstep.grid import check_grid
from fewstep.loop import DEFAULT_GRID, iterate, solve
from fewstep.plan import Plan
from fewstep.plan import nfe as plan_nfe
from fewstep.solver import Solver, get

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
    """How a solver is run: its name or itself, the budget, the grid, the first and the last
    step."""

    solver: str | Solver | Plan
    nfe: int
    grid: str | tuple[float, ...]
    first: str
    final: bool

    @classmethod
    def choose(
        cls,
        model: Model,
        solver: str | Solver | Plan = "auto",
        nfe: int = 5,
        grid: str | Sequence[float] | None = None,
        first: str | None = None,
        final: bool = False,
    ) -> Settings:
        """Fill in what was left open. "auto" is the best that the model's card knows for the
        budget; what the caller did name (grid, first) is kept."""
        known: dict[str, Any] = {}
        if solver == "auto":
            table = {int(budget): entry for budget, entry in model.card.auto.items()}
            within = [budget for budget in table if budget <= nfe]
            known = table[max(within) if within else min(table)] if table else {}
            solver = known.get("solver", "dpmpp-2m")
        chosen = known.get("grid", DEFAULT_GRID) if grid is None else grid
        start = known.get("first", "none") if first is None else first
        if not isinstance(chosen, str):
            chosen = check_grid(chosen)
            found = get(solver) if isinstance(solver, str) else solver
            if isinstance(found, Solver) and not found.adapts:
                nfe = plan_nfe(found.plan(chosen, start, final))
        return cls(solver, nfe, chosen, start, final)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `solve` and `iterate`."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def record(self) -> dict[str, Any]:
        """The same for provenance: names and numbers only."""
        name = self.solver if isinstance(self.solver, str) else getattr(self.solver, "name", "plan")
        return {**self.arguments(), "solver": name}


def describe(
    model: Model,
    settings: Settings,
    *,
    prompt: str | None = None,
    guidance: float | None = None,
    head_start: float | None = None,
) -> dict[str, Any]:
    """What makes a picture, besides its seed and label, JSON-ready: known before it is made."""
    record = settings.record()
    guided = guidance is not None and guidance != 1
    return {
        "model": model.card.name,
        "weights": model.card.weights_sha256,
        **record,
        "grid": record["grid"] if isinstance(record["grid"], str) else list(record["grid"]),
        "network_calls": settings.nfe * (1 + guided),
        "prompt": prompt,
        "guidance": guidance,
        "head_start": head_start,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


@torch.no_grad()
def sample(
    model: Model,
    *,
    solver: str | Solver | Plan = "auto",
    nfe: int = 5,
    seeds: Sequence[int],
    label: int | str | Sequence[int | str] | None = None,
    prompt: str | None = None,
    guidance: float | None = None,
    batch: int | None = None,
    grid: str | Sequence[float] | None = None,
    first: str | None = None,
    final: bool = False,
    head_start: float | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> Samples:
    """Sample one picture per seed in `nfe` evaluations each.

    solver: a name, "auto" (the best that the model's card knows for the budget), a Solver or a Plan
    label: one for all pictures or one per seed, an index or a class name
    guidance: classifier-free guidance scale; None or 1 is none
    batch: pictures at a time, 64 unless given
    grid, first, final: as in `solve`
    head_start: a noise level to which the prior is carried analytically, as the flow of a Gaussian,
        at no evaluation
    report: called with the number of pictures done after each batch

    Picture i depends on seed i alone.
    Errors: ValueError for what the model or the solver cannot do; FloatingPointError, with the step
    and the seeds, where the network returns NaN or infinity.
    """
    seeds = tuple(int(seed) for seed in seeds)
    if not seeds:
        raise ValueError("seeds must name at least one picture")
    if not isinstance(label, int | str | None) and len(label) != len(seeds):
        raise ValueError(f"label must be one or one per seed, got {len(label)} for {len(seeds)}")
    settings = Settings.choose(model, solver, nfe, grid, first, final)
    size, images, evals, calls = batch or 64, [], 0, 0
    for start in range(0, len(seeds), size):
        part = slice(start, start + size)
        labels = label if isinstance(label, int | str | None) else label[part]
        denoiser = Counted(model.denoiser(labels, prompt, guidance))
        x_T = model.prior(seeds[part], sigma=head_start, label=labels)
        run = {**settings.arguments(), "sigma_max": head_start, "seeds": seeds[part]}
        x = solve(denoiser, x_T, **run)
        if not torch.isfinite(x).all():
            raise FloatingPointError(_diagnose(denoiser, x_T, run))
        images.append(model.decode(x))
        evals, calls = denoiser.evaluations, denoiser.network_calls
        report(min(start + size, len(seeds)))
    provenance = {
        **describe(model, settings, prompt=prompt, guidance=guidance, head_start=head_start),
        "nfe": evals,
        "network_calls": calls,
        "label": label if isinstance(label, int | str | None) else list(label),
    }
    return Samples(np.concatenate(images), seeds, evals, calls, provenance)


def _diagnose(denoiser: Callable[[Tensor, Tensor], Tensor], x_T: Tensor, run: dict) -> str:
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
