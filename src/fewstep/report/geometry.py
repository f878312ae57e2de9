"""How the shape of trajectories looks: one sheet for a document or a slide, and a page.

Nothing is computed here: the numbers come from `fewstep.evaluate.geometry`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from fewstep.evaluate.geometry import Geometry
from fewstep.files import write_whole
from fewstep.report.figures import COLOURS, FAINT, LINE, PAPER, draw, log_axis, saved
from fewstep.report.pages import Cell, Group, Line, render
from fewstep.text import clean, count

__all__ = ["geometry_page", "geometry_rows", "poster", "small", "trajectories", "write_geometry"]

SHOWN = 12  # trajectories drawn at most; the numbers are over all seeds
SIGMA = "\N{GREEK SMALL LETTER SIGMA}"
WITHIN = ("straight line", "1 component", "2 components", "3 components")
SPANS = ("straight line through the ends", "best line", "best plane", "best space")
BARS = 5  # components in the plot of what is left
LEAST = 1e-14  # shares below are rounding
NOISE = ("#b5502b", "#b98a3e", "#6f93a8", "#a9b4bc")  # little noise is warm


def write_geometry(result: Geometry, out: Path) -> Geometry:
    """geometry.png, .svg and .html in a folder; the result with their paths."""
    paths = tuple(out / f"geometry.{kind}" for kind in ("png", "svg", "html"))
    for path, data in zip(paths, _files(result), strict=True):
        write_whole(path, data)
    return replace(result, files=(*result.files, *paths))


def _files(result: Geometry) -> tuple[bytes, bytes, bytes]:
    return poster(result, "png"), poster(result, "svg"), geometry_page(result)


# Words.


def geometry_rows(result: Geometry) -> list[tuple[str, ...]]:
    """The table: within, share of x, mean and largest distance, share of D, largest distance."""
    x, denoised = result.x, result.denoised
    rows = []
    for k, name in enumerate(WITHIN):
        shares = [_share(one.cumulative[:, k - 1]) if k else "" for one in (x, denoised)]
        far = [small(float(one.distances[:, k].max(1).mean())) for one in (x, denoised)]
        rows.append((name, shares[0], small(x.distances[:, k].mean()), far[0], shares[1], far[1]))
    return rows


def _share(values: np.ndarray) -> str:
    """Per cent with their spread over seeds, in as many digits as the spread has to say."""
    mean = 100 * float(values.mean())
    sd = 100 * float(values.std(ddof=1)) if len(values) > 1 else 0.0
    left = sd or 100 - mean
    digits = 1 if left <= 100 * LEAST else min(9, max(1, -math.floor(math.log10(left))))
    return f"{mean:.{digits}f}" + (f" ± {sd:.{digits}f}" if len(values) > 1 else "")


def small(value: float) -> str:
    """Two significant figures."""
    if 0 < value < 1e-4:
        return f"{value:.1e}"
    return np.format_float_positional(value, precision=2, fractional=False, trim="-")


def _floor(share: float) -> str:
    """Per cent, rounded down, in as many nines as there are and one figure more."""
    left = 1 - share
    if left < 1e-9:
        return "100 %"
    digits = min(6, max(0, -math.floor(math.log10(left)) - 1))
    return f"{math.floor(100 * share * 10**digits) / 10**digits:.{digits}f} %"


def trajectories(result: Geometry) -> str:
    """How many there are."""
    n = len(result.seeds)
    return "1 trajectory" if n == 1 else f"{n} trajectories"


def _facts(result: Geometry) -> dict[str, str]:
    """The figures that sentences are made of."""
    far = [small(float(result.x.distances[:, k].max(1).mean())) for k in range(4)]
    moved = float(result.denoised.chord.mean()) / math.sqrt(result.denoised.size)
    return {
        "line": far[0], "plane": far[2], "space": far[3], "moved": small(moved),
        "in_line": _floor(float(result.x.cumulative[:, 0].mean())),
        "in_plane": _floor(float(result.x.cumulative[:, 1].mean())),
        "relative": small(100 * float(result.x.relative[:, 2].max(1).mean())),
        "check_seeds": count(int(result.check["seeds"]), "seed"),
        "check_way": small(result.check["largest"]), "check_end": small(result.check["end"]),
        "check_share": small(100 * result.check["share"]),
    }  # fmt: skip


def _title(result: Geometry) -> str:
    return f"{_facts(result)['in_plane']} of a trajectory's variance lies in one plane"


# Figures.


def _components(panels: Sequence[Axes], result: Geometry) -> LineCollection:
    """Each trajectory in its own components: the second and the third against the first, to one
    scale. The colour is the noise level; the lines that say so, for a colour bar."""
    sigmas = np.asarray(result.sigmas)
    colour = LinearSegmentedColormap.from_list("noise", list(NOISE))
    norm, lines = LogNorm(sigmas[-1], sigmas[0]), None
    paths = result.x.coordinates[:SHOWN] / math.sqrt(result.x.size)  # [n, points, 3]
    for k, axes in enumerate(panels, 1):
        pieces = [np.stack([p[:-1, [0, k]], p[1:, [0, k]]], 1) for p in paths]
        lines = LineCollection(list(np.concatenate(pieces)), cmap=colour, norm=norm, linewidths=1.5)
        lines.set_array(np.tile(np.sqrt(sigmas[:-1] * sigmas[1:]), len(paths)))
        axes.add_collection(lines)
        axes.axhline(0, color=LINE, lw=0.8, zorder=0)
        axes.set_xlabel("first component (RMS per pixel)")
        axes.set_ylabel(("second component", "third component")[k - 1])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
    far, up = float(paths[..., 0].max()), paths[..., 1:]
    room = max(float(np.abs(up).max()), 1e-4 * far)  # of straight ones, a little
    panels[0].set_xlim(1.04 * far, min(0.0, float(paths[..., 0].min())) - 0.03 * far)
    low, high = min(float(up.min()), 0.0), max(float(up.max()), 0.0)
    panels[0].set_ylim(low - 0.08 * room, high + 0.08 * room)
    assert lines is not None
    return lines


def _bar(figure: Figure | SubFigure, lines: LineCollection, panels: Sequence[Axes]) -> None:
    bar = figure.colorbar(lines, ax=list(panels), label=f"noise level {SIGMA}", pad=0.02)
    low, high = lines.get_clim()
    log_axis(bar.ax.yaxis, low or 1.0, high or 10.0)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _left(axes: Axes, result: Geometry) -> None:
    """The share of the variance that the first k components leave, for x and for D(x)."""
    least = 0.1
    axes.set_yscale("log")
    axes.set_ylim(least, 3)  # before anything is drawn: shares may all be equal
    for curves, name, colour in (
        (result.x, "x", COLOURS[1]),
        (result.denoised, f"D(x; {SIGMA}), denoised", COLOURS[0]),
    ):
        left = (1 - curves.cumulative[:, :BARS]).clip(min=LEAST)
        k, middle = np.arange(1, left.shape[1] + 1), np.exp(np.log(left).mean(0))
        low, high = np.quantile(left, (0.1, 0.9), axis=0)
        axes.fill_between(k, low, high, color=colour, alpha=0.16, lw=0)
        axes.plot(k, middle, "o-", color=colour, ms=5, lw=1.8, label=name)
        least = min(least, float(low.min()))
    axes.set_ylim(least / 3, 3)
    log_axis(axes.yaxis, least / 3, 3)
    axes.set_xticks(range(1, BARS + 1))
    axes.set_xlabel("components kept")
    axes.set_ylabel("share of variance left")
    axes.grid(axis="y")
    axes.legend(loc="lower left")


def _distances(axes: Axes, result: Geometry) -> None:
    """Distances along the way, mean over seeds, with the middle 80 % of them."""
    sigmas, distances = np.asarray(result.sigmas), result.x.distances
    for k, (name, colour) in enumerate(zip(SPANS, (FAINT, *COLOURS[:3]), strict=True)):
        low, high = np.quantile(distances[:, k], (0.1, 0.9), axis=0)
        axes.fill_between(sigmas, low, high, color=colour, alpha=0.16, lw=0)
        style = "--" if k == 0 else "-"
        axes.plot(sigmas, distances[:, k].mean(0), style, color=colour, lw=1.8, label=name)
    axes.set_xscale("log")
    log_axis(axes.xaxis, sigmas[-1], sigmas[0])
    axes.set_xlim(sigmas[0], sigmas[-1])
    axes.set_ylim(0, 1.45 * max(axes.dataLim.y1, 1e-6))
    axes.set_xlabel(f"noise level {SIGMA}")
    axes.set_ylabel("distance (RMS per pixel)")
    axes.grid(axis="y")
    axes.legend(loc="upper left")


def poster(result: Geometry, kind: str) -> bytes:
    """All plots on one sheet of 1920 x 1080, png or svg; the former says how it was made."""
    facts, protocol = _facts(result), result.protocol
    subtitle = (
        f"{result.model}. At the farthest {facts['line']} a pixel from a straight line, "
        f"{facts['plane']} from a plane; the picture seen in it, D(x; {SIGMA}), moves by "
        f"{facts['moved']}."
    )
    foot = (
        f"{protocol['trajectories']}; seeds {protocol['seeds']}; weights "
        f"{result.settings['weights'][:8]}; {protocol['software']}"
    )

    def paint(figure: Figure, narrow: bool) -> None:
        rows: Any = figure.subfigures(3, 1, height_ratios=(1.1, 8, 0.35))
        head, body, end = rows
        head.text(0.015, 0.62, _title(result), size=20, weight="bold", va="center")
        head.text(0.015, 0.2, clean(subtitle), size=12, color=FAINT, va="center")
        end.text(0.015, 0.5, clean(foot), size=9, color=FAINT, va="center")
        above, below = body.subfigures(2, 1)
        panels = above.subplots(1, 2, sharex=True, sharey=True)
        _bar(above, _components(panels, result), panels)
        panels[0].set_title("Each trajectory in its own plane")
        panels[1].set_title("and out of it, to the same scale")
        left, right = below.subplots(1, 2)
        _left(left, result)
        left.set_title("What the components leave")
        _distances(right, result)
        right.set_title("How far they are from lines and planes")

    metadata: dict[str, Any] = {"Software": None, "fewstep": json.dumps(protocol)}
    return saved(paint, (12.8, 7.2), paper=PAPER, kind=kind, metadata=metadata)


def geometry_page(result: Geometry) -> bytes:
    """The report as one HTML file that needs nothing else."""

    def components(figure: Figure, narrow: bool) -> None:
        shape = (2, 1) if narrow else (1, 2)
        panels = figure.subplots(*shape, sharex=True, sharey=True)
        _bar(figure, _components(panels, result), panels)

    heads = [
        "within",
        "share of x, %",
        "distance",
        "farthest",
        f"share of D(x; {SIGMA}), %",
        "farthest",
    ]
    lines = [Line(name, "", [Cell(one) for one in cells]) for name, *cells in geometry_rows(result)]
    return render(
        "geometry.html.j2",
        kicker=f"fewstep geometry, {result.model}",
        title=_title(result),
        facts=_facts(result),
        trajectories=trajectories(result),
        points=len(result.sigmas),
        shown=min(SHOWN, len(result.seeds)),
        components=draw(components, 3.9, 6.6),
        left=draw(lambda figure, narrow: _left(figure.subplots(), result), 4.0, 3.6),
        distances=draw(lambda figure, narrow: _distances(figure.subplots(), result), 4.0, 3.9),
        heads=heads,
        groups=[Group("", lines)],
        protocol=list(result.protocol.items()),
    )
