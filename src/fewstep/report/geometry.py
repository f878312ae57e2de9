"""How the shape of trajectories looks: a table for the terminal, a picture, a self-contained page.

Nothing is computed here; `fewstep.evaluate.geometry` is where the numbers come from. The plots need
matplotlib (`pip install 'fewstep[evaluate]'`), which is imported only where they are drawn.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from fewstep.files import write_whole
from fewstep.report.demo_page import STYLE, count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from mpl_toolkits.mplot3d import Axes3D

    from fewstep.evaluate.geometry import Geometry

__all__ = ["check_matplotlib", "page", "poster", "render_table", "write"]

SHOWN = 12  # trajectories drawn at most; the numbers are over all seeds
SIGMA = "\N{GREEK SMALL LETTER SIGMA}"
LINES = ("straight line", "1 component", "2 components", "3 components")
BARS = 5  # components in the plot of what is left
LABELLED = 3  # of these, how many have their share beside them
LEAST = 1e-14  # shares below are rounding

# Dark colours are the light ones', lifted. Levels of noise go from cool and pale to warm.
LIGHT = {
    "paper": "#fbfaf7",
    "ink": "#1d1c1a",
    "faint": "#6f6b63",
    "line": "#e1ddd4",
    "series": ("#8d887d", "#b5502b", "#2d6a8e", "#5f8f4e"),
    "noise": ("#c3cbd1", "#6f93a8", "#b98a3e", "#b5502b"),
}
DARK = {
    "paper": "#161513",
    "ink": "#ece9e2",
    "faint": "#9a958a",
    "line": "#34312c",
    "series": ("#8d887d", "#e0895f", "#79b0d3", "#98c487"),
    "noise": ("#4a535a", "#7fa6bd", "#d3a658", "#e0895f"),
}


def check_matplotlib() -> None:
    """Errors: ValueError where it is missing, before any work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "the plots need matplotlib: pip install 'fewstep[evaluate]', or leave them out with "
            "--no-plots"
        )


def write(result: Geometry, out: Path) -> list[Path]:
    """geometry.png, geometry.svg and geometry.html in `out`; the paths."""
    paths = [out / f"geometry.{kind}" for kind in ("png", "svg", "html")]
    write_whole(paths[0], poster(result, "png"))
    write_whole(paths[1], poster(result, "svg"))
    write_whole(paths[2], page(result).encode())
    return paths


# The terminal.


def render_table(result: Geometry) -> Table:
    """The numbers, for a terminal."""
    check = result.check
    table = Table(
        title=f"{result.model}: {_trajectories(result)} of {len(result.sigmas)} points",
        title_justify="left",
        caption="share: of the variance of one trajectory's points, mean over seeds ± standard "
        "deviation; distance: root mean square per pixel, mean of the points, and of the farthest "
        f"one. On twice the points the trajectories differ by {_figure(check['largest'])} at most",
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("within", no_wrap=True)
    for name in ("share of x, %", "distance", "farthest", "share of D, %", "farthest"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in _rows(result):
        table.add_row(*row)
    return table


def _rows(result: Geometry) -> Iterator[tuple[str, ...]]:
    x, denoised = result.x, result.denoised
    for k, name in enumerate(LINES):
        shares = ["", ""]
        if k:
            shares = [_share(curves.cumulative[:, k - 1]) for curves in (x, denoised)]
        yield (
            name,
            shares[0],
            _figure(x.distances[:, k].mean()),
            _figure(x.distances[:, k].max(1).mean()),
            shares[1],
            _figure(denoised.distances[:, k].max(1).mean()),
        )


def _share(values: np.ndarray) -> str:
    """Per cent with their spread over seeds, in as many digits as the spread has to say."""
    mean = 100 * float(values.mean())
    sd = 100 * float(values.std(ddof=1)) if len(values) > 1 else 0.0
    left = sd or 100 - mean
    digits = 1 if left <= 100 * LEAST else min(9, max(1, -math.floor(math.log10(left))))
    return f"{mean:.{digits}f}" + (f" ± {sd:.{digits}f}" if len(values) > 1 else "")


def _figure(value: float) -> str:
    """Two significant figures."""
    if 0 < value < 1e-4:
        return f"{value:.1e}"
    return np.format_float_positional(value, precision=2, fractional=False, trim="-")


# The plots.


def _style(colours: dict[str, Any]) -> Any:
    return {
        "font.family": "sans-serif",
        "font.size": 11,
        "axes.titlesize": 13,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 12,
        "axes.labelsize": 11,
        "axes.facecolor": colours["paper"],
        "figure.facecolor": colours["paper"],
        "savefig.facecolor": colours["paper"],
        "text.color": colours["ink"],
        "axes.labelcolor": colours["faint"],
        "axes.edgecolor": colours["line"],
        "axes.titlecolor": colours["ink"],
        "xtick.color": colours["faint"],
        "ytick.color": colours["faint"],
        "xtick.labelcolor": colours["faint"],
        "ytick.labelcolor": colours["faint"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "grid.color": colours["line"],
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "svg.hashsalt": "fewstep",  # the bytes depend on the numbers alone
    }


def poster(result: Geometry, kind: str, colours: dict[str, Any] = LIGHT) -> bytes:
    """All plots on one sheet of 1920 x 1080, png or svg; the former says how it was made."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style(colours)):
        figure = Figure(figsize=(12.8, 7.2))
        places = figure.add_gridspec(
            2, 2, left=0.065, right=0.975, top=0.83, bottom=0.135, hspace=0.52, wspace=0.2,
            width_ratios=(1, 1.12),
        )  # fmt: skip
        draw_plane(figure.add_subplot(places[0, 0]), result, colours)
        # its own margins are wide, so it overlaps its cell
        space = figure.add_axes((0.49, 0.435, 0.49, 0.45), projection="3d", computed_zorder=False)
        space.patch.set_alpha(0)
        draw_space(space, result, colours)  # type: ignore[arg-type]
        cell = places[0, 1].get_position(figure)
        figure.text(
            cell.x0, cell.y1 + 0.023, "The third component, to the scale of the second",
            size=13, weight="bold",
        )  # fmt: skip
        draw_left(figure.add_subplot(places[1, 0]), result, colours)
        draw_distances(figure.add_subplot(places[1, 1]), result, colours)
        figure.text(0.065, 0.945, _title(result), size=21, weight="bold", va="center")
        figure.text(0.065, 0.902, _subtitle(result), size=12.5, color=colours["faint"], va="center")
        foot = f"{result.protocol['trajectories']}; seeds {result.protocol['seeds']}"
        figure.text(0.065, 0.028, foot, size=9.5, color=colours["faint"])
        note = f"weights {result.settings['weights'][:8]}   {result.protocol['software']}"
        figure.text(0.975, 0.028, note, size=9.5, color=colours["faint"], ha="right")
        return _bytes(figure, kind, result)


def _single(
    draw: Callable[..., None], result: Geometry, colours: dict[str, Any], space: bool = False
) -> bytes:
    """One plot by itself, as SVG without a title."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style(colours)):
        figure = Figure(figsize=(9, 4.6 if space else 4.2))
        if space:
            axes = figure.add_axes((0, 0, 0.97, 1), projection="3d", computed_zorder=False)
        else:
            axes = figure.add_axes((0.085, 0.13, 0.895, 0.84))
        draw(axes, result, colours, title=False)
        return _bytes(figure, "svg", result)


def _bytes(figure: Figure, kind: str, result: Geometry) -> bytes:
    metadata: dict[str, Any] = {"Software": None, "fewstep": json.dumps(result.protocol)}
    if kind == "svg":
        metadata = {"Date": None, "Creator": "fewstep"}
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()


def _noise_map(colours: dict[str, Any]) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("noise", list(reversed(colours["noise"])))


def _coordinates(result: Geometry) -> np.ndarray:
    """Of the trajectories shown, per pixel, [n, p, 3]."""
    return result.x.coordinates[:SHOWN] / math.sqrt(result.x.size)


def _stretch(path_axes: Axes) -> float:
    """How much longer a unit is upwards than sideways."""
    box = path_axes.get_window_extent()
    (left, right), (low, high) = path_axes.get_xlim(), path_axes.get_ylim()
    return abs(box.height / (high - low) * (right - left) / box.width)


def draw_plane(axes: Axes, result: Geometry, colours: dict[str, Any], title: bool = True) -> None:
    """Each trajectory on its own first two components."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LogNorm
    from matplotlib.patheffects import withStroke

    sigmas = np.asarray(result.sigmas)
    norm, colour = LogNorm(sigmas[-1], sigmas[0]), _noise_map(colours)
    paths = _coordinates(result)[:, :, :2]
    for path in paths:
        pairs = np.stack([path[:-1], path[1:]], axis=1)
        lines = LineCollection(
            list(pairs), cmap=colour, norm=norm, linewidths=1.5, capstyle="round", alpha=0.9
        )
        lines.set_array(np.sqrt(sigmas[:-1] * sigmas[1:]))
        axes.add_collection(lines)
    far, high = paths[:, :, 0].max(), _room(paths[:, :, 1], paths)
    axes.set_xlim(1.06 * far, -0.11 * far)
    axes.set_ylim(min(0.0, paths[:, :, 1].min()) - 0.28 * high, 1.12 * high)
    axes.axhline(0, color=colours["line"], lw=0.8, zorder=0)
    middle = paths.mean(0)
    marks: list[tuple[int, tuple[int, int], str]] = [
        (0, (0, -15), "center"),
        (len(sigmas) - 1, (9, -12), "left"),
    ]
    for level in (10.0, 1.0):
        if sigmas[-1] < level / 3 and 3 * level < sigmas[0]:
            near = int(np.abs(np.log(sigmas / level)).argmin())
            marks.append((near, (0, -16), "center") if level == 10 else (near, (9, 2), "left"))
    halo = withStroke(linewidth=3, foreground=colours["paper"])
    for i, offset, side in marks:
        axes.plot(*middle[i], "o", ms=4.5, color=colours["ink"], zorder=5)
        axes.annotate(
            f"{SIGMA} = {sigmas[i]:.2g}", middle[i], offset, textcoords="offset points", ha=side,
            size=9.5, color=colours["ink"], zorder=6, path_effects=[halo],
        )  # fmt: skip
    axes.set_xlabel("first component (RMS per pixel)")
    axes.set_ylabel("second component")
    axes.text(
        0.03, 0.97, f"upwards stretched {_stretch(axes):.0f}-fold", transform=axes.transAxes,
        size=9.5, color=colours["faint"], va="top",
    )  # fmt: skip
    if title:
        axes.set_title("Each trajectory in its own plane")


def _room(values: np.ndarray, paths: np.ndarray) -> float:
    """The largest of the values, or a little of the whole where they are all zero."""
    return max(float(np.abs(values).max()), 1e-4 * float(np.abs(paths).max()))


def draw_space(axes: Axes3D, result: Geometry, colours: dict[str, Any], title: bool = True) -> None:
    """Each trajectory on its own first three components, the second and third to one scale; a title
    would be off to the side of such axes, so whoever places them writes it."""
    from matplotlib.colors import LogNorm
    from mpl_toolkits.mplot3d.art3d import Line3DCollection

    sigmas = np.asarray(result.sigmas)
    norm, colour = LogNorm(sigmas[-1], sigmas[0]), _noise_map(colours)
    paths = _coordinates(result)[:, :, [0, 2, 1]]  # the second upwards, the third in depth
    high = 1.05 * _room(paths[:, :, 1:], paths)
    low = min(-0.15 * high, 1.3 * float(paths[:, :, 2].min()))
    far = float(paths[:, :, 0].max())
    for path in paths:
        shadow = path.copy()
        shadow[:, 2] = low
        axes.plot(
            *shadow.T, color=colours["series"][0], alpha=0.35, lw=1.0, zorder=1, clip_on=False
        )
        pairs = np.stack([path[:-1], path[1:]], axis=1)
        lines = Line3DCollection(list(pairs), cmap=colour, norm=norm, linewidths=1.6, zorder=3)
        lines.set_clip_on(False)
        lines.set_array(np.sqrt(sigmas[:-1] * sigmas[1:]))
        axes.add_collection3d(lines)
    half = (high - low) / 2
    axes.set_xlim(1.02 * far, 0)
    axes.set_ylim(-half, half)
    axes.set_zlim(low, high)
    axes.set_box_aspect((3.4, 1.25, 1.25), zoom=1.36)  # type: ignore[arg-type]
    axes.view_init(elev=20, azim=-66)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color((0, 0, 0, 0))  # type: ignore[attr-defined]
        axis.line.set_color(colours["line"])  # type: ignore[attr-defined]
        axis._axinfo["grid"].update(color=colours["line"], linewidth=0.6)  # type: ignore[attr-defined]
        axis._axinfo["tick"].update(inward_factor=0, outward_factor=0.1)  # type: ignore[attr-defined]
    axes.xaxis.set_major_locator(_few_ticks())
    axes.yaxis.set_major_locator(_few_ticks())
    axes.zaxis.set_major_locator(_few_ticks())
    axes.tick_params(labelsize=8.5, pad=-2)
    axes.set_xlabel("first component", labelpad=2, size=9.5)
    axes.set_ylabel("third", labelpad=0, size=9.5)
    axes.set_zlabel("second", labelpad=-4, size=9.5)


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])


def draw_left(axes: Axes, result: Geometry, colours: dict[str, Any], title: bool = True) -> None:
    """The share of the variance that the first k components leave, for x and for D(x)."""
    least = 0.1
    axes.set_yscale("log")
    axes.set_ylim(least, 3)  # before anything is drawn: no limits are looked for
    for curves, name, colour in (
        (result.denoised, f"D(x; {SIGMA}), denoised", colours["series"][1]),
        (result.x, "x", colours["series"][2]),
    ):
        left = (1 - curves.cumulative[:, :BARS]).clip(min=LEAST)
        k, middle = np.arange(1, left.shape[1] + 1), np.exp(np.log(left).mean(0))
        low, high = np.quantile(left, (0.1, 0.9), axis=0)
        axes.fill_between(k, low, high, color=colour, alpha=0.16, lw=0)
        axes.plot(k, middle, "o-", color=colour, ms=5, lw=1.8)
        for i in range(min(LABELLED, len(k))):
            axes.annotate(
                _floor(float(curves.cumulative[:, i].mean())), (k[i], middle[i]), (3, 7),
                textcoords="offset points", size=9.5, color=colour,
            )  # fmt: skip
        axes.annotate(
            name, (k[-1], high[-1]), (4, 9), textcoords="offset points", ha="right",
            color=colour, weight="bold", size=10,
        )  # fmt: skip
        least = min(least, float(low.min()))
    axes.set_ylim(least / 3, 3)
    axes.set_xticks(range(1, BARS + 1))
    axes.set_xlim(0.8, BARS + 0.2)
    axes.set_xlabel("components kept")
    axes.set_ylabel("share of variance left")
    axes.grid(axis="y")
    axes.minorticks_off()
    if title:
        axes.set_title("What the components leave")


def draw_distances(
    axes: Axes, result: Geometry, colours: dict[str, Any], title: bool = True
) -> None:
    """Distances along the way, mean over seeds, with the middle 80 % of them."""
    sigmas, distances = np.asarray(result.sigmas), result.x.distances
    names = ("straight line through the ends", "best line", "best plane", "best space")
    for k, (name, colour) in enumerate(zip(names, colours["series"], strict=True)):
        low, high = np.quantile(distances[:, k], (0.1, 0.9), axis=0)
        axes.fill_between(sigmas, low, high, color=colour, alpha=0.16, lw=0)
        style = "--" if k == 0 else "-"
        axes.plot(sigmas, distances[:, k].mean(0), style, color=colour, lw=1.8, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(axis="x", which="minor", length=0)
    axes.set_xlim(sigmas[0], sigmas[-1])
    axes.set_ylim(0, 1.36 * max(axes.dataLim.y1, 1e-6))
    axes.set_xlabel(f"noise level {SIGMA}")
    axes.set_ylabel("distance (RMS per pixel)")
    axes.grid(axis="y")
    axes.legend(
        loc="upper left", fontsize=9.5, handlelength=1.6, labelspacing=0.35, ncols=2,
        borderaxespad=0.2,
    )  # fmt: skip
    if title:
        axes.set_title("How far they are from lines and planes")


# Words.


def _title(result: Geometry) -> str:
    plane = float(result.x.cumulative[:, 1].mean())
    return f"{_floor(plane)} of a trajectory's variance lies in one plane"


def _floor(share: float) -> str:
    """Per cent, rounded down, in as many nines as there are and one figure more."""
    left = 1 - share
    if left < 1e-9:
        return "100 %"
    digits = min(6, max(0, -math.floor(math.log10(left)) - 1))
    return f"{math.floor(100 * share * 10**digits) / 10**digits:.{digits}f} %"


def _moved(result: Geometry) -> str:
    """How far D(x) goes from the first point to the last, per pixel."""
    return _figure(float(result.denoised.chord.mean()) / math.sqrt(result.denoised.size))


def _subtitle(result: Geometry) -> str:
    distances = result.x.distances
    line, plane = (_figure(distances[:, k].max(1).mean()) for k in (0, 2))
    return (
        f"{result.model}. At the farthest {line} a pixel from a straight line, {plane} from a "
        f"plane; the picture seen in it, D(x; {SIGMA}), moves by {_moved(result)}."
    )


def _lead(result: Geometry) -> str:
    distances = result.x.distances
    line, plane, space = (_figure(distances[:, k].max(1).mean()) for k in (0, 2, 3))
    one, two = (_floor(float(result.x.cumulative[:, k].mean())) for k in (0, 1))
    return (
        f"From noise to picture, each of {_trajectories(result)} was cut into "
        f"{len(result.sigmas)} points. A plane of its own holds {two} of their variance. That "
        f"says less than it seems to, as a line holds {one}: most of x is noise, and noise shrinks "
        f"along a line. In pixels, a trajectory is {line} from the straight line between its ends "
        f"where it is farthest, {plane} from its plane and {space} from its space. For scale: the "
        f"picture that the network sees in it, D(x; {SIGMA}), moves by {_moved(result)} on the way."
    )


def _trajectories(result: Geometry) -> str:
    n = len(result.seeds)
    return "1 trajectory" if n == 1 else f"{n} trajectories"


# The page.

PLOTS = """
figure { margin: 0 0 8px; }
figure img { display: block; width: min(100%, 900px); height: auto; }
figcaption { color: var(--faint); font-size: .92rem; max-width: 68ch; margin-top: 4px; }
main { max-width: 980px; width: 100%; }
.numbers td, .numbers th { white-space: nowrap; }
.scroll { overflow-x: auto; }
"""


def page(result: Geometry) -> str:
    """The report as one HTML file that needs nothing else."""
    shown = min(SHOWN, len(result.seeds))
    drawn = "It is drawn" if shown == 1 else f"{shown} are drawn"
    figures = (
        ("In its own plane", draw_plane, False,
         f"{drawn}, each on its own first two principal components, seen from the picture. The two "
         "axes are not to one scale. Colour is the noise level, warm where there is little; a dot "
         "is the mean at a level."),
        ("Out of its plane", draw_space, True,
         "The same with the third component, in depth. It is on the scale of the second, which "
         "points upwards; what lies on the floor is the view from above."),
        ("What the components leave", draw_left, False,
         "The share of the variance that is left when the first components are taken away, for the "
         f"trajectory and for what the network sees in it, D(x; {SIGMA}). The band holds the "
         "middle 80 % of the seeds."),
        ("Distance on the way", draw_distances, False,
         "Distance of each point from the straight line between the ends, and from the best line, "
         "plane and space. Mean and middle 80 % over the seeds."),
    )  # fmt: skip
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "img-src data:; style-src 'unsafe-inline'\">",
            f"<title>fewstep geometry: {html.escape(result.model)}</title>",
            f"<style>{STYLE}{PLOTS}</style>\n</head>\n<body>\n<main>",
            f'<p class="kicker">fewstep geometry, {html.escape(result.model)}</p>',
            f"<h1>{html.escape(_title(result))}</h1>",
            f'<p class="lead">{html.escape(_lead(result))}</p>',
            *(_figure_tag(result, *figure) for figure in figures),
            "<h2>Numbers</h2>",
            *_numbers(result),
            "<h2>How to read them</h2>\n<ul>",
            *(f"<li>{html.escape(note)}</li>" for note in _notes(result)),
            "</ul>\n<h2>Protocol</h2>\n<dl>",
            *_protocol_items(result),
            "</dl>\n</main>\n</body>\n</html>\n",
        ]
    )


def _figure_tag(
    result: Geometry, heading: str, draw: Callable[..., None], space: bool, caption: str
) -> str:
    light, dark = (
        "data:image/svg+xml;base64," + base64.b64encode(_single(draw, result, c, space)).decode()
        for c in (LIGHT, DARK)
    )
    return (
        f"<h2>{heading}</h2>\n<figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{html.escape(heading)}" src="{light}"></picture>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _numbers(result: Geometry) -> Iterator[str]:
    yield (
        '<div class="scroll"><table class="numbers"><thead><tr><th scope="col">within</th>'
        '<th scope="col" class="right">share of x, %</th>'
        '<th scope="col" class="right">distance</th><th scope="col" class="right">farthest</th>'
        f'<th scope="col" class="right">share of D(x; {SIGMA}), %</th>'
        '<th scope="col" class="right">farthest</th></tr></thead>\n<tbody>'
    )
    for name, *cells in _rows(result):
        values = "".join(f'<td class="right figure">{cell}</td>' for cell in cells)
        yield f'<tr><th scope="row"><b>{name}</b></th>{values}</tr>'
    yield "</tbody></table></div>"


def _notes(result: Geometry) -> Iterator[str]:
    check = result.check
    relative = _figure(100 * result.x.relative[:, 2].max(1).mean())
    yield (
        "Components are those of each trajectory by itself, about the mean of its points, every "
        "point with the same weight; so a share depends on where the grid puts its points."
    )
    yield (
        "Shares are mean ± standard deviation over the seeds. Distances are root mean squares per "
        "pixel in units where pictures span [-1, 1]: the mean over the points, and the farthest "
        "point, both averaged over the seeds."
    )
    yield (
        "The straight line runs through the first and the last point; the lines, planes and spaces "
        "of components are those nearest to all points, so the ends need not lie on them."
    )
    yield (f"Relative to its own length |x|, the farthest point is {relative} % from its plane.")
    yield (
        f"On twice the points the trajectories of the first {count(int(check['seeds']), 'seed')} "
        f"differ by at most {_figure(check['largest'])} on the way and {_figure(check['end'])} at "
        f"the end, and their shares by {_figure(100 * check['share'])} %."
    )


def _protocol_items(result: Geometry) -> Iterator[str]:
    for name, value in result.protocol.items():
        text = html.escape(value)
        yield f"<dt>{name}</dt><dd>{f'<code>{text}</code>' if name == 'command' else text}</dd>"
