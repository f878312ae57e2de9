"""What the command line shows: tables of solvers and plans, and the training bar."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fewstep.plan import Combine, Plan, flatten, in_numbers, nfe
from fewstep.solver import ALIASES, Range, get, names

if TYPE_CHECKING:
    from fewstep.sampling.folder import FolderResult
    from fewstep.train.network import Progress as TrainingProgress

__all__ = [
    "TrainingBar",
    "plan_table",
    "sampling_line",
    "solver_list",
    "solver_table",
    "weights_line",
]


def solver_list() -> list[dict[str, Any]]:
    """The same as `solver_table`, JSON-ready."""
    return [
        {
            "name": name,
            "aliases": [alias for alias, target in ALIASES.items() if target == name],
            "history": solver.prediction,
            "order": solver.order,
            "stochastic": solver.stochastic,
            "options": {
                key: {"default": value, "range": str(dict(solver.ranges).get(key, Range()))}
                for key, value in solver.options
            },
            "summary": solver.summary,
        }
        for name in _every_name()
        for solver in (get(name),)
    ]


def _every_name() -> list[str]:
    return [*names(), *names(consistency=True)]


def solver_table() -> Table:
    """Every registered solver with what it declares."""
    table = Table("solver", "history", "order", "what it is", box=None)
    for name in _every_name():
        solver = get(name)
        other = ", ".join(alias for alias, target in ALIASES.items() if target == name)
        order = "SDE" if solver.stochastic else str(solver.order)
        options = ", ".join(f"{k}={v:g}" for k, v in solver.options)
        extra = "".join(f" ({what})" for what in (other and f"also {other}", options) if what)
        table.add_row(name, solver.prediction, order, solver.summary + extra)
    return table


def plan_table(plan: Plan) -> Table:
    """One row per operation of a plan."""
    title = f"{plan.solver}, {nfe(plan)} evaluations, history of {plan.prediction}"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("", "sigma", "a", "b, newest first", "noise", ""):
        table.add_column(column, justify="right" if column in ("sigma", "a") else "left")
    for op in (in_numbers(op) for op in plan.ops):
        sigma = f"{op.sigma:.6g}"
        if isinstance(op, Combine):
            b = "  ".join(f"{value:+.6f}" for value in op.b)
            noise = f"{op.noise:.6g}" if op.noise else ""
            table.add_row("combine", sigma, f"{op.a:.6f}", b, noise, "" if op.accept else "trial")
        else:
            note = "" if op.source == "net" else f"analytic: {op.source}"
            note = note if op.cond in (None, op.sigma) else f"told {op.cond:.6g}"
            table.add_row("[bold]eval[/bold]", sigma, "", "", "", note)
    return table


def weights_line(plan: Plan) -> str:
    """The plan's end as weights of x_T and of each D."""
    row = flatten(plan)
    terms = "  ".join(f"{weight:+.6f} D_{k}" for k, weight in enumerate(row[1:]))
    return f"end = {row[0]:.6g} x_T  {terms}"


def sampling_line(made: int, result: FolderResult, what: dict[str, Any], seconds: float) -> str:
    """What a run has made and how, in one line; settings that were left alone are not named.

    what: label, prompt, prompts and image, as the user gave them
    """
    settings, skipped = result.settings, result.skipped
    kept = f", {skipped} {'was' if skipped == 1 else 'were'} there already" if skipped else ""
    grid = settings["grid"]
    on = f" on the {grid} grid" if isinstance(grid, str) else ""
    if isinstance(grid, list):
        on = f" on sigmas {', '.join(f'{sigma:g}' for sigma in grid)}"
    parts = [
        settings["solver"] + on,
        f"afs={settings['afs']}" * (settings["afs"] not in ("none", None)),
        f"end={settings['end']}" * (settings["end"] not in ("sigma_min", None)),
        "final" * settings["final"],
        *(
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in (
                *what.items(),
                ("strength", settings["strength"]),
                ("negative", settings["negative"] and repr(settings["negative"])),
                ("guidance", settings["guidance"]),
                ("head start", settings["head_start"]),
            )
            if value is not None
        ),
        f"{_count(settings['nfe'], 'evaluation')} each "
        f"({_count(result.network_calls, 'network call')})",
        f"{seconds:.2f} s",
    ]
    return f"{_count(made, 'picture')}{kept}: {', '.join(filter(None, parts))}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


class TrainingBar:
    """A progress bar with loss, learning rate and speed; a line per validation. Lines only without
    a terminal; nothing where quiet."""

    def __init__(self, total: int, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not sys.stderr.isatty(),
        )
        self.task = self.bar.add_task("", total=total, state="first step")
        self.loss = math.nan

    def __enter__(self) -> TrainingBar:
        self.bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bar.stop()

    def resumed(self, step: int) -> None:
        """Say that the run goes on from a checkpoint."""
        self.console.print(f"resumed at step {step}", highlight=False)
        self.bar.update(self.task, completed=step)

    def report(self, progress: TrainingProgress) -> None:
        """Show one step; the loss is smoothed over about 50."""
        first = math.isnan(self.loss)
        self.loss = progress.loss if first else self.loss + 0.02 * (progress.loss - self.loss)
        self.bar.update(
            self.task,
            completed=progress.step,
            state=f"loss {self.loss:.4f}  lr {progress.lr:.1e}  "
            f"{progress.pictures_per_second:.0f}/s",
        )
        if progress.validation:
            values = "  ".join(f"{k} {v:.4f}" for k, v in progress.validation.items())
            self.console.print(
                f"step {progress.step}/{progress.total_steps}  train {self.loss:.4f}  {values}  "
                f"{progress.pictures_per_second:.0f} pictures/s",
                highlight=False,
            )
