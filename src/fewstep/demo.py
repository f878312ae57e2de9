"""The demo: every solver family on the same seeds, beside the exact solution.

    error of a picture = sqrt(mean((x - x_exact)^2))        x in [-1, 1], both at sigma_min

x_exact is a fine solve of the same probability-flow ODE from the same noise. A second fine solve,
by another method on another grid, says how exact it is. Every solver runs with the package's
defaults, the Karras grid over the model's range and no analytic step: nothing is chosen on the
pictures shown. "auto" runs with what the model's card names for the budget. The stochastic solvers
leave the ODE, so they have pictures but no error.
"""

from __future__ import annotations

import base64
import datetime
import errno
import html
import io
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table
from torch import Tensor

from fewstep import __version__
from fewstep.denoiser import Counted
from fewstep.files import write_whole
from fewstep.loop import iterate, solve
from fewstep.models import Model, load
from fewstep.pictures import write_png
from fewstep.sampling import Settings
from fewstep.solver import get, intervals_for

__all__ = ["FAMILIES", "STOCHASTIC", "DemoResult", "Row", "render_table", "run_demo"]

# One of each family. lms, ipndm-v and deis-rho are one method under three names.
FAMILIES = (
    "ddim", "heun", "dpm-solver-2", "dpm-solver-3", "dpmpp-2s", "dpmpp-2m", "dpmpp-3m",
    "exp-adams-3", "unipc-2", "deis-3", "ipndm-2", "ipndm-4", "lms-3",
)  # fmt: skip
STOCHASTIC = ("ddim-eta", "churn", "dpmpp-2m-sde")

# On the built-in network these two differ by 1e-4, most of which is the second one's error. RMSE of
# solvers at 5 evaluations is 0.1 and more.
EXACT = ("exp-adams-4", 80, "karras")
CHECK = ("dpm-solver-3", 120, "log-snr")
CHECK_SEEDS = 4
FINER = 8  # the exact solution spends at least so many times the budget
ROUNDS = 3  # timings per solver, of which the median counts
TIMING_SECONDS = 30.0  # no further round once the last one would end later than this
SHOWN = 16  # pictures in a row at most; the numbers are over all seeds


@dataclass(frozen=True, eq=False)
class Row:
    """One solver's run.

    solver: as registered, or "auto"; about: what it is; settings: how it ran; nfe: evaluations
    spent, counted; ms: milliseconds per picture; x: where it ended, float32 [n, c, h, w]; pictures:
    the same, uint8 [n, h, w, c]; errors: RMSE to the exact solution for each seed [n], None for a
    stochastic solver.
    """

    solver: str
    about: str
    settings: str
    nfe: int
    ms: float
    x: np.ndarray
    pictures: np.ndarray
    errors: np.ndarray | None

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
    """What the demo computed and wrote.

    rows: the ODE solvers by error, then the stochastic ones; exact: the reference, whose errors are
    its distances to the check on the first seeds; protocol: how to make all this again, in words;
    files: what was written.
    """

    model: str
    nfe: int
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    exact: Row
    protocol: dict[str, str]
    files: tuple[Path, ...] = ()

    @property
    def ode_rows(self) -> list[Row]:
        return [row for row in self.rows if row.errors is not None]

    @property
    def stochastic_rows(self) -> list[Row]:
        return [row for row in self.rows if row.errors is None]


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

    nfe: the budget; a solver that cannot spend it gets the next larger one that it can; solvers:
    these instead of all; command: what the report gives as its origin; report: called with what is
    under way, and with the work done and in total, in evaluations of one picture.

    Errors: OSError where `out` cannot be written, before any work; ValueError for unknown names.
    """
    out, seeds = Path(out), tuple(int(seed) for seed in seeds)
    if not seeds:
        raise ValueError("seeds must name at least one picture")
    if nfe < 1:
        raise ValueError(f"nfe must be at least 1, got {nfe}")
    _check_writable(out)
    model = load(model_name)
    names = list(dict.fromkeys(solvers or ("auto", *FAMILIES, *STOCHASTIC)))
    chosen = {name: _settings(model, name, nfe) for name in names}
    x_T, denoiser = model.prior(seeds, label=label), Counted(model.denoiser(label))
    exact, check = _fine(EXACT, nfe), _fine(CHECK, nfe)
    few = min(len(seeds), CHECK_SEEDS)
    each = sum(settings.nfe for settings in chosen.values()) * len(seeds)
    total = exact.nfe * len(seeds) + check.nfe * few + ROUNDS * each
    bench = _Bench(denoiser, x_T, seeds, total, report)
    x, seconds = bench.watched("exact solution", exact, len(seeds))
    other, _ = bench.watched("check of it", check, few)
    reference = _row(model, "exact solution", exact, _Run(x, exact.nfe, [seconds]), other)
    runs = _race(bench, chosen)
    report("writing", total, total)

    rows = []
    for name, settings in chosen.items():
        target = None if _solver(settings).stochastic else x
        rows.append(_row(model, name, settings, runs[name], target, nfe))
    rows.sort(key=lambda row: math.inf if row.rmse is None else row.rmse)
    rounds = len(runs[names[0]].seconds)
    protocol = _protocol(model, command, seeds, label, exact, check, few, rounds)
    result = DemoResult(model.card.name, nfe, seeds, tuple(rows), reference, protocol)
    files = (out / "demo.png", out / "demo.html")
    write_png(files[0], np.asarray(_poster(result)), protocol)
    write_whole(files[1], _page(result).encode())
    return replace(result, files=files)


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(out)) from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(out)) from None


@dataclass(frozen=True, eq=False)
class _Run:
    """Where a solver ended, [n, ...], the evaluations it spent, and the seconds of each round."""

    x: Tensor
    nfe: int
    seconds: list[float]


@dataclass
class _Bench:
    """Solves from one start against the clock, and reports the work done."""

    denoiser: Counted
    x_T: Tensor
    seeds: tuple[int, ...]
    total: int
    report: Callable[[str, int, int], None]
    done: int = 0

    def watched(self, what: str, settings: Settings, count: int) -> tuple[Tensor, float]:
        """A long solve of the first `count` seeds, reported as it goes: its end and its seconds."""
        x, seeds = self.x_T[:count], self.seeds[:count]
        self.report(what, self.done, self.total)
        begun = time.perf_counter()
        for state in iterate(self.denoiser, x, **settings.arguments(), seeds=seeds):
            x = state.x
            self.report(what, self.done + state.nfe * count, self.total)
        self.done += settings.nfe * count
        return x, time.perf_counter() - begun

    def timed(self, what: str, settings: Settings) -> tuple[Tensor, float]:
        """A solve of all seeds with nothing in between: its end and its seconds."""
        self.report(what, self.done, self.total)
        begun = time.perf_counter()
        x = solve(self.denoiser, self.x_T, **settings.arguments(), seeds=self.seeds)
        seconds = time.perf_counter() - begun
        self.done += settings.nfe * len(self.seeds)
        return x, seconds


def _race(bench: _Bench, chosen: dict[str, Settings]) -> dict[str, _Run]:
    """Every solver once a round, in turn, so that a busy moment is not one solver's."""
    runs: dict[str, _Run] = {}
    begun = time.perf_counter()
    for done in range(ROUNDS):
        spent = time.perf_counter() - begun
        if done and spent * (done + 1) / done > TIMING_SECONDS:
            break
        for name, settings in chosen.items():
            before = bench.denoiser.evaluations
            x, seconds = bench.timed(name, settings)
            earlier = runs[name].seconds if name in runs else []
            runs[name] = _Run(x, bench.denoiser.evaluations - before, [*earlier, seconds])
    return runs


def _solver(settings: Settings) -> Any:
    return get(settings.solver) if isinstance(settings.solver, str) else settings.solver


def _settings(model: Model, name: str, nfe: int) -> Settings:
    """The defaults, or the card's choice for "auto", at the first budget from nfe on that fits."""
    settings = Settings.choose(model, name, nfe)
    if not isinstance(settings.grid, str):
        return settings
    solver = _solver(settings)
    for budget in range(nfe, nfe + 8):
        try:
            intervals_for(solver, budget, settings.first, settings.final)
        except ValueError:
            continue
        return Settings(**{**settings.arguments(), "nfe": budget})
    intervals_for(solver, nfe, settings.first, settings.final)  # raises, and says why
    return settings


def _fine(recipe: tuple[str, int, str], nfe: int) -> Settings:
    solver, least, grid = recipe
    return Settings(solver, max(least, FINER * nfe - FINER * nfe % 3), grid, "none", False)


def _row(
    model: Model,
    name: str,
    settings: Settings,
    run: _Run,
    target: Tensor | None,
    nfe: int | None = None,
) -> Row:
    """target: what errors are measured to, perhaps of fewer pictures; nfe: the budget asked for."""
    solver = _solver(settings)
    errors = None
    if target is not None:
        gap = run.x[: len(target)].double() - target.double()
        errors = gap.flatten(1).square().mean(1).sqrt().cpu().numpy()
    grid = settings.grid if isinstance(settings.grid, str) else "its own"
    words = [f"{grid} grid"]
    if settings.first != "none":
        words.append(f"analytic first step ({settings.first})")
    if settings.final:
        words.append("last denoising step")
    if nfe is not None and run.nfe != nfe:
        words.append(f"cannot spend {nfe}")
    about = solver.summary
    if name == "auto":
        what = "the card's choice" if model.card.auto else "as the card names none"
        about = f"{solver.name}, {what}"
    elif name != solver.name:
        about = solver.name
    return Row(
        name,
        about,
        ", ".join(words),
        run.nfe,
        1000 * statistics.median(run.seconds) / len(run.x),
        run.x.cpu().numpy(),
        model.decode(run.x),
        errors,
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    times = f"median of {rounds} rounds" if rounds > 1 else "one round"
    return {
        "command": command,
        "model": f"{model.card.name}, weights SHA-256 {model.card.weights_sha256}",
        "label": "none: the network without class" if label is None else str(label),
        "seeds": _span(seeds),
        "exact solution": f"{exact.solver}, {exact.nfe} evaluations, {exact.grid} grid",
        "check of it": f"{check.solver}, {check.nfe} evaluations, {check.grid} grid, "
        f"seeds {_span(seeds[:few])}",
        "time": f"all {len(seeds)} pictures as one batch, after a warm-up, {times}",
        "software": f"fewstep {__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "machine": f"{platform.system()} {platform.machine()}, {_count(cores or 1, 'core')}, "
        f"{_count(torch.get_num_threads(), 'thread')}",
        "date": datetime.datetime.now().astimezone().date().isoformat(),
    }


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _span(seeds: Sequence[int]) -> str:
    first, last = seeds[0], seeds[-1]
    if len(seeds) > 2 and tuple(seeds) == tuple(range(first, last + 1)):
        return f"{first} to {last}"
    return ", ".join(map(str, seeds))


def _own_error(result: DemoResult) -> str:
    """The exact solution's distance to its check, one figure."""
    assert result.exact.rmse is not None
    return np.format_float_positional(result.exact.rmse, precision=1, fractional=False, trim="-")


def _ms(row: Row) -> str:
    return f"{row.ms:.1f}" if row.ms < 9.95 else f"{row.ms:.0f}"


def _error(row: Row) -> tuple[str, str]:
    """The error and its standard error, in figures."""
    assert row.rmse is not None
    spread = row.standard_error
    return f"{row.rmse:.3f}", "" if spread is None else f"± {spread:.3f}"


def render_table(result: DemoResult) -> Table:
    """The numbers, for a terminal."""
    table = Table(
        title=f"{result.model}: {result.nfe} evaluations, seeds {_span(result.seeds)}",
        title_justify="left",
        caption=f"error: RMSE to the exact solution in [-1, 1], mean over seeds ± standard error; "
        f"the exact solution is checked to {_own_error(result)}",
        caption_justify="left",
        box=None,
    )
    table.add_column("solver", no_wrap=True)
    for name in ("NFE", "ms/picture", "error", ""):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    table.add_column("settings", overflow="fold")
    exact = result.exact
    table.add_row(exact.solver, str(exact.nfe), _ms(exact), "0", "", exact.about, style="dim")
    for row in result.rows:
        error = ("stochastic", "") if row.errors is None else _error(row)
        about = row.about.partition(",")[0] + ", " if row.solver == "auto" else ""
        table.add_row(row.solver, str(row.nfe), _ms(row), *error, about + row.settings)
    return table


def _caption(result: DemoResult, row: Row) -> str:
    """What stands under a solver's name beside its pictures."""
    if row is result.exact:
        return _count(row.nfe, "evaluation")
    if row.errors is None:
        return f"{_count(row.nfe, 'evaluation')}, stochastic"
    error = f"error {_error(row)[0]}"
    return f"{row.about.partition(',')[0]}, {error}" if row.solver == "auto" else error


def _full_bar(result: DemoResult) -> float:
    """The error that fills a bar: the worst, but at most 1, the way from black to middle grey."""
    return min(1.0, max((row.rmse or 0.0 for row in result.ode_rows), default=1.0)) or 1.0


def _exceeds(result: DemoResult, row: Row) -> bool:
    """Whether a solver had another budget than the rest."""
    return row is not result.exact and row.nfe != result.nfe


def _title(result: DemoResult) -> str:
    names = {row.solver for row in result.rows} - {"auto"} or {"auto"}
    return f"Same noise, {_count(result.nfe, 'evaluation')}, {_count(len(names), 'solver')}"


def _headline(result: DemoResult) -> str:
    """What there is to see, in a sentence or two."""
    text = "Each column starts from one noise; each row takes it to a picture with another solver."
    if result.ode_rows:
        best, exact = result.ode_rows[0], result.exact
        text += (
            f" The closest to the exact solution is {best.solver}: {_count(best.nfe, 'evaluation')}"
            f" and {_ms(best)} ms a picture, where the exact one took {exact.nfe} and"
            f" {_ms(exact)} ms."
        )
    return text


# The picture.

PAPER, INK, FAINT, LINE, ACCENT = "#fbfaf7", "#1d1c1a", "#77736b", "#dcd8cf", "#b5502b"
MARGIN, LABELS, TILE, GAP, SKIP = 44, 292, 96, 3, 30


def _poster(result: DemoResult) -> Image.Image:
    """All strips with their labels on one sheet, RGB."""
    shown = min(len(result.seeds), SHOWN)
    scale = max(1, round(TILE / result.exact.pictures.shape[1]))
    strip = _strip(result.exact.pictures[:shown], scale, GAP)
    height, width = strip.shape[:2]
    pitch = height + 9
    left = MARGIN + LABELS
    full = max(left + width + MARGIN, 960)
    blocks = [[result.exact], result.ode_rows, result.stochastic_rows]
    blocks = [block for block in blocks if block]
    top = MARGIN + 116
    tall = top + sum(len(block) * pitch + SKIP for block in blocks) + MARGIN + 6
    sheet = Image.new("RGB", (full, tall), PAPER)
    draw = ImageDraw.Draw(sheet)

    def write(
        x: float, y: float, text: str, size: int, fill: str = INK, anchor: str = "ls"
    ) -> None:
        draw.text((x, y), text, fill=fill, font=ImageFont.load_default(size=size), anchor=anchor)

    write(MARGIN - 1, MARGIN + 30, _title(result), 38)
    same = "Every row starts from the same noise; the nearer to the top row, the better."
    write(MARGIN, MARGIN + 66, f"{result.model}. {same}", 21, FAINT)
    for i, seed in enumerate(result.seeds[:shown]):
        middle = left + (i + 0.5) * (width + GAP) / shown - GAP / 2
        write(middle, top - 8, str(seed), 17, FAINT, "ms")
    write(left - 18, top - 8, "seed", 17, FAINT, "rs")
    full = _full_bar(result)
    y = top
    for block in blocks:
        for row in block:
            alpha = _strip(row.pictures[:shown], scale, GAP)
            tile = Image.fromarray(alpha)
            sheet.paste(tile.convert("RGB"), (left, y), tile.getchannel("A"))
            base = y + height // 2
            write(MARGIN, base - 5, row.solver, 25)
            write(MARGIN, base + 22, _caption(result, row), 19, FAINT)
            if row.rmse is not None and row is not result.exact:
                long = max(2.0, (LABELS - 24) * min(1.0, row.rmse / full))
                draw.rectangle((MARGIN, base + 32, MARGIN + long, base + 35), fill=ACCENT)
                if _exceeds(result, row):
                    write(left - 24, base + 22, f"{row.nfe} evaluations", 17, ACCENT, "rs")
            y += pitch
        y += SKIP
        if block is not blocks[-1]:
            rule = y - SKIP // 2 - 5
            draw.line((MARGIN, rule, left + width, rule), fill=LINE, width=2)
    foot = "error: RMSE to the exact solution, pixels in [-1, 1], mean over"
    write(MARGIN, tall - MARGIN, f"{foot} {_count(len(result.seeds), 'seed')}", 19, FAINT)
    return sheet


def _strip(pictures: np.ndarray, scale: int, gap: int) -> np.ndarray:
    """Pictures side by side, enlarged, with transparent gaps: uint8 [h, w, c + 1]."""
    n, height, width, channels = pictures.shape
    big = pictures.repeat(scale, axis=1).repeat(scale, axis=2)
    cells = np.zeros((n, height * scale, width * scale + gap, channels + 1), dtype=np.uint8)
    cells[:, :, : width * scale, :channels] = big
    cells[:, :, : width * scale, channels] = 255
    return np.concatenate(list(cells), axis=1)[:, : -gap or None]


# The page.

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --ink: #1d1c1a; --faint: #6f6b63;
  --line: #e1ddd4; --accent: #b5502b; --wash: #f2efe8; }
@media (prefers-color-scheme: dark) { :root { --paper: #161513; --ink: #ece9e2; --faint: #9a958a;
  --line: #34312c; --accent: #e0895f; --wash: #211f1c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
  sans-serif; }
main { width: max-content; max-width: 100%; margin: 0 auto; padding: 56px 24px 72px; }
h1 { font-size: clamp(1.7rem, 1.2rem + 2vw, 2.5rem); line-height: 1.15; margin: 0 0 14px;
  font-weight: 650; letter-spacing: -.02em; text-wrap: balance; }
h2 { font-size: 1.15rem; margin: 60px 0 12px; font-weight: 650; letter-spacing: -.005em; }
p { max-width: 68ch; margin: 0 0 12px; text-wrap: pretty; }
.kicker, .hint, .about, .seeds, .note { color: var(--faint); }
.kicker { margin: 0 0 6px; font-size: .92rem; }
.lead { font-size: 1.1rem; line-height: 1.5; }
.hint { font-size: .92rem; margin-bottom: 24px; }
table { border-collapse: collapse; }
th { font-weight: 400; text-align: left; }
.figure { font-variant-numeric: tabular-nums; }
.strips { display: block; }
.strips tbody, .strips tr, .strips th, .strips td { display: block; padding: 0; }
.strips tbody + tbody { margin-top: 18px; border-top: 1px solid var(--line); padding-top: 14px; }
.strips th { padding: 12px 0 4px; line-height: 1.3; }
.strips th b { font-weight: 600; margin-right: .5em; }
.strips .about { font-size: .86rem; }
.strips .off, .numbers .off { color: var(--accent); }
.strip { width: min(100%, calc(var(--w) * 2px)); aspect-ratio: var(--w) / var(--h);
  background: var(--exact) 0 0 / 100% 100% no-repeat; image-rendering: pixelated; }
.strip img { display: block; width: 100%; height: 100%; image-rendering: pixelated; }
@media (hover: hover) { .strip:hover img { opacity: 0; } }
@media (hover: none) { .pointer { display: none; } }
.seeds { display: flex; width: min(100%, calc(var(--w) * 2px)); font-size: .78rem; }
.seeds span { flex: 1; text-align: center; }
.numbers { width: 100%; max-width: 1020px; }
.numbers th, .numbers td { padding: 7px 0 7px 20px; border-bottom: 1px solid var(--line);
  vertical-align: top; line-height: 1.35; }
.numbers th:first-child { padding-left: 0; }
.numbers thead th { color: var(--faint); font-size: .86rem; border-bottom-color: var(--faint);
  vertical-align: bottom; }
.numbers .about { display: block; font-size: .86rem; }
.numbers tbody b { font-weight: 600; }
.right, .numbers thead th.right { text-align: right; }
.numbers td.settings { font-size: .86rem; color: var(--faint); padding-top: 9px; width: 20%;
  text-wrap: balance; }
.numbers .narrow { display: none; } .numbers thead th { white-space: nowrap; }
.numbers td.error { width: 34%; }
.cell { display: flex; align-items: center; gap: 12px; }
.cell .value { white-space: nowrap; }
.cell small { color: var(--faint); font-size: .82rem; margin-left: .3em; }
.track { flex: 1; min-width: 0; }
.bar { height: 9px; border-radius: 1px; background: var(--accent); min-width: 2px; }
.note { font-size: .92rem; }
ul { max-width: 68ch; padding-left: 1.1em; margin: 0; } li { margin-bottom: 6px; }
dl { display: grid; grid-template-columns: 150px 1fr; gap: 5px 16px; margin: 0; font-size: .92rem;
  max-width: 1020px; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  background: var(--wash); padding: .12em .38em; border-radius: 4px; }
@media (max-width: 840px) { .numbers .settings { display: none; }
  .numbers .narrow { display: inline; } }
@media (max-width: 620px) { main { padding: 32px 16px 48px; } .track { display: none; }
  .numbers td.error { width: auto; } .numbers th, .numbers td { padding-left: 12px; }
  .numbers thead th { white-space: normal; }
  .numbers small { display: block; margin: 0; } dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 10px; } .seeds { font-size: .66rem; } h2 { margin-top: 44px; } }
"""

# From this width on, the label stands beside its strip and a pixel is {k} pixels.
WIDE = """@media (min-width: {least}px) {{
  .strips tr {{ display: grid; grid-template-columns: 232px auto; align-items: center;
    margin-bottom: 5px; }}
  .strips th {{ padding: 0 16px 0 0; }} .strips th b, .strips th .about {{ display: block; }}
  .strip, .seeds {{ width: {width}px; }} }}
"""


def _page(result: DemoResult) -> str:
    """The report as one HTML file that needs nothing else."""
    shown = min(len(result.seeds), SHOWN)
    height, width = _strip(result.exact.pictures[:shown], 1, 1).shape[:2]
    # 232 for the label, 48 for the margins, 20 for a scroll bar
    wide = "".join(WIDE.format(least=300 + k * width, width=k * width) for k in (2, 3))
    exact = _data_url(result.exact.pictures[:shown])
    sizes = f":root {{ --w: {width}; --h: {height}; --exact: url({exact}); }}\n"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "img-src data:; style-src 'unsafe-inline'\">",
            f"<title>fewstep demo: {html.escape(_title(result))}</title>",
            f"<style>{STYLE}{sizes}{wide}</style>\n</head>\n<body>\n<main>",
            f'<p class="kicker">fewstep demo, {html.escape(result.model)}</p>',
            f"<h1>{html.escape(_title(result))}</h1>",
            f'<p class="lead">{html.escape(_headline(result))}</p>',
            f'<p class="hint">{_hint(result, shown)}</p>',
            *_strips(result, shown),
            "<h2>Numbers</h2>",
            *_numbers(result),
            "<h2>How to read them</h2>\n<ul>",
            *(f"<li>{html.escape(note)}</li>" for note in _notes(result)),
            "</ul>\n<h2>Protocol</h2>\n<dl>",
            *_protocol_items(result),
            "</dl>\n</main>\n</body>\n</html>\n",
        ]
    )


def _hint(result: DemoResult, shown: int) -> str:
    text = "Hold the pointer over a row to see the exact solution in its place."
    more = len(result.seeds) - shown
    note = f"The numbers are over {_count(more, 'more seed')} than the pictures." if more else ""
    return f'<span class="pointer">{text}</span> {note}'


def _strips(result: DemoResult, shown: int) -> Iterator[str]:
    seeds = "".join(f"<span>{seed}</span>" for seed in result.seeds[:shown])
    yield '<table class="strips">\n<tbody>'
    yield f'<tr><th class="about">seed</th><td><div class="seeds figure">{seeds}</div></td></tr>'
    for block in ([result.exact], result.ode_rows, result.stochastic_rows):
        if block and block[0] is not result.exact:
            yield "</tbody>\n<tbody>"
        for row in block:
            name = html.escape(row.solver)
            about = html.escape(_caption(result, row))
            if _exceeds(result, row) and row.errors is not None:
                about += f', <span class="off">{row.nfe} evaluations</span>'
            text = f"pictures by {name} for seeds {_span(result.seeds[:shown])}"
            image = "" if row is result.exact else _data_url(row.pictures[:shown])
            inner = f'<img alt="{text}" src="{image}">' if image else ""
            role = "" if image else f' role="img" aria-label="{text}"'
            yield (
                f'<tr><th scope="row"><b>{name}</b><span class="about figure">{about}</span></th>'
                f'<td><div class="strip"{role}>{inner}</div></td></tr>'
            )
    yield "</tbody>\n</table>"


def _numbers(result: DemoResult) -> Iterator[str]:
    yield (
        '<table class="numbers"><thead><tr><th scope="col">solver</th>'
        '<th scope="col" class="settings">settings</th><th scope="col" class="right">NFE</th>'
        '<th scope="col" class="right">ms a picture</th>'
        '<th scope="col">error</th></tr></thead>\n<tbody>'
    )
    full = _full_bar(result)
    for row in (result.exact, *result.rows):
        if row is result.exact:
            error = f'<span class="about">checked to {_own_error(result)}</span>'
        elif row.errors is None:
            error = '<span class="about">stochastic</span>'
        else:
            value, spread = _error(row)
            share = 100 * min(1.0, (row.rmse or 0.0) / full)
            error = (
                f'<div class="cell"><span class="value">{value}<small>{spread}</small></span>'
                f'<div class="track"><div class="bar" style="width:{share:.1f}%"></div></div></div>'
            )
        off = " off" if _exceeds(result, row) else ""
        settings = html.escape(row.settings)
        yield (
            f'<tr><th scope="row"><b>{html.escape(row.solver)}</b>'
            f'<span class="about">{html.escape(row.about)}'
            f'<span class="narrow">; {settings}</span></span></th>'
            f'<td class="settings">{settings}</td>'
            f'<td class="right figure{off}">{row.nfe}</td>'
            f'<td class="right figure">{_ms(row)}</td>'
            f'<td class="error figure">{error}</td></tr>'
        )
    yield "</tbody></table>"


def _notes(result: DemoResult) -> Iterator[str]:
    count = len(result.seeds)
    yield (
        "NFE is the number of network evaluations for one picture, counted while the solver ran. "
        f"A solver that cannot spend exactly {result.nfe} has the next larger budget that it can: "
        "so much is in its favour."
    )
    yield (
        "Error is the root of the mean squared difference to the exact solution, pixels in "
        f"[-1,\u00a01], at the grid's end; the mean over {_count(count, 'seed')}, ± the standard "
        "error of that mean. One grey level of 256 is 0.008. The bars stop at 1."
    )
    yield (
        "Every solver runs with the defaults: the Karras grid, no analytic step. Nothing was "
        "chosen on these seeds. Many solvers do better on a grid of their own, so this is not each "
        "at its best. auto is what the model's card names for the budget, or dpmpp-2m where it "
        "names nothing."
    )
    yield (
        "The exact solution was checked by another solver on another grid; the two differ by "
        f"{_own_error(result)}."
    )
    if result.stochastic_rows:
        yield (
            "The stochastic solvers add noise on the way and end elsewhere, so a distance to the "
            "exact solution of the ODE would say nothing about them."
        )
    yield f"{_count(count, 'seed')} can only rank solvers roughly; judge a close call on more."


def _protocol_items(result: DemoResult) -> Iterator[str]:
    for name, value in result.protocol.items():
        text = html.escape(value)
        yield f"<dt>{name}</dt><dd>{f'<code>{text}</code>' if name == 'command' else text}</dd>"


def _data_url(pictures: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(_strip(pictures, 1, 1)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
