"""The shape of sampling trajectories: how nearly each one lies on a line, in a plane, in a space.

A trajectory is the solution x_0 .. x_N of the probability flow from noise at sigma_0 down to a
picture at sigma_N, on many points. Each seed's is taken by itself: the principal components of its
own points, every point with the same weight,

    Y = R Q                               y_i = x_i - x_N, [points, pixels];  Q Q^T = 1
    H R = U S V^T                         H = 1 - 1 1^T/points takes the mean off
    share of the first k components       sum_{j<k} S_j^2 / sum_j S_j^2
    distance from their span at point i   sqrt(sum_{j>=k} (U S)_ij^2)
    distance from the straight line       |y_i - y_0 <y_i, y_0> / |y_0|^2|

R is the same curve in as many dimensions as it has points, so nothing depends on the size of a
picture but the making of it, and no distance is squared on the way: the noise at sigma_0 is 10^4
times longer than what is looked for. The same is done with D(x_i; sigma_i), the denoised
trajectory.

That a plane is nearly enough is the observation behind AMED: Zhou et al. 2024, arXiv:2312.00094;
the distance from the straight line is the deviation of Chen et al. 2024, arXiv:2405.11326. A share
of the variance says little by itself, for x is mostly noise and the noise shrinks along a line: the
distances, in pixels, are what a picture would notice.

What is exact, and tested: trajectories of an isotropic Gaussian are straight; those of a Gaussian
with k distinct variances have k components; a data set of n points gives n, of which its denoised
trajectory has n - 1.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.files import check_writable, write_json, write_whole
from fewstep.grid import check_grid, make_grid
from fewstep.loop import DEFAULT_RANGE, iterate
from fewstep.models import Model, load
from fewstep.provenance import machine_line, software_line
from fewstep.sampling.generate import Settings, describe
from fewstep.solver import get

__all__ = ["Curves", "Geometry", "measure", "run_geometry", "trace"]

COMPONENTS = 3  # line, plane, space: as far as distances and coordinates go
SPECTRUM = 8  # shares are kept of so many
STATES_BYTES = 2**28  # what the states of one batch may take
LARGEST_BATCH = 32
COLUMNS = 2**14  # pixels taken together, in float64
CHECK_SEEDS = 4
FORMAT = "fewstep-geometry/1"


@dataclass(frozen=True, eq=False)
class Curves:
    """n curves of p points each, and their shapes.

    points: relative to the last one and in an orthonormal basis of each curve's own, [n, p, p],
        float64
    norms: |x_i| of the points themselves, [n, p]
    size: d, the numbers in a point as it was

    All distances are Euclidean; over sqrt(size) they are root mean squares per pixel.
    """

    points: np.ndarray
    norms: np.ndarray
    size: int

    @cached_property
    def _components(self) -> tuple[np.ndarray, np.ndarray]:
        """(variances [n, p], falling; coordinates along them about the mean [n, p, p])."""
        u, s, _ = np.linalg.svd(self.points - self.points.mean(1, keepdims=True))
        return s**2, u * s[:, None]

    @property
    def shares(self) -> np.ndarray:
        """Shares of the variance, [n, k], k up to 8; a curve that stays where it is has all of it
        in its first."""
        values = self._components[0]
        total = values.sum(1, keepdims=True)
        still = np.eye(1, values.shape[1])
        return np.where(total > 0, values / _positive(total), still)[:, :SPECTRUM]

    @property
    def cumulative(self) -> np.ndarray:
        """Shares of the first component, the first two, ..., [n, k]."""
        return self.shares.cumsum(1).clip(max=1)

    @property
    def coordinates(self) -> np.ndarray:
        """Along the first 3 components, from the last point, [n, p, 3].

        An axis points to where the curve reaches out farthest, for the sign of a component means
        nothing.
        """
        along = self._components[1][:, :, :COMPONENTS]
        along = along - along[:, -1:]
        farthest = np.abs(along).argmax(1)[:, None]
        return along * np.where(np.take_along_axis(along, farthest, 1) < 0, -1, 1)

    @property
    def from_span(self) -> np.ndarray:
        """Distances from the mean plus the span of the first 1, 2 and 3 components, [n, 3, p]."""
        along = self._components[1]
        return np.stack(
            [np.linalg.norm(along[:, :, k:], axis=2) for k in range(1, COMPONENTS + 1)], axis=1
        )

    @property
    def from_line(self) -> np.ndarray:
        """Distances from the straight line through the two ends, [n, p]."""
        way = self.points[:, 0] / _positive(self.chord)[:, None]
        along = np.einsum("npq,nq->np", self.points, way)
        return np.linalg.norm(self.points - along[:, :, None] * way[:, None], axis=2)

    @property
    def chord(self) -> np.ndarray:
        """Distance between the two ends, [n]."""
        return np.linalg.norm(self.points[:, 0], axis=1)

    @property
    def length(self) -> np.ndarray:
        """Along the points, [n]."""
        return np.linalg.norm(np.diff(self.points, axis=1), axis=2).sum(1)

    @property
    def distances(self) -> np.ndarray:
        """Root mean squares per pixel, [n, 4, p]: from the straight line, then as `from_span`."""
        both = np.concatenate([self.from_line[:, None], self.from_span], axis=1)
        return both / math.sqrt(self.size)

    @property
    def relative(self) -> np.ndarray:
        """The same distances over |x_i|, [n, 4, p]: a relative projection error, after that of
        AMED's authors, who look at the span of two components."""
        return self.distances * math.sqrt(self.size) / _positive(self.norms)[:, None]


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
    of_length = distances.mean(2) * math.sqrt(curves.size) / _positive(curves.length)[:, None]
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


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, 1)


# From a denoiser to curves.


def trace(
    denoiser: Denoiser,
    x_T: Tensor,
    solver: str,
    sigmas: Sequence[float],
    report: Callable[[int], None] = lambda points: None,
) -> tuple[Tensor, Tensor]:
    """Whole trajectories: x and D(x; sigma) at every level, each [b, points, d] on the CPU.

    x_T: the start at sigmas[0], [b, ...]
    sigmas: strictly decreasing, all > 0
    report: called with the number of points done after each

    D costs nothing where the solver evaluates at its accepted states, except at the last.
    Runs in the caller's grad mode.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def watched(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append((x, denoiser(x, sigma)))
        return seen[-1][1]

    def denoised(x: Tensor, sigma: float) -> Tensor:
        known = [output for state, output in seen if state is x]
        return known[0] if known else denoiser(x, x.new_full((len(x),), sigma))

    x = x_T if x_T.dtype == torch.float64 else x_T.float()
    shape = (len(x), len(sigmas), math.prod(x.shape[1:]))
    states, outputs = torch.empty(shape, dtype=x.dtype), torch.empty(shape, dtype=x.dtype)
    states[:, 0] = x.flatten(1)
    for i, state in enumerate(iterate(watched, x, solver, grid=sigmas)):
        outputs[:, i] = denoised(x, sigmas[i]).flatten(1)
        seen.clear()
        x = state.x
        states[:, i + 1] = x.flatten(1)
        report(i + 1)
    outputs[:, -1] = denoised(x, sigmas[-1]).flatten(1)
    report(len(sigmas))
    return states, outputs


@torch.no_grad()
def measure(points: Tensor) -> Curves:
    """The shapes of curves given point by point, [n, p, ...]; the memory it takes is a constant and
    n p^2 numbers."""
    if points.ndim < 3 or points.shape[1] < 2:
        raise ValueError(f"points must be [n, 2 or more, ...], got {list(points.shape)}")
    rows = points.flatten(2)
    n, p, size = rows.shape
    square = torch.zeros(n, p, dtype=torch.float64)
    triangle = torch.zeros(n, p, p, dtype=torch.float64)  # R^T, of the columns so far
    for part in rows.split(COLUMNS, dim=2):
        part = part.double()
        square += part.square().sum(2)
        both = torch.cat([triangle, (part - part[:, -1:]).mT], dim=1)
        triangle = torch.linalg.qr(both, mode="r").R
    return Curves(triangle.mT.numpy(), square.sqrt().numpy(), size)


# The command.


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
    plots: bool = True,
    command: str = "fewstep geometry",
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Geometry:
    """Measure the trajectories of a model; write geometry.json, and the picture and the report.

    model: a name, a folder, or a loaded model
    points: of a trajectory, on a grid that is a name; sigmas are a grid of their own
    solver: of the ODE, by name
    label, prompt, guidance: one for all seeds
    batch: seeds at a time; what keeps their states below 256 MB unless given
    plots: geometry.png, geometry.svg and geometry.html too, which needs matplotlib
    report: called with what is under way, and with the work done and in total, in points

    `out` also keeps the curves, geometry.safetensors, so that a run that was cut short goes on
    after its last batch, and seeds may be added.

    Errors: ValueError for what the model or the solver cannot do, a grid that ends at 0, and an
    `out` that holds a run with other settings; FloatingPointError where the network returns NaN or
    infinity; OSError where `out` cannot be written; all but the second before any work.
    """
    from fewstep.report import geometry as geometry_report

    out, seeds = Path(out), tuple(int(seed) for seed in seeds)
    if not seeds:
        raise ValueError("seeds must name at least one trajectory")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if plots:
        geometry_report.check_matplotlib()
    if get(solver).stochastic:
        raise ValueError(
            f"{solver} is stochastic; a trajectory here is the ODE's, so take another solver"
        )
    loaded = load(model) if isinstance(model, str | Path) else model
    denoiser = loaded.denoiser(label, prompt, guidance)
    sigmas = _levels(denoiser, grid, points)
    settings = {
        **describe(
            loaded, Settings.choose(loaded, solver, grid=sigmas), prompt=prompt, guidance=guidance
        ),
        "label": label,
    }
    check_writable(out)
    store = _Store(out / "geometry.safetensors", settings)
    rows = store.read()
    missing = [seed for seed in seeds if seed not in rows]
    few = seeds[:CHECK_SEEDS]
    most = STATES_BYTES // (8 * len(sigmas) * math.prod(loaded.shape))  # x and D, float32
    size = batch or max(1, min(LARGEST_BATCH, most))
    in_check = 3 * len(sigmas) - 1
    total = len(missing) * len(sigmas) + len(few) * in_check
    done = 0

    def traced(part: Sequence[int], levels: Sequence[float], what: str) -> tuple[Tensor, Tensor]:
        nonlocal done
        begun = done

        def progress(reached: int) -> None:
            report(what, begun + reached * len(part), total)

        curves = trace(denoiser, loaded.prior(part), solver, levels, progress)
        done = begun + len(part) * len(levels)
        _check_finite(curves, part, levels)
        return curves

    for part in _split(missing, size):
        x, denoised = traced(part, sigmas, "trajectories")
        a, b = measure(x), measure(denoised)
        for seed, *row in zip(part, a.points, a.norms, b.points, b.norms, strict=True):
            rows[seed] = row
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
    files = [out / "geometry.json"]
    write_json(files[0], result.to_dict())
    if plots:
        files += geometry_report.write(result, out)
    return replace(result, files=tuple(files))


def _levels(denoiser: Denoiser, grid: str | Sequence[float], points: int) -> tuple[float, ...]:
    if isinstance(grid, str):
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


@dataclass(frozen=True)
class _Store:
    """The curves of the seeds done so far, in one file that is always whole."""

    path: Path
    settings: dict[str, Any]

    NAMES = ("x.points", "x.norms", "denoised.points", "denoised.norms")

    def read(self) -> dict[int, list[np.ndarray]]:
        """By seed, in the order of NAMES. Errors: ValueError where the file is of other settings or
        no file of ours."""
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
    from fewstep.report.demo_page import span

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
