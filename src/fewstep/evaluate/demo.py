"""The demo's numbers: every family of solvers on the same seeds, beside the exact solution.

    error of a picture = sqrt(mean((x - x_exact)^2))        x in [-1, 1]

x_exact is a fine solve of the same probability-flow ODE from the same noise, where the solver ends:
x at sigma_min, or D there for a solver that ends at 0. A second fine solve, by another method on
another grid, says how exact it is.

Every solver has its fair setting: the grid, the analytic first step and the end that the model's
card gives for it at this budget, screened on other seeds. A solver that the card does not name has
the usual setting, and its row says so. "auto" is what the card names for the budget. The stochastic
solvers leave the ODE, so they have pictures but no error. Students of the model that ship with
fewstep run from the same noise too, at 1, 2 and 4 evaluations, as far as the budget goes.
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

from fewstep.denoiser import Counted, Denoiser
from fewstep.loop import finish
from fewstep.models import Model, load, students_of
from fewstep.models.students import phased
from fewstep.provenance import machine_line, software_line
from fewstep.reference import ReferenceSolve
from fewstep.sampling.choose import choose, draws_noise
from fewstep.sampling.settings import Filled, Settings
from fewstep.solver import Solver, get, intervals_for
from fewstep.solving import resolve
from fewstep.text import span

__all__ = ["FAMILIES", "STOCHASTIC", "DemoResult", "Row", "run_demo"]

# One or two of each family. ipndm-v and deis-rho are one method under two names.
FAMILIES = (
    "ddim", "heun", "dpm-solver-2", "dpm-solver-3", "dpmpp-2s", "dpmpp-2m", "dpmpp-3m",
    "exp-adams-3", "unipc-2", "deis-3", "ipndm-2", "ipndm-3", "ipndm-4", "lms-3",
)  # fmt: skip
STOCHASTIC = ("ddim-eta", "churn", "dpmpp-2m-sde")
STUDENT_BUDGETS = (1, 2, 4)

# On the built-in network these two differ by 1e-4, most of which is the second one's error. RMSE of
# solvers at 5 evaluations is 0.05 and more.
EXACT = ReferenceSolve("exp-adams-4", 80, "karras")
CHECK = ReferenceSolve("dpm-solver-3", 120, "log-snr")
CHECK_SEEDS = 4
FINER = 8  # the exact solution spends at least so many times the budget
ROUNDS = 3  # timings per solver, of which the median counts
TIMING_SECONDS = 30.0  # no further round once the last one would end later than this


@dataclass(frozen=True, eq=False)
class Row:
    """One solver's run.

    Args:
        solver: as registered, or "auto"; of a student its model's name
        about: what it is
        settings: how it ran
        nfe: evaluations spent, counted
        ms: milliseconds per picture
        x: where it ended, float32 [n, c, h, w]
        pictures: the same, uint8 [n, h, w, c]
        errors: RMSE to the exact solution for each seed [n], None for a stochastic solver
        student: whether it ran on a student, with a budget of its own
    """

    solver: str
    about: str
    settings: str
    nfe: int
    ms: float
    x: np.ndarray
    pictures: np.ndarray
    errors: np.ndarray | None
    student: bool = False

    @property
    def rmse(self) -> float | None:
        """Mean of the errors over the seeds."""
        return None if self.errors is None else float(self.errors.mean())

    @property
    def standard_error(self) -> float | None:
        """Of that mean; None where there are fewer than two seeds."""
        if self.errors is None or len(self.errors) < 2:
            return None
        return float(self.errors.std(ddof=1) / len(self.errors) ** 0.5)


@dataclass(frozen=True, eq=False)
class DemoResult:
    """What the demo computed.

    Args:
        rows: the ODE solvers by error, then the stochastic ones; students among both
        exact: the reference, whose errors are its distances to the check on the first seeds
        screened: whether every named solver's setting was screened
        protocol: how to make all this again, in words
        files: what was written
    """

    model: str
    nfe: int
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    exact: Row
    screened: bool
    protocol: dict[str, str]
    files: tuple[Path, ...] = ()

    @property
    def ode_rows(self) -> list[Row]:
        """Of the model itself, best first."""
        return [row for row in self.rows if row.errors is not None and not row.student]

    @property
    def stochastic_rows(self) -> list[Row]:
        """Of the model itself."""
        return [row for row in self.rows if row.errors is None and not row.student]

    @property
    def student_rows(self) -> list[Row]:
        """By name and budget."""
        rows = [row for row in self.rows if row.student]
        return sorted(rows, key=lambda row: (row.solver, row.nfe))

    @property
    def blocks(self) -> list[list[Row]]:
        """The rows as they are shown, those of a kind together."""
        blocks = [[self.exact], self.ode_rows, self.student_rows, self.stochastic_rows]
        return [block for block in blocks if block]


@torch.no_grad()
def run_demo(
    model_name: str = "fashion-mnist",
    *,
    nfe: int = 5,
    seeds: Sequence[int] = range(12),
    label: int | str | None = None,
    solvers: Sequence[str] | None = None,
    command: str = "fewstep demo",
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> DemoResult:
    """Run every solver family on the same seeds.

    Args:
        nfe: the budget; a solver that cannot spend it gets the next larger one that it can
        solvers: these instead of all, and no students
        command: what the report gives as its origin
        report: called with what is under way, and with the work done and in total, in evaluations
            of one picture

    Raises:
        ValueError: for unknown names, and for a student, whose trajectories no solver follows.
    """
    seeds = tuple(int(seed) for seed in seeds)
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
    x_T, denoiser = model.prior(seeds, label=label), Counted(model.denoiser(label))
    names = list(dict.fromkeys(solvers or ("auto", *FAMILIES, *STOCHASTIC)))
    entrants = [_entrant(model, denoiser, name, nfe) for name in names]
    for name in () if solvers else students_of(model.card):
        entrants += _student(name, nfe, label)
    exact, check = _fine(EXACT, nfe), _fine(CHECK, nfe)
    few = min(len(seeds), CHECK_SEEDS)
    each = sum(entrant.settings.nfe for entrant in entrants) * len(seeds)
    total = exact.nfe * len(seeds) + check.nfe * few + ROUNDS * each
    bench = _Bench(x_T, seeds, total, report)
    (x, clean), seconds = bench.watched("exact solution", exact, denoiser, len(seeds))
    (other, _), _ = bench.watched("check of it", check, denoiser, few)
    settings = Filled(exact.solver, exact.nfe, str(exact.grid))
    fine = _Entrant(model, denoiser, "exact solution", settings)
    reference = _row(fine, _Run(x, exact.nfe, [seconds]), other, exact.nfe)
    runs = _race(bench, entrants)
    report("done", total, total)

    rows = []
    for entrant, run in zip(entrants, runs, strict=True):
        target = clean if entrant.to_zero else x
        rows.append(_row(entrant, run, None if draws_noise(entrant.settings) else target, nfe))
    rows.sort(key=lambda row: math.inf if row.rmse is None else row.rmse)
    screened = all(one.screened for one in entrants if one.named)
    protocol = _protocol(model, command, seeds, label, exact, check, few, len(runs[0].seconds))
    return DemoResult(model.card.name, nfe, seeds, tuple(rows), reference, screened, protocol)


@dataclass(frozen=True, eq=False)
class _Entrant:
    """A row to be: a sampler and how it runs, on the demo's model or on a student of it.

    screened: whether the card gives the setting
    """

    model: Model
    denoiser: Counted
    name: str
    settings: Filled
    screened: bool = False

    @property
    def student(self) -> bool:
        return bool(self.model.card.distilled)

    @property
    def named(self) -> bool:
        return self.name != "auto" and not self.student

    @property
    def to_zero(self) -> bool:
        """Whether it ends at sigma = 0."""
        program = resolve(self.settings, self.denoiser)
        return self.settings.final or program.sigmas[-1] == 0


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

    def watched(
        self, name: str, how: ReferenceSolve, denoiser: Denoiser, number: int
    ) -> tuple[tuple[Tensor, ...], float]:
        """A reference solve of the first seeds, reported as it goes: its two ends, its seconds."""

        def tell(evaluations: int) -> None:
            self.report(name, self.done + evaluations * number, self.total)

        tell(0)
        begun = time.perf_counter()
        ends = how.ends(denoiser, self.x_T[:number], tell)
        seconds = time.perf_counter() - begun
        self.done += how.nfe * number
        return ends.unbind(1), seconds

    def timed(self, entrant: _Entrant) -> tuple[Tensor, float]:
        """A solve of all seeds with nothing in between: its end and its seconds."""
        settings = entrant.settings
        self.report(entrant.name, self.done, self.total)
        begun = time.perf_counter()
        x = finish(resolve(settings, entrant.denoiser), entrant.denoiser, self.x_T, self.seeds)
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
    return [
        _Entrant(
            told := phased(student, budget),
            Counted(told.denoiser(label)),
            name,
            choose(student, Settings("auto", budget)),
        )
        for budget in STUDENT_BUDGETS
        if budget <= nfe and str(budget) in student.card.auto
    ]


def _entrant(model: Model, denoiser: Counted, name: str, nfe: int) -> _Entrant:
    """At its screened setting, or at the usual one, at the first budget from nfe on that fits."""
    known = {} if name == "auto" else model.card.setting(name, nfe)
    settings = choose(model, Settings(name, nfe, **known))
    solver = get(settings.solver) if isinstance(settings.solver, str) else None
    if solver is not None and isinstance(settings.grid, str):
        settings = replace(settings, nfe=_spendable(solver, settings))
    return _Entrant(model, denoiser, name, settings, bool(known))


def _spendable(solver: Solver, settings: Filled) -> int:
    """The first budget from that of the settings on.

    Raises:
        ValueError: there is none.
    """
    how = settings.afs, settings.final, settings.end
    for budget in range(settings.nfe, settings.nfe + 8):
        try:
            intervals_for(solver, budget, *how)
        except ValueError:
            continue
        return budget
    intervals_for(solver, settings.nfe, *how)  # raises, and says why
    return settings.nfe


def _fine(how: ReferenceSolve, nfe: int) -> ReferenceSolve:
    return replace(how, nfe=max(how.nfe, FINER * nfe - FINER * nfe % 3))


def _row(entrant: _Entrant, run: _Run, target: Tensor | None, nfe: int) -> Row:
    """A row of the table; `target` may hold fewer pictures, and `nfe` is the budget asked for."""
    errors = None
    if target is not None:
        gap = run.x[: len(target)].double() - target.double()
        errors = gap.flatten(1).square().mean(1).sqrt().cpu().numpy()
    return Row(
        entrant.name,
        _about(entrant),
        _setting(entrant, run.nfe, nfe),
        run.nfe,
        1000 * statistics.median(run.seconds) / len(run.x),
        run.x.cpu().numpy(),
        entrant.model.decode(run.x),
        errors,
        entrant.student,
    )


def _about(entrant: _Entrant) -> str:
    """What a sampler is, in words."""
    card, settings = entrant.model.card, entrant.settings
    called = settings.record()["solver"]
    if entrant.name == "auto":
        return f"{called}, {'the card names it' if card.auto else 'as the card names none'}"
    if card.distilled:
        return f"another network, distilled by {card.distilled.method}"
    solver = get(settings.solver) if isinstance(settings.solver, str) else None
    return solver.summary if solver is not None and entrant.name == solver.name else called


def _setting(entrant: _Entrant, spent: int, nfe: int) -> str:
    """How it ran, in words."""
    settings = entrant.settings
    words = [f"{settings.grid} grid" if isinstance(settings.grid, str) else "its own grid"]
    if settings.afs != "none":
        words.append(f"analytic first step ({settings.afs})")
    if settings.end == "zero":
        words.append("to 0")
    if settings.final:
        words.append("last denoising step")
    if entrant.named and not entrant.screened and isinstance(settings.grid, str):
        words.append("usual setting")
    if spent != nfe and not entrant.student:
        words.append(f"cannot spend {nfe}")
    return ", ".join(words)


def _protocol(
    model: Model,
    command: str,
    seeds: Sequence[int],
    label: int | str | None,
    exact: ReferenceSolve,
    check: ReferenceSolve,
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
