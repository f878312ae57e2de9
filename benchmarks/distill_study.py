"""The study of distillation: SPLAM by each rule and LCM, on equal data, steps and search.

    search    each method at three learning rates, an eighth of the pictures; the best on the
              validation seeds is the method's rate
    train     each method at its rate, with three training seeds
    ablate    SPLAM with one thing changed, a quarter of the pictures
    measure   all of these and the solvers of the frozen network, in two comparisons: each student's
              sampler and each solver's setting are chosen on validation seeds

    python benchmarks/distill_study.py --data FOLDER --out study --pictures 2000000 --device cuda
    python benchmarks/distill_study.py --data FOLDER --out study --only 'search,splam-direct-*'

Each run has a folder of its own in OUT/runs and resumes there, so the same command goes on after a
stop, and machines may share the work by --only (stages, or names of runs with wildcards). What is
done and what is left is printed first; --status prints it and ends. OUT/students/comparison.json
and OUT/ablations/comparison.json are what `make results` takes.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import safe_open

import fewstep
from fewstep import show
from fewstep.cli.options import resumable
from fewstep.evaluate.compare import Design, Workbench, compare, load_students
from fewstep.evaluate.features import own_features, resolve_features
from fewstep.evaluate.references import Fine, References
from fewstep.evaluate.report import comparison_table, seeds_table, write_comparison
from fewstep.files import write_json
from fewstep.splam import Recipe
from fewstep.splam.data import read_data

METHODS: dict[str, dict[str, Any]] = {
    "splam-direct": {},
    "splam-variance": {"rule": "variance"},
    "splam-linear": {"rule": "linear"},
    "lcm": {"method": "lcm"},
}
RATES = (1e-4, 3e-4, 1e-3)
# by name: the method whose learning rate it takes, and what is changed
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"quarter-{method}": (method, {}) for method in METHODS},
    "gamma-one-never": ("splam-direct", {"gamma_one": 0.0}),
    "gamma-one-half": ("splam-direct", {"gamma_one": 0.5}),
    "teacher-ddim-3": ("splam-direct", {"substeps": 3}),
    "teacher-heun-1": ("splam-direct", {"teacher": "heun"}),
    "teacher-heun-3": ("splam-direct", {"teacher": "heun", "substeps": 3}),
    "teacher-ipndm-3": ("splam-direct", {"teacher": "ipndm", "substeps": 3}),  # one is ddim
    "linear-level": ("splam-linear", {"tell": "level"}),
}
SEARCHED, ABLATED = 8, 4  # the parts of the pictures that these stages train on
BUDGETS = (1, 2, 4, 8)
SOLVERS = "ddim,dpmpp-2m,unipc-2,deis-2,ipndm-2,ipndm-3,heun"
FAILED = "failed.json"


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
        return (self.folder / "card.json").is_file() or (self.folder / FAILED).is_file()

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
        if (self.folder / FAILED).is_file():
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
        if (self.folder / FAILED).is_file():
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
        part, how = self.pictures // SEARCHED, METHODS[method]
        return [self.job("search", f"{method}-lr{lr:g}", part, lr=lr, **how) for lr in RATES]

    def rate(self, method: str) -> float | None:
        """The best learning rate; None before the search is over."""
        jobs = self.searches(method)
        if not all(job.ended for job in jobs):
            return None
        best = min(jobs, key=lambda job: job.score)
        if best.score == math.inf:
            raise ValueError(f"{method} failed at every learning rate; see {best.folder}")
        return best.settings["lr"]

    def jobs(self) -> Iterator[Job]:
        """One after the other, as they are to be run. Those behind an unfinished search have no
        learning rate yet and cannot run."""
        for method in METHODS:
            yield from self.searches(method)
        for seed in range(self.training_seeds):
            for method, how in METHODS.items():
                settings = {**how, "seed": seed, "lr": self.rate(method)}
                yield self.job("train", f"{method}-{seed}", self.pictures, **settings)
        for name, (method, change) in ABLATIONS.items():
            settings = {**METHODS[method], **change, "lr": self.rate(method)}
            yield self.job("ablate", name, self.pictures // ABLATED, **settings)


def chosen(stage: str, name: str, only: Sequence[str]) -> bool:
    return not only or any(fnmatch(stage, one) or fnmatch(name, one) for one in only)


def print_status(study: Study, only: Sequence[str]) -> None:
    """What is done and what is left, and how many pictures that is."""
    left = 0
    for job in study.jobs():
        waits = job.settings["lr"] is None
        known = job if not waits else study.job(job.stage, job.name, job.settings["pictures"])
        if chosen(job.stage, job.name, only) and not job.ended:
            left += (known.steps - known.step) * Recipe(**known.settings).batch
        lr = "lr by the search" if waits else f"lr {job.settings['lr']:g}"
        print(f"  {job.stage:<8} {job.name:<24} {lr:<18} {known.status()}")
    print(f"{left:,} pictures left to train on{' in what is chosen' if only else ''}", flush=True)


def train(job: Job, model: Any, data: Any, validation_seeds: int) -> None:
    """To the end; a loss that is not finite is noted in the run's folder."""
    if job.settings["lr"] is None:
        print(f"{job.name} waits for the search of its learning rate", flush=True)
        return
    print(f"{job.stage} {job.name}", flush=True)
    often = {
        "checkpoint_every": max(1, min(500, job.steps // 8)),
        "validate_every": max(1, job.steps // 4),
        "validation_seeds": validation_seeds,
    }
    try:
        with show.TrainingBar(job.steps) as bar:
            fewstep.splam.distill(
                model,
                data,
                out=job.folder,
                name=job.name,
                report=bar.report,
                resumed=bar.resumed,
                **often,
                **job.settings,
            )
    except FloatingPointError as error:
        write_json(job.folder / FAILED, {"reason": str(error)})
    print(f"{job.name}: {job.status()}", flush=True)


def measure(
    options: argparse.Namespace, name: str, folders: Sequence[Path], solvers: Sequence[str]
) -> None:
    """One comparison of the students with the solvers, into OUT/name."""
    model = fewstep.load(options.model, device=options.device)
    asked = own_features(model.card.name) if options.features is None else options.features
    judges = [resolve_features(one, device=options.device) for one in asked if one != "none"]
    design = Design(
        solvers=(*solvers, *map(str, folders)),
        budgets=BUDGETS,
        seeds=tuple(range(options.seeds)),
        screen=options.screen,
        choose_by=judges[0].label if judges else "error",
        population=options.population,
    )
    out = options.out / name
    students = load_students(model, design.solvers, device=options.device)
    references = References(model, Fine(nfe=options.reference_nfe), folder=options.cache)
    bench = Workbench(model, references, out, options.sample_batch, students=students)
    result = compare(bench, design, judges, command=shlex.join(["python", *sys.argv]))
    write_comparison(result, out, options.plots)
    Console().print(comparison_table(result.record))
    print(seeds_table(result.record))
    print(f"{out / 'comparison.json'}", flush=True)


def listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="what fewstep distill takes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="fashion-mnist")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", help="of the training")
    parser.add_argument("--only", type=listed, default=[], help="stages or runs, with wildcards")
    parser.add_argument("--status", action="store_true", help="say what is left, and end")
    training = parser.add_argument_group("training")
    training.add_argument("--pictures", type=int, default=500_000, help="of a whole run")
    training.add_argument("--batch", type=int, default=128)
    training.add_argument("--warmup", type=int, default=10_000)
    training.add_argument("--points", type=int)
    training.add_argument("--compile", action="store_true")
    training.add_argument("--training-seeds", type=int, default=3)
    training.add_argument("--validation-seeds", type=int, default=512)
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument("--solvers", type=listed, default=listed(SOLVERS))
    measuring.add_argument("--seeds", type=int, default=5000, help="how many, from 0")
    measuring.add_argument("--screen", type=int, default=1000)
    measuring.add_argument("--population", type=int, default=10_000)
    measuring.add_argument("--reference-nfe", type=int, default=40)
    measuring.add_argument("--sample-batch", type=int, default=50)
    measuring.add_argument("--features", type=listed, help="the model's own unless given")
    measuring.add_argument("--cache", type=Path, help="of the reference solves")
    measuring.add_argument("--plots", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(arguments)


def carry_out(study: Study, options: argparse.Namespace, common: dict[str, Any]) -> None:
    """What is chosen and not done yet."""
    places = [(job.stage, job.name) for job in study.jobs()]
    wanted = [place for place in places if chosen(*place, options.only)]
    model = fewstep.load(options.model, device=options.device)
    data = read_data(options.data, model, Recipe(**common).dropout)
    for place in wanted:  # looked up anew: what a search decides is known only then
        job = next(job for job in study.jobs() if (job.stage, job.name) == place)
        if not job.ended:
            train(job, model, data, options.validation_seeds)
    if not chosen("measure", "measure", options.only):
        return
    for name, stage, solvers in (
        ("students", "train", options.solvers),
        ("ablations", "ablate", []),
    ):
        jobs = [job for job in study.jobs() if job.stage == stage]
        waiting = [job.name for job in jobs if not job.ended]
        if waiting:
            print(f"{name} are not measured yet: {', '.join(waiting)} are to be trained first")
            continue
        measure(options, name, [j.folder for j in jobs if j.score < math.inf], solvers)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    names = ("batch", "warmup", "points", "dtype", "compile")
    common = {name: getattr(options, name) for name in names}
    study = Study(options.out, options.pictures, options.training_seeds, common)
    print_status(study, options.only)
    if not options.status:
        with resumable(options.out):
            carry_out(study, options, common)


if __name__ == "__main__":
    main()
