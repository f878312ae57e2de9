"""Samplers side by side on one model: which to use, with numbers that can be made again.

For each solver and budget, the setting (grid, analytic first step, end) is screened on validation
seeds; the chosen one runs on the test seeds. A row of the result has

    error       root mean square distance to the same seed's reference solve, [-1, 1] pixel units
    psnr        10 log10(4 / mean squared error), in dB
    fd          Frechet distance of its pictures to a population of reference solves of the same
                network from other seeds, in each feature network's space
    excess      fd less that of the reference solves of the same seeds: 0 is a perfect sampler
    fd_data     Frechet distance to the statistics of data that come with the feature network

Everything slow is kept in a folder as it is made, under names that have a hash of all that it
depends on: pictures and errors of each run by CHUNK seeds, features of each run. So an interrupted
comparison goes on where it stopped, and a new solver or feature network is added to an old one at
its own cost alone.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fewstep.denoiser import calls_per_eval
from fewstep.evaluate.references import CHUNK, References
from fewstep.evaluate.statistics import Statistics, paired_frechet
from fewstep.files import write_whole
from fewstep.loop import resolve, solve
from fewstep.models import Model
from fewstep.sampling import Settings, describe

__all__ = ["Comparison", "Design", "Judge", "Run", "Workbench", "compare", "machine", "merge"]

FORMAT = "fewstep-comparison/1"
CHECKED = 32  # seeds whose error stands in the row by itself, for a quick recomputation
FINALISTS = 3  # settings that the first round of screening leaves
VALIDATION, POPULATION = 1_000_000, 100_000  # where their seeds start

Report = Callable[[str, int, int], None]


class Judge(Protocol):
    """A feature network as the comparison sees it.

    name: with resize and quantisation
    label: in short
    data: statistics of data in its space, or None
    """

    @property
    def name(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def data(self) -> Statistics | None: ...
    def __call__(self, images: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Design:
    """What is compared, and how the settings are chosen.

    solvers: names, learned solvers' folders, or "auto"
    budgets: evaluations
    seeds: of the test
    label, guidance: the condition, one for all
    grids, firsts, ends: what is screened
    screen: validation seeds of the last round; 0 chooses nothing: the card's or the usual setting
    screen_first: of the first round, which all settings enter
    choose_by: a judge's label, or "error"
    population: reference solves from other seeds that make the target distribution
    resamples: of the bootstrap
    """

    solvers: tuple[str, ...]
    budgets: tuple[int, ...]
    seeds: tuple[int, ...]
    label: int | str | None = None
    guidance: float | None = None
    grids: tuple[str, ...] = ("karras", "log-snr", "time-uniform")
    firsts: tuple[str, ...] = ("none", "zero", "mean")
    ends: tuple[str, ...] = ("sigma_min", "zero")
    screen: int = 1000
    screen_first: int = 128
    choose_by: str = "error"
    population: int = 10_000
    resamples: int = 200

    def __post_init__(self) -> None:
        for name in ("solvers", "budgets", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        if self.screen < 0 or self.screen_first < 1:
            raise ValueError(
                f"screen must be at least 0 and screen_first at least 1, got {self.screen} and "
                f"{self.screen_first}"
            )

    @property
    def validation(self) -> tuple[int, ...]:
        return tuple(range(VALIDATION, VALIDATION + self.screen))

    @property
    def others(self) -> tuple[int, ...]:
        """Seeds of the population."""
        return tuple(range(POPULATION, POPULATION + self.population))


@dataclass(frozen=True, eq=False)
class Run:
    """Pictures of one sampler.

    images: uint8 [n, h, w, c]
    mse: mean squared distance of each to its reference, [n], [-1, 1] pixel units
    seconds: wall time per picture, the median over chunks
    digest: of everything that they depend on
    """

    images: np.ndarray
    mse: np.ndarray
    seconds: float
    digest: str


@dataclass(frozen=True, eq=False)
class Workbench:
    """Runs, features and references of one model under one condition, kept in a folder.

    model: what is sampled, perhaps in another dtype than the references' model
    batch: pictures at a time
    report: called with what is being done, how much of it is done, and how much there is
    """

    model: Model
    references: References
    folder: Path
    batch: int = 50
    report: Report = field(default=lambda what, done, total: None)

    def run(self, settings: Settings, seeds: Sequence[int]) -> Run:
        """Sample the seeds, or read what was sampled before."""
        facts = {
            **describe(self.model, settings, guidance=self.references.guidance),
            "label": self.references.label,
            "reference": self.references.facts(),
        }
        key = _digest(facts)
        name = f"{_slug(str(facts['solver']))}-{settings.nfe}-{key}"
        parts = []
        for start in range(0, len(seeds), CHUNK):
            part = tuple(seeds[start : start + CHUNK])
            path = self.folder / "runs" / name / f"{_digest(part)}.npz"
            found = _read(path, ("images", "mse", "seconds"))
            if found is None:
                found = self._sample(settings, part)
                _write(path, found)
            parts.append(found)
            self.report(f"{facts['solver']} at {settings.nfe}", start + len(part), len(seeds))
        return Run(
            np.concatenate([part["images"] for part in parts]),
            np.concatenate([part["mse"] for part in parts]),
            float(np.median([part["seconds"] for part in parts])),
            _digest((key, tuple(seeds))),
        )

    @torch.inference_mode()
    def _sample(self, settings: Settings, seeds: tuple[int, ...]) -> dict[str, np.ndarray]:
        denoiser = self.model.denoiser(self.references.label, None, self.references.guidance)
        exact = self.references.endpoints(seeds)
        images, mse, seconds = [], [], 0.0
        for start in range(0, len(seeds), self.batch):
            part = seeds[start : start + self.batch]
            begun = time.perf_counter()
            x = solve(denoiser, self.model.prior(part), **settings.arguments(), seeds=part)
            images.append(self.model.decode(x))
            seconds += time.perf_counter() - begun
            to_zero = settings.final or settings.end == "zero"
            gap = x.double().cpu().numpy() - exact[start : start + self.batch, int(to_zero)]
            mse.append(np.square(gap).reshape(len(part), -1).mean(1))
        each = np.concatenate(mse)
        if not np.isfinite(each).all():
            bad = [seed for seed, value in zip(seeds, each, strict=True) if not np.isfinite(value)]
            raise FloatingPointError(
                f"{settings.record()['solver']} at {settings.nfe} evaluations gave NaN or infinity "
                f"for seed {bad[0]}; leave it out, or take another dtype"
            )
        return {
            "images": np.concatenate(images),
            "mse": each,
            "seconds": np.float64(seconds / len(seeds)),
        }

    def features(self, judge: Judge, images: np.ndarray, digest: str) -> np.ndarray:
        """float32 [n, d]; digest: what the pictures are known by."""
        path = self.folder / "features" / _slug(judge.name) / f"{digest}.npz"
        found = _read(path, ("features",))
        if found is None:
            blocks = range(0, len(images), CHUNK)
            found = {"features": np.concatenate([judge(images[i : i + CHUNK]) for i in blocks])}
            _write(path, found)
        return found["features"]

    def exact(self, seeds: Sequence[int], end: int = 0) -> tuple[np.ndarray, str]:
        """Pictures of the reference solves, uint8 [n, h, w, c], and what they are known by."""
        blocks = []
        for part, values in self.references.chunks(seeds):
            blocks.append(self.model.decode(torch.from_numpy(values[:, end])))
            self.report("reference solves", part.stop, len(seeds))
        return np.concatenate(blocks), _digest((self.references.facts(), tuple(seeds), end))

    def population(self, judge: Judge, design: Design) -> Statistics:
        """Statistics of the reference solves from other seeds."""
        path = self.folder / "population"
        key = _digest((self.references.facts(), judge.name, design.population))
        path = path / f"{_slug(judge.name)}-{key}.npz"
        if path.is_file():
            return Statistics.load(path)
        features = self.features(judge, *self.exact(design.others))
        stats = Statistics.of(features, extractor=judge.name)
        stats.save(path)
        return stats


@dataclass(frozen=True)
class Comparison:
    """The result: `record` is JSON-ready; strips has the first pictures of each sampler.

    record: facts once, and "rows", one for each sampler and budget
    strips: names of rows ("" is the exact solution) and pictures uint8 [k, h, w, c]
    """

    record: dict[str, Any]
    strips: dict[str, np.ndarray]


def compare(
    workbench: Workbench, design: Design, judges: Sequence[Judge], *, command: str = ""
) -> Comparison:
    """Screen, run and measure.

    Errors: ValueError where no solver can spend a budget, or choose_by names no judge.
    """
    model = workbench.model
    by_label = {judge.label: judge for judge in judges}
    if design.choose_by != "error" and design.choose_by not in by_label:
        raise ValueError(
            f"choose_by must be error or one of {', '.join(by_label) or 'no feature networks'}, "
            f"got {design.choose_by!r}"
        )
    populations = {judge.label: workbench.population(judge, design) for judge in judges}
    seconds = {
        judge.label: workbench.features(judge, *workbench.exact(design.seeds)) for judge in judges
    }
    rows, strips = [], {"": workbench.exact(design.seeds[:CHUNK])[0][:16]}
    for nfe, solver in itertools.product(design.budgets, design.solvers):
        chosen = _choose(workbench, design, by_label, populations, solver, nfe)
        if chosen is None:
            continue  # a budget that this solver cannot spend
        settings, screened = chosen
        run = workbench.run(settings, design.seeds)
        row = _row(model, solver, settings, run, design)
        row["screened"] = screened
        for judge in judges:
            features = workbench.features(judge, run.images, run.digest)
            row["fd"][judge.label] = paired_frechet(
                features, seconds[judge.label], populations[judge.label], design.resamples
            )
            if judge.data is not None:
                ours = Statistics.of(features, extractor=judge.name)
                row["fd_data"][judge.label] = ours.frechet(judge.data)
        rows.append(row)
        strips[f"{solver}@{nfe}"] = run.images[:16]
    if not rows:
        raise ValueError("none of the solvers can spend any of the budgets")
    floor = {}
    for judge in judges:
        ours = Statistics.of(seconds[judge.label], extractor=judge.name)
        floor[judge.label] = {"fd": ours.frechet(populations[judge.label])}
        if judge.data is not None:
            floor[judge.label]["fd_data"] = ours.frechet(judge.data)
    record = {
        "format": FORMAT,
        "sources": [
            {
                "command": command,
                "made": time.strftime("%Y-%m-%d"),
                "dtype": str(model.dtype).removeprefix("torch."),
                "machine": machine(),
            }
        ],
        "model": {"name": model.card.name, "weights": model.card.weights_sha256},
        "condition": {"label": design.label, "guidance": design.guidance},
        "seeds": _span(design.seeds),
        "pictures": len(design.seeds),
        "references": {
            **workbench.references.facts(),
            "population": _span(design.others),
            "own_error": workbench.references.error(design.seeds[:CHECKED]),
        },
        "screen": {
            "seeds": _span(design.validation) if design.screen else None,
            "first_round": design.screen_first,
            "by": design.choose_by,
            "grids": design.grids,
            "firsts": design.firsts,
            "ends": design.ends,
        },
        "features": {judge.label: judge.name for judge in judges},
        "floor": floor,
        "rows": rows,
    }
    return Comparison(json.loads(json.dumps(record)), strips)


def merge(record: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The rows of both; where both have a sampler at a budget, the first one's.

    Errors: ValueError, with what differs, unless model, seeds, references, condition and feature
    networks are the same: numbers of different protocols do not stand in one table.
    """
    for name in ("format", "model", "condition", "seeds", "references", "floor"):
        ours, theirs = record[name], other.get(name)
        if name == "floor" and isinstance(theirs, dict):
            ours, theirs = sorted(ours), sorted(theirs)
        if name == "references" and isinstance(theirs, dict):
            ours, theirs = ({**one, "own_error": 0} for one in (ours, theirs))
        if ours != theirs:
            raise ValueError(f"the comparisons differ in {name}: {ours} and {theirs}")
    have = {(row["sampler"], row["nfe"]) for row in record["rows"]}
    shift = len(record["sources"])
    more = [
        {**row, "source": row["source"] + shift}
        for row in other["rows"]
        if (row["sampler"], row["nfe"]) not in have
    ]
    used = {row["source"] for row in more}
    sources = [s for i, s in enumerate(other["sources"]) if i + shift in used]
    place = {old: shift + new for new, old in enumerate(sorted(used))}
    more = [{**row, "source": place[row["source"]]} for row in more]
    return {
        **record,
        "sources": record["sources"] + sources,
        "rows": record["rows"] + more,
    }


def _row(model: Model, solver: str, settings: Settings, run: Run, design: Design) -> dict[str, Any]:
    error = np.sqrt(run.mse)
    denoiser = model.denoiser(design.label, None, design.guidance)
    return {
        "sampler": solver,
        **settings.record(),
        "network_calls": settings.nfe * calls_per_eval(denoiser),
        "error": float(error.mean()),
        "error_se": float(error.std(ddof=1) / len(error) ** 0.5) if len(error) > 1 else None,
        "psnr": float(10 * np.log10(4 / max(run.mse.mean(), 1e-30))),
        "check": {"seeds": _span(design.seeds[:CHECKED]), "error": float(error[:CHECKED].mean())},
        "seconds": run.seconds,
        "source": 0,
        "fd": {},
        "fd_data": {},
    }


def _choose(
    workbench: Workbench,
    design: Design,
    judges: dict[str, Judge],
    populations: dict[str, Statistics],
    solver: str,
    nfe: int,
) -> tuple[Settings, dict[str, Any] | None] | None:
    """The setting of a solver at a budget, and how it was chosen; None where it cannot spend it."""
    candidates = list(_candidates(workbench.model, design, solver, nfe))
    if not candidates:
        return None
    if design.screen == 0 or len(candidates) == 1:
        return candidates[0], None

    def score(settings: Settings, seeds: Sequence[int]) -> float:
        run = workbench.run(settings, seeds)
        if design.choose_by == "error":
            return float(np.sqrt(run.mse).mean())
        judge = judges[design.choose_by]
        features = workbench.features(judge, run.images, run.digest)
        return Statistics.of(features, extractor=judge.name).frechet(populations[judge.label])

    few = design.validation[: design.screen_first]
    scored = sorted((score(one, few), i) for i, one in enumerate(candidates))
    if len(few) < design.screen:
        finalists = [i for _, i in scored[:FINALISTS]]
        scored = sorted((score(candidates[i], design.validation), i) for i in finalists)
    best, i = scored[0]
    return candidates[i], {"score": best, "of": len(candidates)}


def _candidates(model: Model, design: Design, solver: str, nfe: int) -> Iterator[Settings]:
    """The settings that fit; one where nothing is left to choose."""
    if solver == "auto" or design.screen == 0 or os.path.isdir(solver):
        yield Settings.choose(model, solver, nfe)
        return
    for grid, first, end in itertools.product(design.grids, design.firsts, design.ends):
        settings = Settings.choose(model, solver, nfe, grid, first, False, end=end)
        try:
            resolve(settings.solver, nfe, grid, first, False, end=end)
        except ValueError:  # a budget that it cannot spend so, or an SDE with an analytic start
            continue
        yield settings


def machine() -> dict[str, Any]:
    """What it ran on, for the record."""
    name = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = (re.findall(r"model name\s*:\s*(.+)", text) or [name])[0]
    except OSError:
        pass
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _span(seeds: Sequence[int]) -> str:
    """Seeds as text: 0-4999, or a list with commas."""
    if seeds and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60]


def _read(path: Path, names: Sequence[str]) -> dict[str, np.ndarray] | None:
    """Arrays of a file, or None where it is not there or not whole."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError):
        return None


def _write(path: Path, arrays: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_whole(path, buffer.getvalue())
