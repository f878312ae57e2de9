"""Figures by matplotlib, as SVG on no ground of their own, for a wide and for a narrow screen.

Names are plain text: mathematics is off. The bytes depend on the numbers and matplotlib's version.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from fewstep.report.pages import data_url

__all__ = [
    "COLOURS",
    "INK",
    "PAPER",
    "Curve",
    "Drawn",
    "curves",
    "draw",
    "log_axis",
    "ranking",
    "saved",
]

PAPER, INK, FAINT, LINE = "#fbfaf7", "#1d1c1a", "#6f6b63", "#d8d3c8"
# Told apart in print and by most colour-blind readers: hue and lightness both change.
COLOURS = ("#b5502b", "#1f5f8b", "#5a8f3c", "#c08a1e", "#7a4f9e", "#2aa198", "#8c857a")
MARKERS, DASHES = "osD^vPX", ("-", "--", ":")
BOLD = 4  # curves drawn stronger than the others
STYLE: Any = {
    "font.family": "sans-serif", "font.size": 10, "text.parse_math": False,
    "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.labelsize": 10, "axes.labelcolor": FAINT, "axes.edgecolor": LINE,
    "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "auto",
    "text.color": INK, "axes.titlecolor": INK, "xtick.color": FAINT, "ytick.color": FAINT,
    "xtick.labelsize": 9, "ytick.labelsize": 9, "axes.spines.top": False,
    "axes.spines.right": False, "grid.color": LINE, "grid.linewidth": 0.7,
    "legend.frameon": False, "legend.fontsize": 9, "svg.hashsalt": "fewstep",
}  # fmt: skip
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")  # never mathematics

Painter = Callable[[Figure, bool], None]


@dataclass(frozen=True)
class Drawn:
    """Addresses of one figure, for a wide and for a narrow screen."""

    wide: str
    narrow: str


@dataclass(frozen=True)
class Curve:
    """What one sampler has, budget by budget.

    Args:
        name: in the legend
        nfe, ms: evaluations and wall time, [k]
        value, spread: less is better; its standard error, [k]
    """

    name: str
    nfe: Sequence[float]
    ms: Sequence[float]
    value: Sequence[float]
    spread: Sequence[float]


def saved(
    paint: Painter, size: tuple[float, float], narrow: bool = False, paper: str = "none",
    kind: str = "svg", metadata: dict[str, Any] | None = None,
) -> bytes:  # fmt: skip
    """A figure as a file.

    Args:
        paint: draws on the figure, and is told whether it is narrow
        size: inches
        paper: its ground
        kind: svg or png
    """
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # shown as a box
        figure = Figure(figsize=size, layout="constrained", facecolor=paper)
        paint(figure, narrow)
        buffer = io.BytesIO()
        known = {"Date": None, "Creator": "fewstep"} if kind == "svg" else metadata
        figure.savefig(buffer, format=kind, dpi=150, metadata=known)
    return buffer.getvalue()


def draw(paint: Painter, high: float, narrow_high: float) -> Drawn:
    """For a page: 9.6 and 3.9 inches wide, so that letters keep a size that can be read."""
    wide, narrow = (
        saved(paint, (9.6, high)), saved(paint, (3.9, narrow_high), narrow=True)
    )  # fmt: skip
    return Drawn(data_url(wide, "svg+xml"), data_url(narrow, "svg+xml"))


def log_axis(axis: Axis, low: float, high: float) -> None:
    """Plain numbers at 1, 2 and 5 times powers of ten, at fewer where it spans many."""
    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(PLAIN)


def _budget_axis(axes: Axes, budgets: Sequence[float], room: int) -> None:
    """A log axis with a mark at each budget, and a number at as many as do not touch."""
    axes.set_xscale("log")
    least, named = (budgets[-1] / budgets[0]) ** (1 / room), [budgets[0]]
    for nfe in budgets[1:]:
        named += [nfe] if nfe >= 0.999 * least * named[-1] else []
    axes.xaxis.set_major_locator(FixedLocator(named))
    axes.xaxis.set_minor_locator(FixedLocator(list(budgets)))
    axes.xaxis.set_major_formatter(PLAIN)
    axes.xaxis.set_minor_formatter(NullFormatter())


def _value_axis(axes: Axes, axis: Axis, values: np.ndarray) -> None:
    """Logarithmic where every value [n, 2] is clear of 0; else straight up to a standard error and
    logarithmic beyond."""
    y, spread = values.T
    low, high = float((y - 2 * spread).min()), float((y + 2 * spread).max())
    sideways = axis is axes.xaxis
    scale, limits = (
        (axes.set_xscale, axes.set_xlim) if sideways else (axes.set_yscale, axes.set_ylim)
    )
    if low > 0:
        scale("log")
        limits(low / 1.15, high * 1.15)
        log_axis(axis, low, high)
    else:
        straight = max(float(np.median(spread)), float(np.abs(y).max()) / 1000, 1e-12)
        scale("symlog", linthresh=straight)
        limits(1.3 * low, 1.3 * max(high, straight))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(PLAIN)


def curves(figure: Figure, narrow: bool, lines: Sequence[Curve], title: str) -> None:
    """A scale against evaluations and against wall time; the first lines are drawn stronger."""
    panels = figure.subplots(2, 1) if narrow else figure.subplots(1, 2, sharey=True)
    budgets = sorted({nfe for line in lines for nfe in line.nfe})
    values = np.concatenate([np.stack([line.value, line.spread], 1) for line in lines])
    handles = []
    for axes, sideways in zip(panels, ("nfe", "ms"), strict=True):
        handles = [
            axes.errorbar(
                getattr(line, sideways), line.value, yerr=2 * np.asarray(line.spread),
                color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
                linestyle=DASHES[i // len(COLOURS) % len(DASHES)], ms=5 if i < BOLD else 4,
                lw=2.4 if i < BOLD else 1.2, elinewidth=1.0, zorder=3 if i < BOLD else 2,
            )
            for i, line in enumerate(lines)
        ]  # fmt: skip
        axes.grid(axis="y")
        _value_axis(axes, axes.yaxis, values)
    _budget_axis(panels[0], budgets, 8 if narrow else 14)
    panels[0].set_xlabel("evaluations")
    times = [ms for line in lines for ms in line.ms]
    panels[1].set_xscale("log")
    log_axis(panels[1].xaxis, min(times), max(max(times), 1.01 * min(times)))
    panels[1].set_xlabel("wall time, ms a picture")
    for axes in panels if narrow else panels[:1]:
        axes.set_ylabel(title)
    names = [line.name for line in lines]
    figure.legend(handles, names, loc="outside lower center", ncols=2 if narrow else 5)


def ranking(
    figure: Figure, narrow: bool, names: Sequence[str], scales: Sequence[tuple[str, np.ndarray]]
) -> None:
    """Samplers down, a panel for each scale across.

    Args:
        scales: titles, and values with standard errors [n, 2], NaN where there is none
    """
    shape = (len(scales), 1) if narrow else (1, len(scales))
    panels = np.atleast_1d(figure.subplots(*shape, sharey=True)).ravel()
    for axes, (title, values), colour in zip(panels, scales, COLOURS, strict=False):
        rows = np.arange(len(names))
        axes.errorbar(values[:, 0], rows, xerr=2 * values[:, 1], fmt="o", ms=6, color=colour)
        axes.grid(axis="both")
        known = values[~np.isnan(values[:, 0])]
        if len(known):
            _value_axis(axes, axes.xaxis, known)
        axes.set_xlabel(title)
        axes.tick_params(axis="y", labelleft=narrow or axes is panels[0], labelcolor=INK, length=0)
    panels[0].set_yticks(range(len(names)), list(names))
    panels[0].set_ylim(len(names) - 0.4, -0.6)
