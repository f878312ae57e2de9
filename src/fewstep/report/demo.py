"""The demo: every solver family on the same seeds, beside the exact solution.

    error of a picture = sqrt(mean((x - x_exact)^2))        x in [-1, 1]

x_exact is a fine solve of the same probability-flow ODE from the same noise. A second fine solve,
by another method on another grid, says how exact it is. Every solver runs with the package's
defaults, the Karras grid over the model's range and no analytic step: nothing is chosen on the
pictures shown. "auto" runs with what the model's card names for the budget. The stochastic solvers
leave the ODE, so they have pictures but no error. Students of the model that ship with fewstep run
from the same noise too, at 1, 2 and 4 evaluations, as far as the budget goes.
"""

from __future__ import annotations

import datetime
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.data.images import write_png
from fewstep.denoiser import Counted
from fewstep.files import check_writable, write_whole
from fewstep.loop import iterate, solve
from fewstep.models import Model, load, students_of
from fewstep.provenance import machine_line, software_line
from fewstep.report.demo_page import DemoResult, Row, page, poster, span
from fewstep.sampling.generate import Settings
from fewstep.solver import Solver, get, intervals_for

__all__ = ["FAMILIES", "STOCHASTIC", "run_demo"]

# One of each family. lms, ipndm-v and deis-rho are one method under three names.
FAMILIES = (
    "ddim", "heun", "dpm-solver-2", "dpm-solver-3", "dpmpp-2s", "dpmpp-2m", "dpmpp-3m",
    "exp-adams-3", "unipc-2", "deis-3", "ipndm-2", "ipndm-4", "lms-3",
)  # fmt: skip
STOCHASTIC = ("ddim-eta", "churn", "dpmpp-2m-sde")
STUDENT_BUDGETS = (1, 2, 4)

# On the built-in network these two differ by 1e-4, most of which is the second one's error. RMSE of
# solvers at 5 evaluations is 0.1 and more.
EXACT = ("exp-adams-4", 80, "karras")
CHECK = ("dpm-solver-3", 120, "log-snr")
CHECK_SEEDS = 4
FINER = 8  # the exact solution spends at least so many times the budget
ROUNDS = 3  # timings per solver, of which the median counts
TIMING_SECONDS = 30.0  # no further round once the last one would end later than this


@torch.no_grad()
def run_demo(
    model_name: str = "fashion-mnist",
    out: Path | str = "demo",
    *,
    nfe: int = 5,
    seeds: Sequence[int] = range(12),
    label: int | str | None = None,
    solvers: Sequence[str] | None = None,
    command: str = "fewstep demo",
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> DemoResult:
    """Run every solver family on the same seeds; write demo.png and demo.html into `out`.

    nfe: the budget; a solver that cannot spend it gets the next larger one that it can
    solvers: these instead of all, and no students
    command: what the report gives as its origin
    report: called with what is under way, and with the work done and in total, in evaluations of
        one picture

    Errors: OSError where `out` cannot be written, before any work; ValueError for unknown names and
    for a student, whose trajectories no solver follows.
    """
    out, seeds = Path(out), tuple(int(seed) for seed in seeds)
    if not seeds:
        raise ValueError("seeds must name at least one picture")
    if nfe < 1:
        raise ValueError(f"nfe must be at least 1, got {nfe}")
    model = load(model_name)
    if how := model.card.distilled:
        raise ValueError(
            f"{model_name} is a student of {how.teacher}, and no network for solvers: see "
            f"fewstep demo --model {how.teacher}, or fewstep sample {model_name}"
        )
    check_writable(out)
    x_T, denoiser = model.prior(seeds, label=label), Counted(model.denoiser(label))
    names = list(dict.fromkeys(solvers or ("auto", *FAMILIES, *STOCHASTIC)))
    entrants = [_Entrant(model, denoiser, name, _settings(model, name, nfe)) for name in names]
    for name in () if solvers else students_of(model.card):
        entrants += _student(name, nfe, label)
    exact, check = _fine(EXACT, nfe), _fine(CHECK, nfe)
    few = min(len(seeds), CHECK_SEEDS)
    each = sum(entrant.settings.nfe for entrant in entrants) * len(seeds)
    total = exact.nfe * len(seeds) + check.nfe * few + ROUNDS * each
    bench = _Bench(x_T, seeds, total, report)
    fine = _Entrant(model, denoiser, "exact solution", exact)
    x, seconds = bench.watched(fine, len(seeds))
    other, _ = bench.watched(_Entrant(model, denoiser, "check of it", check), few)
    reference = _row(fine, _Run(x, exact.nfe, [seconds]), other, exact.nfe)
    runs = _race(bench, entrants)
    report("writing", total, total)

    rows = []
    for entrant, run in zip(entrants, runs, strict=True):
        rows.append(_row(entrant, run, None if entrant.settings.stochastic else x, nfe))
    rows.sort(key=lambda row: math.inf if row.rmse is None else row.rmse)
    rounds = len(runs[0].seconds)
    protocol = _protocol(model, command, seeds, label, exact, check, few, rounds)
    result = DemoResult(model.card.name, nfe, seeds, tuple(rows), reference, protocol)
    files = (out / "demo.png", out / "demo.html")
    write_png(files[0], np.asarray(poster(result)), protocol)
    write_whole(files[1], page(result).encode())
    return replace(result, files=files)


@dataclass(frozen=True, eq=False)
class _Entrant:
    """A row to be: a sampler and how it runs, on the demo's model or on a student of it."""

    model: Model
    denoiser: Counted
    name: str
    settings: Settings

    @property
    def student(self) -> bool:
        return bool(self.model.card.distilled)


@dataclass(frozen=True, eq=False)
class _Run:
    """Where a solver ended, [n, ...], the evaluations it spent, and the seconds of each round."""

    x: Tensor
    nfe: int
    seconds: list[float]


@dataclass
class _Bench:
    """Solves from one start against the clock, and reports the work done."""

    x_T: Tensor
    seeds: tuple[int, ...]
    total: int
    report: Callable[[str, int, int], None]
    done: int = 0

    def watched(self, entrant: _Entrant, count: int) -> tuple[Tensor, float]:
        """A long solve of the first `count` seeds, reported as it goes: its end and its seconds."""
        x, seeds, how = self.x_T[:count], self.seeds[:count], entrant.settings.arguments()
        self.report(entrant.name, self.done, self.total)
        begun = time.perf_counter()
        for state in iterate(entrant.denoiser, x, **how, seeds=seeds):
            x = state.x
            self.report(entrant.name, self.done + state.nfe * count, self.total)
        self.done += entrant.settings.nfe * count
        return x, time.perf_counter() - begun

    def timed(self, entrant: _Entrant) -> tuple[Tensor, float]:
        """A solve of all seeds with nothing in between: its end and its seconds."""
        settings = entrant.settings
        self.report(entrant.name, self.done, self.total)
        begun = time.perf_counter()
        x = solve(entrant.denoiser, self.x_T, **settings.arguments(), seeds=self.seeds)
        seconds = time.perf_counter() - begun
        self.done += settings.nfe * len(self.seeds)
        return x, seconds


def _race(bench: _Bench, entrants: Sequence[_Entrant]) -> list[_Run]:
    """Every one once a round, in turn, so that a busy moment is not one solver's."""
    runs: list[_Run] = []
    begun = time.perf_counter()
    for done in range(ROUNDS):
        spent = time.perf_counter() - begun
        if done and spent * (done + 1) / done > TIMING_SECONDS:
            break
        for i, entrant in enumerate(entrants):
            before = entrant.denoiser.evaluations
            x, seconds = bench.timed(entrant)
            if done:
                runs[i].seconds.append(seconds)
            else:
                runs.append(_Run(x, entrant.denoiser.evaluations - before, [seconds]))
    return runs


def _student(name: str, nfe: int, label: int | str | None) -> list[_Entrant]:
    """A student at its budgets up to nfe; none where it imitates guidance, which nothing here
    has."""
    student = load(name)
    if student.card.distilled and student.card.distilled.guidance not in (None, 1):
        return []
    denoiser = Counted(student.denoiser(label))
    return [
        _Entrant(student, denoiser, name, Settings.choose(student, "auto", budget))
        for budget in STUDENT_BUDGETS
        if budget <= nfe and str(budget) in student.card.auto
    ]


def _solver(settings: Settings) -> Solver | None:
    """The registered one, or None for a learned one."""
    return get(settings.solver) if isinstance(settings.solver, str) else None


def _settings(model: Model, name: str, nfe: int) -> Settings:
    """The defaults, or the card's choice for "auto", at the first budget from nfe on that fits."""
    settings = Settings.choose(model, name, nfe)
    solver = _solver(settings)
    if solver is None or not isinstance(settings.grid, str):
        return settings
    for budget in range(nfe, nfe + 8):
        try:
            intervals_for(solver, budget, settings.afs, settings.final, settings.end)
        except ValueError:
            continue
        return Settings(**{**settings.arguments(), "nfe": budget})
    # raises, and says why
    intervals_for(solver, nfe, settings.afs, settings.final, settings.end)
    return settings


def _fine(recipe: tuple[str, int, str], nfe: int) -> Settings:
    solver, least, grid = recipe
    return Settings(solver, max(least, FINER * nfe - FINER * nfe % 3), grid, "none", False)


def _row(entrant: _Entrant, run: _Run, target: Tensor | None, nfe: int) -> Row:
    """target: what errors are measured to, perhaps of fewer pictures; nfe: the budget asked for."""
    model, name, settings = entrant.model, entrant.name, entrant.settings
    solver = _solver(settings)
    errors = None
    if target is not None:
        gap = run.x[: len(target)].double() - target.double()
        errors = gap.flatten(1).square().mean(1).sqrt().cpu().numpy()
    grid = settings.grid if isinstance(settings.grid, str) else "its own"
    words = [f"{grid} grid"]
    if settings.afs != "none":
        words.append(f"analytic first step ({settings.afs})")
    if settings.end == "zero":
        words.append("to 0")
    if settings.final:
        words.append("last denoising step")
    if run.nfe != nfe and not entrant.student:
        words.append(f"cannot spend {nfe}")
    called = settings.record()["solver"]
    about = solver.summary if solver is not None and name == solver.name else called
    if name == "auto":
        what = "the card's choice" if model.card.auto else "as the card names none"
        about = f"{called}, {what}"
    elif model.card.distilled:
        about = f"another network, distilled by {model.card.distilled.method}"
    return Row(
        name,
        about,
        ", ".join(words),
        run.nfe,
        1000 * statistics.median(run.seconds) / len(run.x),
        run.x.cpu().numpy(),
        model.decode(run.x),
        errors,
        entrant.student,
    )


def _protocol(
    model: Model,
    command: str,
    seeds: Sequence[int],
    label: int | str | None,
    exact: Settings,
    check: Settings,
    few: int,
    rounds: int,
) -> dict[str, str]:
    times = f"median of {rounds} rounds" if rounds > 1 else "one round"
    return {
        "command": command,
        "model": f"{model.card.name}, weights SHA-256 {model.card.weights_sha256}",
        "label": "none: the network without class" if label is None else str(label),
        "seeds": span(seeds),
        "exact solution": f"{exact.solver}, {exact.nfe} evaluations, {exact.grid} grid",
        "check of it": f"{check.solver}, {check.nfe} evaluations, {check.grid} grid, "
        f"seeds {span(seeds[:few])}",
        "time": f"all {len(seeds)} pictures as one batch, {times}",
        "software": software_line(),
        "machine": machine_line(),
        "date": datetime.datetime.now().astimezone().date().isoformat(),
    }
