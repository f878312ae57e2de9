"""Trajectories of a model, measured: every seed's curve, its numbers, and a file that resumes.

The mathematics is in `fewstep.evaluate.curves`; the pages are in `fewstep.report.geometry`.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.evaluate.curves import COMPONENTS, Curves, measure, positive, trace
from fewstep.files import open_folder, write_json, write_whole
from fewstep.grid import check_grid, make_grid
from fewstep.models import Model, load
from fewstep.provenance import machine_line, software_line
from fewstep.sampling.choose import choose, describe, identify
from fewstep.sampling.settings import Settings
from fewstep.solver import get
from fewstep.solver.registry import MOST_EVALUATIONS
from fewstep.solving import DEFAULT_RANGE
from fewstep.text import span

__all__ = ["Geometry", "Tracing", "measure_part", "run_geometry"]

STATES_BYTES = 2**28  # what the states of one batch may take
LARGEST_BATCH = 32
CHECK_SEEDS = 4
FORMAT = "fewstep-geometry/1"


@dataclass(frozen=True, eq=False)
class Geometry:
    """What was measured.

    sigmas: the levels of the points, falling
    x, denoised: the curves of x and of D(x; sigma), one per seed
    settings: how they came about, JSON-ready
    check: how exact the trajectories are, from a few of them on twice the points
    protocol: how to make all this again, in words
    files: what was written
    """

    model: str
    seeds: tuple[int, ...]
    sigmas: tuple[float, ...]
    x: Curves
    denoised: Curves
    settings: dict[str, Any]
    check: dict[str, float]
    protocol: dict[str, str]
    files: tuple[Path, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All numbers, JSON-ready. Distances are root mean squares per pixel."""
        return {
            "format": FORMAT,
            "protocol": self.protocol,
            "settings": self.settings,
            "check": self.check,
            "seeds": list(self.seeds),
            "sigmas": list(self.sigmas),
            "x": _numbers(self.x),
            "denoised": _numbers(self.denoised),
        }


def _numbers(curves: Curves) -> dict[str, Any]:
    """Statistics over the seeds, along the grid, and of each seed."""
    names = ("straight line", "1 component", "2 components", "3 components")
    shares, distances, relative = curves.cumulative, curves.distances, curves.relative
    of_length = distances.mean(2) * math.sqrt(curves.size) / positive(curves.length)[:, None]
    return {
        "cumulative_share": {str(k + 1): _spread(shares[:, k]) for k in range(shares.shape[1])},
        "distance": {
            name: {
                "mean": _spread(distances[:, k].mean(1)),
                "largest": _spread(distances[:, k].max(1)),
                "mean_over_length": _spread(of_length[:, k]),
                "largest_over_norm": _spread(relative[:, k].max(1)),
            }
            for k, name in enumerate(names)
        },
        "length": _spread(curves.length),
        "chord": _spread(curves.chord),
        "along_sigma": {
            name: {
                "mean": distances[:, k].mean(0).tolist(),
                "10%": np.quantile(distances[:, k], 0.1, axis=0).tolist(),
                "90%": np.quantile(distances[:, k], 0.9, axis=0).tolist(),
            }
            for k, name in enumerate(names)
        },
        "each_seed": {
            "cumulative_share": shares[:, :COMPONENTS].tolist(),
            "largest_distance": distances.max(2).tolist(),
            "length": curves.length.tolist(),
            "chord": curves.chord.tolist(),
        },
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    """sd is the standard deviation over the seeds, 0 for one seed."""
    return {
        "mean": float(values.mean()),
        "sd": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
        "min": float(values.min()),
        "max": float(values.max()),
    }


@torch.no_grad()
def run_geometry(
    model: str | Path | Model = "fashion-mnist",
    out: Path | str = "geometry",
    *,
    seeds: Sequence[int] = range(64),
    points: int = 50,
    solver: str = "exp-adams-4",
    grid: str | Sequence[float] = "karras",
    label: int | str | None = None,
    prompt: str | None = None,
    guidance: float | None = None,
    batch: int | None = None,
    command: str = "fewstep geometry",
    by: Share | None = None,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Geometry:
    """Measure the trajectories of a model; write geometry.json.

    `out` also keeps the curves, geometry.safetensors, so that a run that was cut short goes on
    after its last batch, and seeds may be added.

    Args:
        model: a name, a folder, or a loaded model
        points: of a trajectory, on a grid that is a name; sigmas are a grid of their own
        solver: of the ODE, by name
        label, prompt, guidance: one for all seeds
        batch: seeds at a time; what keeps their states below 256 MB unless given
        by: has parts of the seeds measured by others, and gives each with its `measure_part`
        report: called with what is under way, and with the work done and in total, in points

    Raises:
        ValueError: for what the model or the solver cannot do, a grid that ends at 0, and an `out`
            that holds a run with other settings.
        FloatingPointError: the network returns NaN or infinity.
        OSError: `out` cannot be written; all but the second before any work.
    """
    out, seeds = Path(out), tuple(int(seed) for seed in seeds)
    _check(seeds, batch, solver)
    loaded = load(model) if isinstance(model, str | Path) else model
    denoiser = loaded.denoiser(label, prompt, guidance)
    sigmas = _levels(denoiser, grid, points)
    chosen = choose(loaded, Settings(solver, grid=sigmas))
    settings = describe(loaded, chosen, prompt=prompt, guidance=guidance)
    settings |= {"label": label, **identify(loaded)}
    open_folder(out)
    store = _Store(out / "geometry.safetensors", settings)
    rows = store.read()
    missing = [seed for seed in seeds if seed not in rows]
    few = seeds[:CHECK_SEEDS]
    most = STATES_BYTES // (8 * len(sigmas) * math.prod(loaded.shape))  # x and D, float32
    size = batch or max(1, min(LARGEST_BATCH, most))
    in_check = 3 * len(sigmas) - 1
    total = len(missing) * len(sigmas) + len(few) * in_check
    traced = _Tracer(loaded, denoiser, solver, report, total)
    parts = _split(missing, size)
    if by is not None and missing:
        how = Tracing(solver, sigmas, label, prompt, guidance)
        for part, columns in by(how, [tuple(part) for part in parts]):
            rows |= dict(zip(part, map(list, zip(*columns, strict=True)), strict=True))
            traced.done += len(part) * len(sigmas)
            report("trajectories", traced.done, total)
            store.write(rows)
    for part in parts:
        columns = _columns(*traced(part, sigmas, "trajectories"))
        rows |= dict(zip(part, map(list, zip(*columns, strict=True)), strict=True))
        store.write(rows)
    coarse, fine = [], []
    for part in _split(few, max(1, size // 2)):
        coarse.append(traced(part, sigmas, "check")[0])
        fine.append(traced(part, _doubled(sigmas), "check")[0][:, ::2])
    check = _compare(torch.cat(coarse), torch.cat(fine))

    pixels = math.prod(loaded.shape)
    columns = [np.stack(column) for column in zip(*(rows[seed] for seed in seeds), strict=True)]
    result = Geometry(
        loaded.card.name,
        seeds,
        sigmas,
        Curves(*columns[:2], size=pixels),
        Curves(*columns[2:], size=pixels),
        settings,
        check,
        _protocol(loaded, command, seeds, settings, grid, len(sigmas)),
    )
    report("writing", total, total)
    write_json(out / "geometry.json", result.to_dict())
    return replace(result, files=(out / "geometry.json",))


@dataclass(frozen=True)
class Tracing:
    """How trajectories come about: what `measure_part` needs besides a model and seeds."""

    solver: str
    sigmas: tuple[float, ...]
    label: int | str | None = None
    prompt: str | None = None
    guidance: float | None = None


Columns = tuple[np.ndarray, ...]  # points and norms of x, and of D(x; sigma), one row per seed
Share = Callable[[Tracing, list[tuple[int, ...]]], Iterable[tuple[tuple[int, ...], Columns]]]


@torch.no_grad()
def measure_part(model: Model, how: Tracing, seeds: Sequence[int]) -> Columns:
    """The curves of some seeds, as `run_geometry` keeps them."""
    denoiser = model.denoiser(how.label, how.prompt, how.guidance)
    curves = trace(denoiser, model.prior(seeds), how.solver, how.sigmas)
    _check_finite(curves, seeds, how.sigmas)
    return _columns(*curves)


def _columns(x: Tensor, denoised: Tensor) -> Columns:
    a, b = measure(x), measure(denoised)
    return a.points, a.norms, b.points, b.norms


def _check(seeds: Sequence[int], batch: int | None, solver: str) -> None:
    if not seeds:
        raise ValueError("seeds must name at least one trajectory")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if get(solver).stochastic:
        raise ValueError(
            f"{solver} is stochastic; a trajectory here is the ODE's, so take another solver"
        )


def _levels(denoiser: Denoiser, grid: str | Sequence[float], points: int) -> tuple[float, ...]:
    if isinstance(grid, str):
        if points > MOST_EVALUATIONS:
            raise ValueError(f"points must be at most {MOST_EVALUATIONS}, got {points}")
        low = getattr(denoiser, "sigma_min", None) or DEFAULT_RANGE[0]
        high = getattr(denoiser, "sigma_max", None) or DEFAULT_RANGE[1]
        sigmas = make_grid(grid, points, high, low, getattr(denoiser, "schedule", None))
    else:
        sigmas = check_grid(grid)
    if len(sigmas) <= COMPONENTS:
        raise ValueError(f"points must be at least {COMPONENTS + 1}, got {len(sigmas)}")
    if sigmas[-1] == 0:
        raise ValueError("the grid must end above 0, where D(x; sigma) can be evaluated")
    return sigmas


def _doubled(sigmas: Sequence[float]) -> tuple[float, ...]:
    """With the geometric mean of each two neighbours in between."""
    middles = [math.sqrt(a * b) for a, b in pairwise(sigmas)]
    pairs = zip(sigmas, middles, strict=False)
    return (*(sigma for pair in pairs for sigma in pair), sigmas[-1])


def _split(seeds: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(seeds), size):
        yield seeds[start : start + size]


def _check_finite(curves: Sequence[Tensor], seeds: Sequence[int], sigmas: Sequence[float]) -> None:
    for points in curves:
        fine = torch.isfinite(points).all(2)  # [b, p]
        if not fine.all():
            row, point = (~fine).nonzero()[0].tolist()
            raise FloatingPointError(
                f"the network returned NaN or infinity at sigma {sigmas[point]:.4g} for seed "
                f"{seeds[row]}; try dtype float32, or another guidance scale"
            )


def _compare(coarse: Tensor, fine: Tensor) -> dict[str, float]:
    """How far the trajectories are from those on twice the points, as root mean squares per pixel,
    and how much that moves a share."""
    gap = (coarse.double() - fine.double()).square().mean(2).sqrt()
    moved = np.abs(measure(coarse).cumulative - measure(fine).cumulative)
    return {
        "seeds": len(coarse),
        "end": float(gap[:, -1].max()),
        "largest": float(gap.max()),
        "share": float(moved.max()),
    }


@dataclass
class _Tracer:
    """Traces trajectories and reports the points done, of `total`."""

    model: Model
    denoiser: Denoiser
    solver: str
    report: Callable[[str, int, int], None]
    total: int
    done: int = 0

    def __call__(
        self, seeds: Sequence[int], sigmas: Sequence[float], what: str
    ) -> tuple[Tensor, Tensor]:
        begun = self.done

        def progress(reached: int) -> None:
            self.report(what, begun + reached * len(seeds), self.total)

        x_T = self.model.prior(seeds)
        curves = trace(self.denoiser, x_T, self.solver, sigmas, progress)
        self.done = begun + len(seeds) * len(sigmas)
        _check_finite(curves, seeds, sigmas)
        return curves


@dataclass(frozen=True)
class _Store:
    """The curves of the seeds done so far, in one file that is always whole."""

    path: Path
    settings: dict[str, Any]

    NAMES = ("x.points", "x.norms", "denoised.points", "denoised.norms")

    def read(self) -> dict[int, list[np.ndarray]]:
        """By seed, in the order of NAMES.

        Raises:
            ValueError: the file is of other settings or no file of ours.
        """
        if not self.path.exists():
            return {}
        try:
            with safe_open(self.path, "numpy") as file:
                found = json.loads((file.metadata() or {})["fewstep"])
                seeds = file.get_tensor("seeds").tolist()
                columns = [file.get_tensor(name) for name in self.NAMES]
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"{self.path} is not a file of fewstep geometry ({error}); choose another --out"
            ) from None
        wanted = json.loads(json.dumps({**self.settings, "format": FORMAT}))
        other = [key for key in wanted if found.get(key) != wanted[key]]
        if other:
            how = ", ".join(
                "another grid" if key == "grid" else f"{key}={found.get(key)} (now {wanted[key]})"
                for key in other[:3]
            )
            raise ValueError(f"{self.path} is there already, with {how}; choose another --out")
        return {seed: list(row) for seed, *row in zip(seeds, *columns, strict=True)}

    def write(self, rows: dict[int, list[np.ndarray]]) -> None:
        tensors = {
            name: torch.from_numpy(np.stack(column))
            for name, column in zip(self.NAMES, zip(*rows.values(), strict=True), strict=True)
        }
        tensors["seeds"] = torch.tensor(list(rows), dtype=torch.int64)
        record = {"fewstep": json.dumps({**self.settings, "format": FORMAT})}
        write_whole(self.path, safetensors.torch.save(tensors, record))


def _protocol(
    model: Model,
    command: str,
    seeds: Sequence[int],
    settings: dict[str, Any],
    grid: str | Sequence[float],
    points: int,
) -> dict[str, str]:
    given = [
        f"{k} {settings[k]}" for k in ("label", "prompt", "guidance") if settings[k] is not None
    ]
    name = f"{grid} grid" if isinstance(grid, str) else "a grid of its own"
    return {
        "command": command,
        "model": f"{model.card.name}, weights SHA-256 {model.card.weights_sha256}",
        "condition": ", ".join(given) or "none",
        "seeds": span(seeds),
        "trajectories": f"{settings['solver']}, {points} points, {name}, "
        f"{settings['dtype']} network",
        "software": software_line(),
        "machine": machine_line(),
        "date": datetime.datetime.now().astimezone().date().isoformat(),
    }
