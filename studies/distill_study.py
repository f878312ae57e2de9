"""The study of distillation: SPLAM by each rule, LCM, both in segments with a loss in features, and
trajectories, on equal data, steps and search.

    search    each method at three learning rates and further where the best is at an end, a quarter
              of the pictures
    final     the two best of these, whole, with training seed 0, for the best at a quarter need not
              be the best for the whole; the better on the validation seeds is the method's rate
    train     each method at its rate, with three training seeds, of which the final is the first
    ablate    SPLAM with one thing changed, a quarter of the pictures
    measure   all of these and the solvers of the frozen network, in two comparisons: each student's
              sampler and each solver's setting are chosen on validation seeds

    python -m studies.distill_study --data FOLDER --out study --pictures 2000000 --device cuda
    python -m studies.distill_study --data FOLDER --out study --only 'search,lcm-*'
    python -m studies.distill_study --data FOLDER --out study --set batch=64 substeps=3

Each run has a folder of its own in OUT/runs and resumes there, so the same command goes on after a
stop, and machines may share the work by --only (stages, or names of runs with wildcards). What is
done and what is left is printed first; --status prints it and ends. OUT/students/comparison.json
and OUT/ablations/comparison.json are what `make results` takes; a run that failed is named there.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from pydantic import TypeAdapter
from safetensors import safe_open

import fewstep
from fewstep.cli.work import resumable
from fewstep.data.training import read_data
from fewstep.distillation import Recipe
from fewstep.evaluate.compare import read_comparison
from fewstep.files import write_json
from fewstep.models import read_card
from fewstep.report import terminal as show
from fewstep.report.tables import seeds_table, short_names, training_seed
from fewstep.text import clean
from studies.commands import at_least, ended, positive, run, stop_after

METHODS: dict[str, dict[str, Any]] = {
    "splam": {},  # the linear rule, told the level
    "splam-variance": {"rule": "variance"},
    "lcm": {"method": "lcm"},
    "splam-phases": {"phases": (1, 2, 4, 8), "loss": "fashion-a"},
    "lcm-phases": {"method": "lcm", "phases": (1, 2, 4, 8), "loss": "fashion-a"},
    "trajectory": {"method": "trajectory", "phases": (1, 2, 4, 8), "loss": "fashion-a"},
}
RATES = (1e-4, 3e-4, 1e-3)
# by name: the method whose best rate of the search it takes, and what is changed; that search is
# what they are compared with
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gamma-linear": ("splam", {"tell": "gamma", "rule": "linear"}),
    "gamma-variance": ("splam", {"tell": "gamma", "rule": "variance"}),  # told as published
    "gamma-one-never": ("splam", {"gamma_one": 0.0}),
    "gamma-one-quarter": ("splam", {"gamma_one": 0.25}),
    "loss-l2": ("splam", {"loss": "l2"}),
    "teacher-ddim": ("splam", {"teacher": "ddim", "substeps": 1, "points": 18}),
    "teacher-ddim-2": ("splam", {"teacher": "ddim"}),
}
PART = 4  # of the pictures, for search and ablations
FARTHER = 2  # learning rates beyond an end of RATES
FINALISTS = 2  # learning rates that the search leaves
BUDGETS = "1,2,4,8"
FREE = (
    "ddim,heun,dpm-solver-2,dpmpp-2m,dpmpp-3m,unipc-2,unipc-3,deis-2,deis-3,ipndm-2,ipndm-3,ipndm-4"
)
QUARTERS = ("search", "ablate")  # stages
FAILED = "failed.json"
# fields of the recipe that the study sets
OWN = ("method", "tell", "rule", "gamma_one", "phases", "loss", "pictures", "lr", "seed")


@dataclass(frozen=True)
class Job:
    """One training run."""

    stage: str
    name: str
    folder: Path
    settings: dict[str, Any] = field(repr=False)

    @property
    def steps(self) -> int:
        return Recipe(**self.settings).total_steps

    @property
    def ended(self) -> bool:
        """Errors: ValueError where what has ended there was another run."""
        if self.failed:
            found = json.loads((self.folder / FAILED).read_text())["recipe"]
        elif (self.folder / "card.json").is_file():
            found = read_card(self.folder).about["recipe"]
        else:
            return False
        if self.settings.get("lr") is not None:
            ours = json.loads(json.dumps(asdict(Recipe(**self.settings))))
            apart = [n for n in ours if n != "accumulate" and ours[n] != found.get(n)]
            if apart:
                words = ", ".join(f"{name}={found.get(name)}, now {ours[name]}" for name in apart)
                raise ValueError(f"{self.folder} is of another study ({words}); give another --out")
        return True

    @property
    def failed(self) -> bool:
        return (self.folder / FAILED).is_file()

    @property
    def step(self) -> int:
        """Of its checkpoint; 0 without one."""
        path = self.folder / "checkpoint.safetensors"
        if not path.is_file():
            return 0
        with safe_open(path, "pt") as file:
            return int(file.metadata()["step"])

    @property
    def score(self) -> float:
        """Geometric mean over 1, 2 and 4 evaluations of the validation's Frechet distance, or of
        its error where there is none, by the better sampler of each; infinity where it failed."""
        if self.failed:
            return math.inf
        last = json.loads((self.folder / "log.jsonl").read_text().splitlines()[-1])
        kind = "fd" if "fd_1" in last else "rmse"
        best = [
            min(last[key] for key in (f"{kind}_{nfe}", f"{kind}_ode_{nfe}") if key in last)
            for nfe in (1, 2, 4)
            if f"{kind}_{nfe}" in last
        ]
        return math.exp(sum(map(math.log, best)) / len(best))

    def status(self) -> str:
        if self.failed:
            return json.loads((self.folder / FAILED).read_text())["reason"]
        if self.ended:
            return f"done, {self.score:.4g} on the validation seeds"
        return f"step {self.step} of {self.steps}" if self.step else f"{self.steps} steps left"


@dataclass(frozen=True)
class Study:
    """All runs of the study, in their order.

    common: settings of every run
    """

    out: Path
    pictures: int
    training_seeds: int
    common: dict[str, Any]

    def job(self, stage: str, name: str, pictures: int, **settings: Any) -> Job:
        return Job(
            stage,
            name,
            self.out / "runs" / name,
            {"seed": 0, **self.common, "pictures": max(1, pictures), **settings},
        )

    def searches(self, method: str) -> list[Job]:
        """At RATES, and at further ones while the best is at an end."""
        rates = list(RATES)
        while True:
            jobs = [self._search(method, rate) for rate in rates]
            if len(rates) == len(RATES) + FARTHER or not all(job.ended for job in jobs):
                return jobs
            best = min(range(len(jobs)), key=lambda i: jobs[i].score)
            if 0 < best < len(jobs) - 1 or jobs[best].score == math.inf:
                return jobs
            rates = [rates[0] / 3, *rates] if best == 0 else [*rates, rates[-1] * 3]

    def _search(self, method: str, rate: float) -> Job:
        rate = float(f"{rate:.3g}")
        name = f"{method}-lr{rate:g}"
        return self.job("search", name, self.pictures // PART, lr=rate, **METHODS[method])

    def found(self, method: str) -> Job | None:
        """The search's best run; None before it is over."""
        return next(iter(ranked(method, self.searches(method))), None)

    def whole(self, stage: str, method: str, seed: int, rate: float | None) -> Job:
        place = f"whole-lr{rate:g}" if rate else "whole"
        name = f"{method}-{seed}" if stage == "train" else f"{method}-{place}"
        settings = {**METHODS[method], "seed": seed, "lr": rate}
        job = self.job(stage, name, self.pictures, **settings)
        return replace(job, folder=self.out / "runs" / place / f"{method}-{seed}")

    def finals(self, method: str) -> list[Job]:
        """The whole run with seed 0 at the search's best rates, None before the search is over, and
        at the next best for each that failed."""
        best = ranked(method, self.searches(method))
        rates = [job.settings["lr"] for job in best] or [None] * FINALISTS
        jobs: list[Job] = []
        for rate in rates:
            if sum(not job.failed for job in jobs) < FINALISTS:
                jobs.append(self.whole("final", method, 0, rate))
        return jobs

    def rate(self, method: str) -> float | None:
        """What the finals decide; None before they are over."""
        best = next(iter(ranked(method, self.finals(method))), None)
        return None if best is None else best.settings["lr"]

    def jobs(self) -> Iterator[Job]:
        """One after the other, as they are to be run. Those behind an unfinished search or final
        have no learning rate yet and cannot run."""
        for method in METHODS:
            yield from self.searches(method)
        for method in METHODS:
            yield from self.finals(method)
        for seed in range(self.training_seeds):
            for method in METHODS:
                yield self.whole("train", method, seed, self.rate(method))
        for name, (method, change) in ABLATIONS.items():
            found = self.found(method)
            lr = None if found is None else found.settings["lr"]
            settings = {**METHODS[method], **change, "lr": lr}
            yield self.job("ablate", name, self.pictures // PART, **settings)


def ranked(method: str, jobs: Sequence[Job]) -> list[Job]:
    """Those that did not fail, the best first; none before all of them are over. Errors: ValueError
    where all failed."""
    if not all(job.ended for job in jobs):
        return []
    good = sorted((job for job in jobs if job.score < math.inf), key=lambda job: job.score)
    if not good:
        raise ValueError(f"{method} failed at every learning rate; see {jobs[0].folder}")
    return good


def chosen(stage: str, name: str, only: Sequence[str]) -> bool:
    return not only or any(fnmatch(stage, one) or fnmatch(name, one) for one in only)


def print_status(study: Study, only: Sequence[str]) -> None:
    """What is done and what is left, and how many pictures that is."""
    left = 0
    for job in study.jobs():
        waits = job.settings["lr"] is None
        settings = {name: value for name, value in job.settings.items() if value is not None}
        known = replace(job, settings=settings)
        final = waits and job.stage == "train" and job.settings["seed"] == 0  # it is one of these
        if chosen(job.stage, job.name, only) and not job.ended and not final:
            left += (known.steps - known.step) * Recipe(**known.settings).batch
        lr = f"lr {settings['lr']:g}" if not waits else "lr by the search"
        lr = "lr by the finals" if waits and job.stage == "train" else lr
        print(f"  {job.stage:<8} {job.name:<24} {lr:<18} {known.status()}")
    print(f"{left:,} pictures left to train on{' in what is chosen' if only else ''}", flush=True)


def train(job: Job, model: Any, data: Any, validation_seeds: int) -> None:
    """To the end; a loss that is not finite is noted in the run's folder."""
    print(f"{job.stage} {job.name}", flush=True)
    try:
        with show.TrainingBar(job.steps) as bar:
            fewstep.distillation.distill(
                model,
                None if job.settings.get("method") == "trajectory" else data,
                out=job.folder,
                name=job.folder.name,
                checkpoint_every=max(1, min(500, job.steps // 8)),
                validate_every=math.ceil(job.steps / (1 if job.stage in QUARTERS else 2)),
                validation_seeds=validation_seeds,
                report=bar.report,
                resumed=bar.resumed,
                **job.settings,
            )
    except FloatingPointError as error:
        recipe = asdict(Recipe(**job.settings))
        write_json(job.folder / FAILED, {"reason": str(error), "recipe": recipe})
    print(f"{job.name}: {job.status()}", flush=True)


def measure(options: argparse.Namespace, name: str, jobs: Sequence[Job], solvers: str) -> None:
    """One comparison of the students with the solvers, into OUT/name, by `fewstep compare`. Errors:
    SystemExit with its code, where that fails."""
    done = [job for job in jobs if job.score < math.inf]
    names = [name for name in (solvers, *(str(job.folder) for job in done)) if name]
    command = [
        *("fewstep", "compare", options.model, "--solvers", ",".join(names), "--nfe", BUDGETS),
        *("--device", options.device, "--out", str(options.out / name)),
        *shlex.split(options.compare),
    ]
    run(command)
    path = options.out / name / "comparison.json"
    record = read_comparison(path)
    failed = {str(job.folder): f"{job.name}: {job.status()}" for job in jobs if job not in done}
    if failed:
        record["left_out"] |= failed
        write_json(path, record)
    words = [seeds_table(record), *expectations(record), *failed.values(), str(path)]
    print("\n".join(words), flush=True)


def expectations(record: dict[str, Any]) -> list[str]:
    """What is expected of SPLAM, a line each, by every feature network: with 1 and 2 evaluations it
    is below every solver of the frozen network, with 2 and 4 below LCM of the same training seed.
    Within two standard errors over training seeds a line says open. Those whose rows are not there
    are left out."""
    called = short_names(record)
    ours: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}  # by method, budget, training seed
    frozen: dict[int, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        found = training_seed(row, called[row["sampler"]])
        if "student" in row and found is not None:
            name, seed = found
            ours.setdefault((name, row["nfe"]), {})[seed] = row["fd"]
        elif "student" not in row:
            frozen.setdefault(row["nfe"], []).append(row)

    def verdict(what: str, found: list[float], bound: float) -> str:
        mean, spread, shown = float(np.mean(found)), 0.0, ""
        if len(found) > 1:
            spread = float(np.std(found, ddof=1)) / len(found) ** 0.5
            shown = f" ± {spread:.2f}"
        word = "pass" if mean < bound else "FAIL"
        word = word if abs(mean - bound) > 2 * spread else "open"
        return f"{word}  {what}: {mean:.2f}{shown} ({len(found)}) against {bound:.2f}"

    lines = []
    for judge in record["floor"]:
        for nfe in (1, 2):
            if ("splam", nfe) in ours and nfe in frozen:
                best = min(frozen[nfe], key=lambda row: row["fd"][judge]["excess"])
                solver = called[best["sampler"]]
                found = [fd[judge]["excess"] for fd in ours["splam", nfe].values()]
                what = f"splam at {nfe} is below {solver}, FD-{judge}"
                lines.append(verdict(what, found, best["fd"][judge]["excess"]))
        for nfe in (2, 4):
            theirs = ours.get(("lcm", nfe), {})
            found = [
                fd[judge]["excess"] - theirs[seed][judge]["excess"]
                for seed, fd in ours.get(("splam", nfe), {}).items()
                if seed in theirs
            ]
            if found:
                what = f"splam less lcm at {nfe}, by seed, FD-{judge}"
                lines.append(verdict(what, found, 0.0))
    return lines


def setting(text: str) -> tuple[str, Any]:
    """A field of the recipe that the study leaves alone, from NAME=VALUE; the value as JSON has it,
    or a word. Ablations of the teacher have a teacher of their own."""
    name, found, value = text.partition("=")
    free = [one for one in Recipe.__dataclass_fields__ if one not in OWN]
    if not found or name not in free:
        known = ", ".join(free)
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, NAME one of {known}, got {text!r}")
    try:
        read: Any = json.loads(value)
    except ValueError:
        read = value
    kind = get_type_hints(Recipe)[name]
    try:
        TypeAdapter(kind).validate_json(json.dumps(read), strict=True)
    except ValueError:
        rule = f"{name} must be {getattr(kind, '__name__', kind)}"
        raise argparse.ArgumentTypeError(f"{rule}, got {clean(value)!r}") from None
    return name, read


def check(common: dict[str, Any]) -> None:
    """Raise ValueError for settings that a run of the study cannot have."""
    changed = {name: {**METHODS[method], **change} for name, (method, change) in ABLATIONS.items()}
    for name, own in {**METHODS, **changed}.items():
        try:
            Recipe(**{**common, **own})
        except ValueError as error:
            raise ValueError(f"--set: {error} ({name})") from None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="what fewstep distill takes")
    add("--out", type=Path, required=True)
    add("--model", default="fashion-mnist")
    add("--device", default="cpu")
    add("--only", default="", help="stages or runs, with commas and wildcards")
    add("--minutes", type=positive, help="stop then; the same command goes on from there")
    add("--status", action="store_true", help="say what is left, and end")
    add("--pictures", type=at_least(1), default=500_000, help="of a whole run")
    add("--training-seeds", type=at_least(1), default=3)
    add("--validation-seeds", type=at_least(1), default=500)
    add("--set", nargs="+", type=setting, default=[], help="of every run, such as batch=64")
    add("--solvers", default=FREE, help="of the frozen network, to compare with")
    add("--compare", default="--seeds 0-4999", help="more options of fewstep compare")
    options = parser.parse_args(arguments)
    try:
        check(dict(options.set))
    except ValueError as error:
        parser.error(clean(error))
    options.only = [part.strip() for part in options.only.split(",") if part.strip()]
    return options


def carry_out(study: Study, options: argparse.Namespace) -> None:
    """What is chosen and not done yet."""
    model = fewstep.load(options.model, device=options.device)
    data = read_data(options.data, model, Recipe(**study.common).dropout)
    while True:  # looked up anew: what a search decides is known only then
        left = [job for job in study.jobs() if not job.ended]
        ready = [job for job in left if job.settings["lr"] is not None]
        job = next((job for job in ready if chosen(job.stage, job.name, options.only)), None)
        if job is None:
            break
        train(job, model, data, options.validation_seeds)
    for name, stage, solvers in (
        ("students", "train", options.solvers),
        ("ablations", "ablate", ""),
    ):
        jobs = [job for job in study.jobs() if job.stage == stage]
        waiting = [job.name for job in jobs if not job.ended]
        if waiting:
            print(f"{name} are not measured yet: {', '.join(waiting)} are to be trained first")
        elif jobs and chosen("measure", name, options.only):
            usual = filter(None, map(study.found, METHODS)) if stage == "ablate" else ()
            measure(options, name, [*usual, *jobs], solvers)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    study = Study(options.out, options.pictures, options.training_seeds, dict(options.set))
    print_status(study, options.only)
    if not options.status:
        with resumable(options.out):
            stop_after(options.minutes)
            carry_out(study, options)


if __name__ == "__main__":
    sys.exit(ended(main))
