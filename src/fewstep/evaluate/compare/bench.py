"""Runs, features and references of one model, each kept in a folder as it is made."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fewstep.data.archives import read_arrays
from fewstep.evaluate.compare.design import Design
from fewstep.evaluate.memo import Memo, Remembering
from fewstep.evaluate.references import CHUNK, References
from fewstep.evaluate.statistics import Statistics
from fewstep.files import write_whole
from fewstep.grid import GRIDS
from fewstep.loop import finish
from fewstep.models import Model
from fewstep.models.card import POPULATION_FOLDER
from fewstep.models.labels import by_seed
from fewstep.models.students import phased
from fewstep.plan import Program
from fewstep.sampling.choose import describe, identify
from fewstep.sampling.settings import Filled
from fewstep.solving import resolve
from fewstep.text import slug

__all__ = ["Judge", "Run", "Workbench"]

OWN_TIME = ("discrete", "trailing")  # grids of networks that have a time of their own

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


@dataclass(frozen=True, eq=False)
class Run:
    """Pictures of one sampler.

    images: uint8 [n, h, w, c]
    mse: mean squared distance of each to its reference, [n], [-1, 1] pixel units
    digest: of everything that they depend on
    """

    images: np.ndarray
    mse: np.ndarray
    digest: str


@dataclass(frozen=True, eq=False)
class Workbench:
    """Runs, features and references of one model under one condition, kept in a folder.

    model: what is sampled, perhaps in another dtype than the references' model
    batch: pictures at a time
    report: called with what is being done, how much of it is done, and how much there is
    students: those of the design's solvers that are models, as `load_students` returns them
    memo: evaluations that samplers share
    """

    model: Model
    references: References
    folder: Path
    batch: int = 50
    report: Report = field(default=lambda what, done, total: None)
    students: Mapping[str, Model] = field(default_factory=dict)
    memo: Memo = field(default_factory=Memo)

    def of(self, solver: str) -> Workbench:
        """The one that runs this solver: itself, or the same with a student for its model."""
        return replace(self, model=self.students.get(solver, self.model))

    @property
    def guidance(self) -> float | None:
        """The scale that the model is sampled at; a student may have it built in."""
        scale = self.references.guidance
        return None if self.model.card.built_in_guidance == scale else scale

    @cached_property
    def bound(self) -> Callable[[Sequence[int]], Any]:
        """From seeds to D of the model under the comparison's condition."""
        given = self.references
        return by_seed(self.model, given.label, given.prompt, self.guidance)

    def denoiser(self) -> Any:
        """That of the first seed, which tells of what all have in common."""
        return self.bound([0])

    def grids(self, design: Design) -> tuple[str, ...]:
        """Those that are screened: the design's, or all that the model has."""
        schedule = getattr(self.denoiser(), "schedule", None)
        own = schedule is not None and schedule.own_time
        return design.grids or tuple(name for name in GRIDS if own or name not in OWN_TIME)

    def at(self, nfe: int) -> Workbench:
        """The one for a budget: its model, where that is a student, is told the segments."""
        return replace(self, model=phased(self.model, nfe))

    def run(self, settings: Filled, seeds: Sequence[int]) -> Run:
        """Sample the seeds, or read what was sampled before."""
        return self.at(settings.nfe)._run(settings, seeds)

    def _run(self, settings: Filled, seeds: Sequence[int]) -> Run:
        facts = {
            **describe(self.model, settings, prompt=self.references.said, guidance=self.guidance),
            **identify(self.model),
            "label": self.references.label,
            "reference": self.references.facts(),
        }
        key = _digest(facts)
        name = f"{slug(str(facts['solver']))}-{settings.nfe}-{key}"
        parts = []
        for start in range(0, len(seeds), CHUNK):
            part = tuple(seeds[start : start + CHUNK])
            path = self.folder / "runs" / name / f"{_digest(part)}.npz"
            found = _read(path, ("images", "mse"))
            if found is None:
                found = self._sample(settings, part)
                _write(path, found)
            parts.append(found)
            self.report(f"{facts['solver']} at {settings.nfe}", start + len(part), len(seeds))
        return Run(
            np.concatenate([part["images"] for part in parts]),
            np.concatenate([part["mse"] for part in parts]),
            _digest((key, tuple(seeds))),
        )

    @torch.inference_mode()
    def _sample(self, settings: Filled, seeds: tuple[int, ...]) -> dict[str, np.ndarray]:
        told = getattr(self.model, "phases", None)  # of which its first evaluation depends
        network = f"{self.model.card.weights_sha256} {self.model.dtype} {told}"
        program = resolve(settings, self.denoiser())
        to_zero = settings.final or program.sigmas[-1] == 0
        exact = self.references.endpoints(seeds)
        images, mse = [], []
        for start in range(0, len(seeds), self.batch):
            part = seeds[start : start + self.batch]
            denoiser = Remembering(self.bound(part), self.memo, network)
            x, pictures = self._batch(denoiser, program, part)
            images.append(pictures)
            gap = x.double().cpu().numpy() - exact[start : start + self.batch, int(to_zero)]
            mse.append(np.square(gap).reshape(len(part), -1).mean(1))
        return {"images": np.concatenate(images), "mse": np.concatenate(mse)}

    @torch.inference_mode()
    def seconds(self, settings: Filled, seeds: Sequence[int]) -> float:
        """Wall time per picture of the seeds in one batch."""
        bench = self.at(settings.nfe)
        denoiser = bench.bound(seeds)
        begun = time.perf_counter()
        bench._batch(denoiser, resolve(settings, denoiser), tuple(seeds))
        return (time.perf_counter() - begun) / len(seeds)

    def _batch(
        self, denoiser: Any, program: Program, seeds: tuple[int, ...]
    ) -> tuple[torch.Tensor, np.ndarray]:
        """Endpoints and their pictures.

        Raises:
            FloatingPointError: naming the seed.
        """
        x = finish(program, denoiser, self.model.prior(seeds), seeds)
        finite = torch.isfinite(x).flatten(1).all(1)
        if not finite.all():
            raise FloatingPointError(
                f"{program.name} at {program.evaluations} evaluations gave NaN or "
                f"infinity for seed {seeds[int(finite.int().argmin())]}; leave it out, or take "
                "another dtype"
            )
        return x, self.model.decode(x)

    def features(self, judge: Judge, images: np.ndarray, digest: str) -> np.ndarray:
        """float32 [n, d]; digest: what the pictures are known by."""
        path = self.folder / "features" / slug(judge.name) / f"{digest}.npz"
        found = _read(path, ("features",))
        if found is None:
            blocks = range(0, len(images), CHUNK)
            found = {"features": np.concatenate([judge(images[i : i + CHUNK]) for i in blocks])}
            _write(path, found)
        return found["features"]

    def features_at(self, judge: Judge, digest: str) -> Callable[[], np.ndarray]:
        """Reads features that were taken before."""
        path = self.folder / "features" / slug(judge.name) / f"{digest}.npz"
        return lambda: read_arrays(path, ("features",))["features"]

    def exact(self, seeds: Sequence[int], end: int = 0) -> tuple[np.ndarray, str]:
        """Pictures of the reference solves, uint8 [n, h, w, c], and what they are known by."""
        blocks = []
        for part, values in self.references.chunks(seeds):
            blocks.append(self.model.decode(torch.from_numpy(values[:, end])))
            self.report("reference solves", part.stop, len(seeds))
        return np.concatenate(blocks), _digest((self.references.facts(), tuple(seeds), end))

    def population(self, judge: Judge, design: Design) -> Statistics:
        """Statistics of the reference solves from other seeds: from a file in the folder, or those
        that come with the model where they are of just these, or made now."""
        for known in self._population_files(judge, design):
            if known.is_file():
                return Statistics.load(known)
        features = self.features(judge, *self.exact(design.others))
        stats = Statistics.of(features, extractor=judge.name)
        stats.save(self._population_files(judge, design)[0])
        return stats

    def has_population(self, judge: Judge, design: Design) -> bool:
        """Whether its statistics are in a file already."""
        return any(path.is_file() for path in self._population_files(judge, design))

    def _population_files(self, judge: Judge, design: Design) -> list[Path]:
        key = _digest((self.references.facts(), judge.name, design.population))
        name = Path(POPULATION_FOLDER) / f"{slug(judge.name)}-{key}.npz"
        beside = self.references.model.card.folder
        return [self.folder / name, *([beside / name] if beside else [])]

    def forecast(self, design: Design, judges: Sequence[Judge]) -> str:
        """What has to be solved for the population and how long that takes; "" where nothing has.

        The time is from one evaluation of one batch, made now.
        """
        made = [self.has_population(judge, design) for judge in judges]
        missing = 0 if all(made) else self.references.missing(design.others)
        if not missing:
            return ""
        how = self.references.how
        seconds = missing * how.nfe * self.references.seconds_per_evaluation()
        time_words = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
        return (
            f"no statistics of a population of {design.population:,} are stored: {missing:,} "
            f"reference solves of {how.nfe} evaluations come first, about {time_words} here; "
            "they are kept"
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path, names: Sequence[str]) -> dict[str, np.ndarray] | None:
    """Arrays of a file, or None where it is not there or not whole."""
    try:
        found = read_arrays(path, names)
    except (OSError, ValueError):
        return None
    return found if set(found) == set(names) else None


def _write(path: Path, arrays: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_whole(path, buffer.getvalue())
