"""What the command line shows: tables, and the progress of work."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any, Self

from rich import progress as bars
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fewstep.plan import Combine, Plan, flatten, in_numbers, nfe
from fewstep.report.tables import ordered, setting_words, short_names
from fewstep.solver import ALIASES, Range, get, names
from fewstep.text import clean, count, span, styled

if TYPE_CHECKING:
    from fewstep.evaluate.demo import DemoResult
    from fewstep.evaluate.geometry import Geometry
    from fewstep.sampling.folder import FolderResult
    from fewstep.train.loop import Progress as TrainingProgress

__all__ = [
    "Progress",
    "TrainingBar",
    "comparison_table",
    "demo_table",
    "geometry_table",
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
        table.add_row(*map(styled, (name, solver.prediction, order, solver.summary + extra)))
    return table


def plan_table(plan: Plan) -> Table:
    """One row per operation of a plan."""
    title = styled(f"{plan.solver}, {nfe(plan)} evaluations, history of {plan.prediction}")
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

    Args:
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
        f"{count(settings['nfe'], 'evaluation')} each "
        f"({count(result.network_calls, 'network call')})",
        f"{seconds:.2f} s",
    ]
    return clean(f"{count(made, 'picture')}{kept}: {', '.join(filter(None, parts))}")


def demo_table(result: DemoResult) -> Table:
    """The demo's numbers."""
    from fewstep.report.demo import error_words, ms_words, own_error  # draws too, so it is slow

    title = f"{result.model}: {count(result.nfe, 'evaluation')}, seeds {span(result.seeds)}"
    table = _table(
        title,
        "error: RMSE to the exact solution in [-1, 1], mean over seeds ± standard error; the exact "
        f"solution is checked to {own_error(result)}",
    )
    table.add_column("solver", no_wrap=True)
    for name in ("NFE", "ms/picture", "error", ""):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.add_column("setting", overflow="fold")
    for row in (row for block in result.blocks for row in block):
        error = ("stochastic", "") if row.errors is None else error_words(row)
        about = row.about.partition(",")[0] + ", " if row.solver == "auto" else ""
        cells = (row.solver, row.nfe, ms_words(row), *error, about + row.settings)
        if row is result.exact:
            cells = (row.solver, row.nfe, ms_words(row), "0", "", row.about)
        table.add_row(*map(styled, cells), style="dim" if row is result.exact else "")
    return table


def geometry_table(result: Geometry) -> Table:
    """The shape of trajectories."""
    from fewstep.report.geometry import geometry_rows, small, trajectories  # as above

    table = _table(
        f"{result.model}: {trajectories(result)} of {len(result.sigmas)} points",
        "share: of the variance of one trajectory's points, mean over seeds ± standard deviation; "
        "distance: root mean square per pixel, mean of the points, and of the farthest one. On "
        f"twice the points the trajectories differ by {small(result.check['largest'])} at most",
    )
    table.add_column("within", no_wrap=True)
    for name in ("share of x, %", "distance", "farthest", "share of D, %", "farthest"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in geometry_rows(result):
        table.add_row(*row)
    return table


def comparison_table(record: dict[str, Any]) -> Table:
    """A comparison by budget, the best first."""
    judges, called, references = list(record["floor"]), short_names(record), record["references"]
    table = _table(
        f"{record['model']['name']} {record['model']['weights'][:8]}, seeds {record['seeds']}, "
        f"error to {references['solver']} at {references['nfe']} NFE (own error "
        f"{references['own_error']:.1e})",
        *(f"left out: {why}" for why in record.get("left_out", {}).values()),
    )
    for name in ("NFE", "sampler", "setting"):
        table.add_column(name, no_wrap=name != "setting")
    # numbers whole on a terminal of 80 columns: the settings and the heads give way, and the PSNR,
    # which only says the error again, is left to the files
    for name in ("error", *(f"excess FD-{judge}" for judge in judges), "ms"):
        table.add_column(styled(name), justify="right", min_width=0 if name == "ms" else 12)
    for row in ordered(record):
        cells = [str(row["nfe"]), called[row["sampler"]], setting_words(row)]
        spread = "" if row["error_se"] is None else f" ± {row['error_se']:.3f}"
        cells.append(f"{row['error']:.3f}{spread}")
        for judge in judges:
            fd = row["fd"][judge]
            cells.append(f"{fd['excess']:.2f} ± {fd['excess_se']:.2f}")
        table.add_row(*map(styled, cells), f"{1000 * row['seconds']:.1f}")
    return table


def _table(title: str, *notes: str) -> Table:
    return Table(
        box=None, pad_edge=False, header_style="bold", title=styled(title), title_justify="left",
        caption=Text("\n").join(map(styled, notes)), caption_justify="left",
    )  # fmt: skip


class Progress:
    """Work under way, on standard error: a bar on a terminal, else a line every 30 seconds.

    Used as a context manager; the object itself is what functions take as `report`.

    Args:
        quiet: show nothing
    """

    EVERY = 30.0  # seconds between lines

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self.console = Console(stderr=True, quiet=quiet)
        self.bar = bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[note]}", markup=False),
            bars.TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not terminal,
        )
        self.task = self.bar.add_task("starting", total=None, note="")
        self.what, self.done, self.began = "", 0, time.monotonic()
        self.said = self.began

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bar.stop()

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show how far the work is.

        Args:
            what: is under way
            done, total: in a unit of its own
            note: said behind them
        """
        what, note = clean(what, 200), clean(note, 200)
        self.bar.update(self.task, description=what, completed=done, total=total, note=note)
        now = time.monotonic()
        if what != self.what:
            self.what, self.done, self.began = what, done, now
        if self.bar.disable and now - self.said >= self.EVERY:
            self.said = now
            gone = done - self.done
            left = (now - self.began) * (total - done) / gone if gone > 0 else math.nan
            parts = [f"{what}: {done:,} of {total:,}", note, _left(left)]
            self.say(", ".join(filter(None, parts)))

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        self.console.print(clean(text), markup=False, highlight=False, soft_wrap=True)


def _left(seconds: float) -> str:
    """What remains, in words; nothing where it is not known."""
    if not math.isfinite(seconds) or seconds <= 0:
        return ""
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    minutes = seconds / 60
    return f"about {minutes:.0f} min left" if minutes < 90 else f"about {minutes / 60:.1f} h left"


class TrainingBar(Progress):
    """`Progress` of a training, with its loss, learning rate and speed; a line per validation.

    Args:
        total: steps
        quiet: show nothing
    """

    def __init__(self, total: int, quiet: bool = False) -> None:
        super().__init__(quiet)
        self.bar.update(self.task, description="training", total=total, note="first step")
        self.loss = math.nan

    def resumed(self, step: int) -> None:
        """Say that the run goes on from a checkpoint."""
        self.say(f"resumed at step {step}")
        self.bar.update(self.task, completed=step)

    def report(self, progress: TrainingProgress) -> None:
        """Show one step; the loss is smoothed over about 50."""
        first = math.isnan(self.loss)
        self.loss = progress.loss if first else self.loss + 0.02 * (progress.loss - self.loss)
        speed = f"{progress.per_second:.0f}"
        note = f"loss {self.loss:.4f}  lr {progress.lr:.1e}  {speed}/s"
        self("training", progress.step, progress.total_steps, note)
        if progress.validation:
            values = "  ".join(f"{k} {v:.4f}" for k, v in progress.validation.items())
            self.say(
                f"step {progress.step}/{progress.total_steps}  train {self.loss:.4f}  {values}  "
                f"{speed} pictures/s"
            )
