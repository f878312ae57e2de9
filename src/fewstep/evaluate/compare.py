"""Samplers side by side on one model: which to use, with numbers that can be made again.

For each solver and budget, the setting (grid, analytic first step, end) is screened on validation
seeds; the chosen one runs on the test seeds. A row of the result has

    error       root mean square distance to the same seed's reference solve, [-1, 1] pixel units
    psnr        10 log10(4 / mean squared error), in dB
    fd          Frechet distance of its pictures to a population of reference solves of the same
                network from other seeds, in each feature network's space
    excess      fd less that of the reference solves of the same seeds: 0 is a perfect sampler
    fd_data     Frechet distance to the statistics of data that come with the feature network
    seconds     wall time per picture, sampling and decoding, of one batch; median of ROUNDS rounds
                in which every row has its turn, so that all are taken in the same minutes

A student, distilled from the model, is one more sampler: it runs by its own network, and is held to
the references and the population of its teacher.

Everything slow is kept in a folder as it is made, under names that have a hash of all that it
depends on: pictures and errors of each run by CHUNK seeds, features of each run. So an interrupted
comparison goes on where it stopped, and a new solver or feature network is added to an old one at
its own cost; only the times of all rows are taken again. Evaluations that samplers share are kept
in memory.
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
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fewstep.denoiser import calls_per_eval
from fewstep.evaluate.memo import Memo, Remembering
from fewstep.evaluate.references import CHUNK, References
from fewstep.evaluate.statistics import Statistics, paired_frechet
from fewstep.files import write_whole
from fewstep.grid import GRIDS
from fewstep.loop import finish
from fewstep.models import Model, is_model, load, read_card
from fewstep.models.card import POPULATION_FOLDER
from fewstep.plan import Program
from fewstep.sampling.choose import choose, describe, draws_noise, locate
from fewstep.sampling.settings import Filled, Settings
from fewstep.solver import AFS, ENDS, Solver
from fewstep.solver.registry import MOST_EVALUATIONS
from fewstep.solving import resolve

__all__ = [
    "Comparison",
    "Design",
    "Judge",
    "Run",
    "Workbench",
    "check_protocol",
    "check_solvers",
    "compare",
    "load_students",
    "machine",
    "merge",
    "protocol",
    "read_comparison",
]

FORMAT = "fewstep-comparison/1"
CHECKED = 32  # seeds whose error stands in the row by itself, for a quick recomputation
SHOWN = 16  # pictures of each sampler that are kept for the report
ROUNDS = 3  # of timing
FINALISTS = 2  # settings that the first round of screening leaves
VALIDATION, POPULATION = 1_000_000, 100_000  # where their seeds start
STUDENT_SAMPLERS = ("consistency", "consistency-ode")  # what is screened for a student

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

    solvers: names, learned solvers' folders or those with one for each budget, "auto", or students
        of the model
    budgets: evaluations
    seeds: of the test
    label, guidance: the condition, one for all
    grids, afs, ends: what is screened
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
    afs: tuple[str, ...] = ("none", "zero", "mean")
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
        for nfe in self.budgets:
            if not 1 <= nfe <= MOST_EVALUATIONS:
                raise ValueError(f"budgets must be from 1 to {MOST_EVALUATIONS}, got {nfe}")
        for name, have in (("grids", GRIDS), ("afs", AFS), ("ends", ENDS)):
            unknown = [one for one in getattr(self, name) if one not in have]
            if unknown or not getattr(self, name):
                got = unknown[0] if unknown else "none"
                raise ValueError(f"{name} must be among {', '.join(have)}, got {got}")
        for name, kept in (("validation", self.validation), ("population", self.others)):
            shared = set(self.seeds) & set(kept)
            if shared:
                raise ValueError(
                    f"seeds {kept[0]} to {kept[-1]} are kept for {name}, got {min(shared)} as a "
                    "test seed; take others"
                )
        if len(self.others) > VALIDATION - POPULATION and self.screen:
            raise ValueError(
                f"population must be at most {VALIDATION - POPULATION}, got {self.population}"
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

    def denoiser(self) -> Any:
        """D of the model under the comparison's condition."""
        return self.model.denoiser(self.references.label, None, self.guidance)

    def run(self, settings: Filled, seeds: Sequence[int]) -> Run:
        """Sample the seeds, or read what was sampled before."""
        facts = {
            **describe(self.model, settings, guidance=self.guidance),
            "label": self.references.label,
            "reference": self.references.facts(),
        }
        key = _digest(facts)
        name = f"{_slug(str(facts['solver']))}-{settings.nfe}-{key}"
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
        network = f"{self.model.card.weights_sha256} {self.model.dtype}"
        denoiser = Remembering(self.denoiser(), self.memo, network)
        program = resolve(settings, denoiser)
        to_zero = settings.final or program.sigmas[-1] == 0
        exact = self.references.endpoints(seeds)
        images, mse = [], []
        for start in range(0, len(seeds), self.batch):
            part = seeds[start : start + self.batch]
            x, pictures = self._batch(denoiser, program, part)
            images.append(pictures)
            gap = x.double().cpu().numpy() - exact[start : start + self.batch, int(to_zero)]
            mse.append(np.square(gap).reshape(len(part), -1).mean(1))
        return {"images": np.concatenate(images), "mse": np.concatenate(mse)}

    @torch.inference_mode()
    def seconds(self, settings: Filled, seeds: Sequence[int]) -> float:
        """Wall time per picture of the seeds in one batch."""
        denoiser = self.denoiser()
        begun = time.perf_counter()
        self._batch(denoiser, resolve(settings, denoiser), tuple(seeds))
        return (time.perf_counter() - begun) / len(seeds)

    def _batch(
        self, denoiser: Any, program: Program, seeds: tuple[int, ...]
    ) -> tuple[torch.Tensor, np.ndarray]:
        """Endpoints and their pictures. Errors: FloatingPointError, naming the seed."""
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
        """Statistics of the reference solves from other seeds: from a file in the folder, or those
        that come with the model where they are of just these, or made now."""
        key = _digest((self.references.facts(), judge.name, design.population))
        name = Path(POPULATION_FOLDER) / f"{_slug(judge.name)}-{key}.npz"
        path, beside = self.folder / name, self.references.model.card.folder
        for known in (path, *([beside / name] if beside else [])):
            if known.is_file():
                return Statistics.load(known)
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

    A budget that a solver cannot spend is left out, and the record says why.
    Errors: ValueError, before any work, where no solver can spend any budget, choose_by names no
    judge, a solver is not known, or there are too few seeds for a distance.
    """
    by_label = {judge.label: judge for judge in judges}
    if how := workbench.model.card.distilled:
        raise ValueError(
            f"{workbench.model.card.name} is a student of {how.teacher}, which it is held to; "
            f"name it beside solvers: fewstep compare {how.teacher} --solvers dpmpp-2m,FOLDER"
        )
    if design.choose_by != "error" and design.choose_by not in by_label:
        raise ValueError(
            f"choose_by must be error or one of {', '.join(by_label) or 'no feature networks'}, "
            f"got {design.choose_by!r}"
        )
    if judges and min(len(design.seeds), design.population) < 2:
        raise ValueError("a distance needs at least 2 seeds and a population of 2, got 1")
    candidates, left_out = _all_candidates(workbench, design)
    populations = {judge.label: workbench.population(judge, design) for judge in judges}
    exact = {
        judge.label: workbench.features(judge, *workbench.exact(design.seeds)) for judge in judges
    }
    rows, ran, strips = [], [], {"": workbench.exact(design.seeds[:CHUNK])[0][:SHOWN]}
    for (nfe, solver), settings in candidates.items():
        own = workbench.of(solver)
        chosen, screened = _choose(own, design, by_label, settings)
        run = own.run(chosen, design.seeds)
        row = _row(own, solver, chosen, run, design)
        row["screened"] = screened
        for judge in judges:
            features = workbench.features(judge, run.images, run.digest)
            row["fd"][judge.label] = paired_frechet(
                features, exact[judge.label], populations[judge.label], design.resamples
            )
            if judge.data is not None:
                ours = Statistics.of(features, extractor=judge.name)
                row["fd_data"][judge.label] = ours.frechet(judge.data)
        rows.append(row)
        ran.append((own, chosen))
        strips[f"{solver}@{nfe}"] = run.images[:SHOWN]
    for row, spent in zip(rows, _times(ran, design.seeds[: workbench.batch]), strict=True):
        row["seconds"] = spent
    floor = {}
    for judge in judges:
        ours = Statistics.of(exact[judge.label], extractor=judge.name)
        floor[judge.label] = {"fd": ours.frechet(populations[judge.label])}
        if judge.data is not None:
            floor[judge.label]["fd_data"] = ours.frechet(judge.data)
    source = {
        "command": command,
        "made": time.strftime("%Y-%m-%d"),
        "dtype": str(workbench.model.dtype).removeprefix("torch."),
        "machine": machine(),
    }
    record = {**protocol(workbench, design, judges), "sources": [source], "floor": floor}
    own_error = workbench.references.error(design.seeds[:CHECKED])
    record["references"]["own_error"] = own_error
    record |= {"left_out": left_out, "rows": rows}
    return Comparison(json.loads(json.dumps(record)), strips)


def load_students(model: Model, solvers: Sequence[str], **options: Any) -> dict[str, Model]:
    """Those of the solvers that are models, by the name given: students of this one.

    options: of `load`
    Errors: ValueError for a model that was not distilled from this one, weights and all.
    """
    students = {}
    for name in solvers:
        if not is_model(name):
            continue
        how = read_card(name).distilled
        if how is None or how.teacher_weights != model.card.weights_sha256:
            what = f"distilled from {how.teacher}" if how else "no student"
            raise ValueError(
                f"{name} is {what}, so it has no place beside samplers of {model.card.name} "
                f"({model.card.weights_sha256[:8]}); compare it on the weights that it came from"
            )
        students[name] = load(name, **options)
    return students


def protocol(workbench: Workbench, design: Design, judges: Sequence[Judge]) -> dict[str, Any]:
    """What every number of a comparison depends on, known before any work, JSON-ready."""
    card = workbench.model.card
    record = {
        "format": FORMAT,
        "model": {"name": card.name, "weights": card.weights_sha256},
        "condition": {"label": design.label, "guidance": design.guidance},
        "seeds": _span(design.seeds),
        "pictures": len(design.seeds),
        "references": {**workbench.references.facts(), "population": _span(design.others)},
        "screen": {
            "seeds": _span(design.validation) if design.screen else None,
            "first_round": design.screen_first,
            "by": design.choose_by,
            "grids": design.grids,
            "afs": design.afs,
            "ends": design.ends,
        },
        "features": {judge.label: judge.name for judge in judges},
    }
    return json.loads(json.dumps(record))


def check_protocol(record: dict[str, Any], other: dict[str, Any]) -> None:
    """Numbers of different protocols do not stand in one table.

    Errors: ValueError, with what differs, unless model, condition, seeds, references, feature
    networks and, where both chose settings, the choice are the same.
    """
    for name in ("format", "model", "condition", "seeds", "references", "features", "screen"):
        ours, theirs = record.get(name), other.get(name)
        if name == "screen" and not (ours and theirs and ours["seeds"] and theirs["seeds"]):
            continue
        if isinstance(ours, dict) and isinstance(theirs, dict):
            keys = (ours.keys() | theirs.keys()) - {"own_error"}
            apart = sorted(key for key in keys if ours.get(key) != theirs.get(key))
            ours, theirs = ({key: one.get(key) for key in apart} for one in (ours, theirs))
        if ours != theirs:
            raise ValueError(
                f"the comparisons differ in {name}: {ours} and {theirs}; run both alike"
            )


def read_comparison(path: Path) -> dict[str, Any]:
    """The record of a comparison.json. Errors: ValueError where it is something else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] == FORMAT and record["rows"]:
            return record
        found = repr(record["format"])
    except (KeyError, TypeError, ValueError, RecursionError):
        found = "something else"
    raise ValueError(f"{path} is not a comparison: need format {FORMAT!r} with rows, got {found}")


def merge(record: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The rows of both; where both have a sampler at a budget, the first one's.

    Errors: as `check_protocol`.
    """
    check_protocol(record, other)
    have = {(row["sampler"], row["nfe"]) for row in record["rows"]}
    more = [row for row in other["rows"] if (row["sampler"], row["nfe"]) not in have]
    used = sorted({row["source"] for row in more})
    place = {source: len(record["sources"]) + i for i, source in enumerate(used)}
    rows = record["rows"] + [{**row, "source": place[row["source"]]} for row in more]
    done = {f"{row['sampler']}@{row['nfe']}" for row in rows}
    left_out = {**other.get("left_out", {}), **record.get("left_out", {})}
    return {
        **record,
        "screen": record["screen"] if record["screen"]["seeds"] else other["screen"],
        "sources": record["sources"] + [other["sources"][source] for source in used],
        "left_out": {name: why for name, why in left_out.items() if name not in done},
        "rows": rows,
    }


def _row(
    workbench: Workbench, solver: str, settings: Filled, run: Run, design: Design
) -> dict[str, Any]:
    error = np.sqrt(run.mse)
    denoiser, card = workbench.denoiser(), workbench.model.card
    recipe = card.about.get("recipe", {})
    how = asdict(card.distilled) if card.distilled else {}
    student = {**how, "weights": card.weights_sha256, "recipe": recipe}
    return {
        "sampler": solver,
        **({"student": student} if solver in workbench.students else {}),
        **settings.record(),
        "stochastic": draws_noise(settings),
        "network_calls": settings.nfe * calls_per_eval(denoiser),
        "error": float(error.mean()),
        "error_se": float(error.std(ddof=1) / len(error) ** 0.5) if len(error) > 1 else None,
        "psnr": float(10 * np.log10(4 / max(run.mse.mean(), 1e-30))),
        "check": {"seeds": _span(design.seeds[:CHECKED]), "error": float(error[:CHECKED].mean())},
        "source": 0,
        "fd": {},
        "fd_data": {},
    }


def _times(ran: Sequence[tuple[Workbench, Filled]], seeds: Sequence[int]) -> list[float]:
    """Seconds per picture of each, the median over rounds that go through all of them."""
    taken = []
    for i, (workbench, settings) in enumerate([*ran] * ROUNDS):
        taken.append(workbench.seconds(settings, seeds))
        workbench.report("times", i + 1, ROUNDS * len(ran))
    return np.median(np.reshape(taken, (ROUNDS, len(ran))), axis=0).tolist()


def _choose(
    workbench: Workbench,
    design: Design,
    judges: dict[str, Judge],
    candidates: Sequence[Filled],
) -> tuple[Filled, dict[str, Any] | None]:
    """The best of the settings on the validation seeds, and how it was chosen.

    By a distance, a setting's pictures are compared with the exact solutions of the same seeds: the
    scatter of the seeds, which a population would add, cancels. Not so for fresh noise: where a
    candidate draws it, all are compared with the population, or those without it would have the
    better of it.
    """
    if len(candidates) == 1:
        return candidates[0], None
    fresh = any(draws_noise(one) for one in candidates)

    def score(settings: Filled, seeds: Sequence[int]) -> float:
        run = workbench.run(settings, seeds)
        if design.choose_by == "error":
            return float(np.sqrt(run.mse).mean())
        judge = judges[design.choose_by]
        features = workbench.features(judge, run.images, run.digest)
        ours = Statistics.of(features, extractor=judge.name)
        if fresh:
            return ours.frechet(workbench.population(judge, design))
        exact = workbench.features(judge, *workbench.exact(seeds))
        return ours.frechet(Statistics.of(exact, extractor=judge.name))

    few = design.validation[: design.screen_first]
    scored = sorted((score(one, few), i) for i, one in enumerate(candidates))
    if len(few) < design.screen:
        finalists = [i for _, i in scored[:FINALISTS]]
        scored = sorted((score(candidates[i], design.validation), i) for i in finalists)
    best, i = scored[0]
    return candidates[i], {"score": best, "of": len(candidates)}


def _all_candidates(
    workbench: Workbench, design: Design
) -> tuple[dict[tuple[int, str], list[Filled]], dict[str, str]]:
    """The settings to choose from for each budget and solver, and the reasons of those that have
    none."""
    check_solvers(workbench.model, design, workbench.students)
    candidates, left_out = {}, {}
    for nfe, solver in itertools.product(design.budgets, design.solvers):
        fit, why = _candidates(workbench.of(solver), design, solver, nfe)
        if fit:
            candidates[nfe, solver] = fit
        else:
            left_out[f"{solver}@{nfe}"] = why
    if not candidates:
        reason = next(iter(left_out.values()))
        raise ValueError(f"none of the solvers can spend any of the budgets: {reason}")
    return candidates, left_out


def check_solvers(model: Model, design: Design, students: Collection[str] = ()) -> None:
    """Errors: ValueError for a solver that is not there for any of the budgets."""
    for solver in set(design.solvers) - {"auto", *students}:
        problems = []
        for nfe in design.budgets:
            try:
                locate(model, solver, nfe)
            except ValueError as error:
                problems.append(error)
        if len(problems) == len(design.budgets):
            raise problems[0]


def _candidates(
    workbench: Workbench, design: Design, solver: str, nfe: int
) -> tuple[list[Filled], str]:
    """The settings that fit, and why the first of the others does not. "auto" and learned solvers
    leave nothing to choose; of a student it is its sampler, where there is more than one level and
    a distance to choose by, for the error is none with fresh noise."""
    model = workbench.model
    if solver in workbench.students:
        choice = design.screen > 0 and nfe > 1 and design.choose_by != "error"
        samplers = STUDENT_SAMPLERS if choice else ("auto",)
        built_in = model.card.built_in_guidance
        if design.label is not None and built_in not in (None, design.guidance):
            return [], f"{solver} has guidance {built_in:g} built in, not {design.guidance}"
        try:
            workbench.denoiser()
            return [choose(model, Settings(sampler, nfe)) for sampler in samplers], ""
        except ValueError as error:
            return [], str(error)
    try:
        free = solver != "auto" and isinstance(locate(model, solver, nfe), Solver)
    except ValueError as error:
        return [], str(error)
    free = free and design.screen > 0
    choices = itertools.product(design.grids, design.afs, design.ends)
    denoiser = workbench.denoiser()
    fit, why = [], ""
    for grid, afs, end in choices if free else [(None, None, None)]:
        try:
            settings = choose(model, Settings(solver, nfe, grid, afs, end=end))
            resolve(settings, denoiser)
        except ValueError as error:
            why = why or str(error)
            continue
        if settings.afs == "mean" and getattr(denoiser, "far_mean", None) is None:
            why = why or "the model has no mean for the analytic first step"
            continue
        fit.append(settings)
    return fit, why


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
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(path: Path, arrays: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_whole(path, buffer.getvalue())
