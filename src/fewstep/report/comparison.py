"""A comparison as one self-contained page: the finding in words, curves, pictures, every number.

Nothing is computed here; `fewstep.evaluate.compare` is where the numbers come from. The curves need
matplotlib (`pip install 'fewstep[evaluate]'`), which is imported only where they are drawn.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fewstep.evaluate.compare import FINALISTS
from fewstep.report.demo_page import SHOWN, STYLE, WIDE, _data_url, _strip, count
from fewstep.report.geometry import DARK, LIGHT, _style
from fewstep.report.tables import ordered, setting_words, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["comparison_html", "deciding", "draw_curves"]

Row = dict[str, Any]
Record = dict[str, Any]

HEADLINE = 5  # the budget that the ranking is drawn at, where it is there
BRIGHT = 4  # samplers that have a colour of their own; the others are grey
LARGE = 128  # pixels; the sides of pictures in a strip at most
FEW = 8  # of larger ones, how many are in a strip
WIDTH = 9.0  # inches, of a figure
LONGEST = 110  # letters of a headline
GAP = 11.5  # points between two labels at the end of lines


@dataclass(frozen=True)
class Scale:
    """What samplers are measured by; less is better on each.

    title: of the axis and the column
    of: a row's value and its standard error, which is 0 where there is none; None where the number
        says nothing about it
    """

    title: str
    of: Callable[[Row], tuple[float, float] | None]


def comparison_html(record: Record, strips: dict[str, np.ndarray], plots: bool = True) -> str:
    """The report as one HTML file that needs nothing else.

    record, strips: as in `Comparison`; rows without a strip have no pictures on the page
    plots: whether to draw curves, for which matplotlib must be there
    """
    title = _headline(record)
    model = html.escape(record["model"]["name"])
    sizes, *pictures = _pictures(record, strips)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "img-src data:; style-src 'unsafe-inline'\">",
            f"<title>fewstep compare: {model}</title>",
            f"<style>{STYLE}{PLAIN}{sizes}</style>\n</head>\n<body>\n<main>",
            f'<p class="kicker">fewstep compare, {model}</p>',
            f"<h1>{_unbroken(title, record)}</h1>",
            *(f'<p class="lead">{_unbroken(text, record)}</p>' for text in _lead(record)),
            *(_figures(record) if plots else ()),
            *pictures,
            "<h2>Numbers</h2>",
            *_numbers(record),
            "<h2>How to read them</h2>\n<ul>",
            *(f"<li>{html.escape(note)}</li>" for note in _notes(record)),
            "</ul>\n<h2>Protocol</h2>\n<dl>",
            *_protocol_items(record),
            "</dl>\n</main>\n</body>\n</html>\n",
        ]
    )


# What the record says.


def _scales(record: Record) -> list[Scale]:
    """The feature networks in their order, then the error."""

    def excess(judge: str) -> Scale:
        def of(row: Row) -> tuple[float, float]:
            return row["fd"][judge]["excess"], row["fd"][judge]["excess_se"]

        return Scale(f"excess FD-{judge}", of)

    def error(row: Row) -> tuple[float, float] | None:
        return None if row.get("stochastic") else (row["error"], row["error_se"] or 0.0)

    return [*(excess(judge) for judge in record["floor"]), Scale("error", error)]


def deciding(record: Record) -> Scale:
    """The last feature network; the error where there is none."""
    return _scales(record)[max(len(record["floor"]) - 1, 0)]


def _budgets(record: Record) -> list[int]:
    return sorted({row["nfe"] for row in record["rows"]})


def _main_budget(record: Record) -> int:
    """5, or the middle one."""
    budgets = _budgets(record)
    return HEADLINE if HEADLINE in budgets else budgets[len(budgets) // 2]


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """Without an "auto" that is another of the rows again."""

    def setting(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("nfe", "solver", "grid", "afs", "end", "final"))

    named = [setting(row) for row in rows if row["sampler"] != "auto"]
    return [row for row in rows if row["sampler"] != "auto" or setting(row) not in named]


def _ranked(record: Record, nfe: int, scale: Scale) -> list[Row]:
    """The distinct rows of a budget that the scale says something about, best first."""
    rows = [row for row in record["rows"] if row["nfe"] == nfe and scale.of(row) is not None]
    return sorted(_distinct(rows), key=lambda row: _of(scale, row)[0])


def _of(scale: Scale, row: Row) -> tuple[float, float]:
    found = scale.of(row)
    assert found is not None
    return found


def _leaders(record: Record, nfe: int, scale: Scale) -> list[Row]:
    """The best row, and those that cannot be told from it."""
    return _level(_ranked(record, nfe, scale), scale)


def _level(rows: Sequence[Row], scale: Scale) -> list[Row]:
    """Those within two standard errors of the best."""
    known = [(row, *found) for row in rows if (found := scale.of(row)) is not None]
    least, own = min(((value, spread) for _, value, spread in known), default=(0.0, 0.0))
    return [row for row, value, spread in known if value - least <= 2 * math.hypot(spread, own)]


def _chosen(record: Record) -> list[str]:
    """Samplers in the order in which they deserve a colour: the best of each budget, the main one
    first, then by their places over all of them."""
    scale, budgets = deciding(record), _budgets(record)
    main = _main_budget(record)
    order = [main, *(nfe for nfe in budgets if nfe != main)]
    lists = {nfe: [row["sampler"] for row in _ranked(record, nfe, scale)] for nfe in order}
    best = [names[0] for names in lists.values() if names]
    everyone = dict.fromkeys(name for names in lists.values() for name in names)

    def place(name: str) -> float:
        places = [names.index(name) if name in names else len(names) for names in lists.values()]
        return sum(places) / len(places)

    return list(dict.fromkeys([*best, *sorted(everyone, key=place)]))


# Words.


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _headline(record: Record) -> str:
    """Who leads at each budget; at the main one alone where that takes too long to say."""
    whole = _who_leads(record, _budgets(record))
    return whole if len(whole) <= LONGEST else _who_leads(record, [_main_budget(record)])


def _who_leads(record: Record, budgets: Sequence[int]) -> str:
    scale, called = deciding(record), short_names(record)
    if len(called) == 1:
        return f"{next(iter(called.values()))} at {_evaluations(budgets)}"
    shared: dict[tuple[str, ...], list[int]] = {}
    for nfe in budgets:
        names = tuple(called[row["sampler"]] for row in _leaders(record, nfe, scale))
        shared.setdefault(names, []).append(nfe)
    parts, said = [], ""
    for names, at in shared.items():
        if not names:
            continue
        who = _join(names) if len(names) < 4 else f"{len(names)} samplers"
        verb = " leads" if len(names) == 1 else " share the lead"
        where = _join([*map(str, at)]) if parts else _evaluations(at)
        parts.append(f"{who}{'' if verb == said else verb} at {where}")
        said = verb
    return "; ".join(parts) or f"{len(called)} stochastic samplers"


def _unbroken(text: str, record: Record) -> str:
    """As HTML in which no sampler's name is cut at a hyphen."""
    text = html.escape(text)
    names = sorted((html.escape(name) for name in short_names(record).values()), key=len)
    words = "|".join(re.escape(name) for name in reversed(names))
    return re.sub(rf"(?<![\w-])({words})(?![\w-])", r'<span class="name">\1</span>', text)


def _evaluations(budgets: Sequence[int]) -> str:
    return f"{_join([*map(str, budgets)])} evaluation" + "s" * (list(budgets) != [1])


def _lead(record: Record) -> Iterator[str]:
    """What the headline rests on, in figures."""
    scale, called, nfe = deciding(record), short_names(record), _main_budget(record)
    pictures, judges = count_of(record["pictures"], "picture"), list(record["floor"])
    if judges:
        how = (
            f"Judged by {pictures} a sampler: how far their distribution lies from that of exact "
            f"solves, as {judges[-1]} sees it, beyond what exact solves of the same seeds score."
        )
    else:
        how = (
            f"Judged by {pictures} a sampler: how far each ends from the exact solution of the "
            "same noise."
        )
    rows = _ranked(record, nfe, scale)
    if not rows:
        yield how
        return
    budgets = _budgets(record)
    if (whole := _who_leads(record, budgets)) != _headline(record):
        yield f"{whole}."

    def told(row: Row) -> str:
        return f"{called[row['sampler']]} at {with_error(*_of(scale, row))}"

    then = f", then {_join([told(row) for row in rows[1:3]])}" if len(rows) > 1 else ""
    last = f"; last comes {told(rows[-1])}" if len(rows) > 3 else ""
    yield f"{how} With {_evaluations([nfe])} {told(rows[0])} comes first{then}{last}."
    errors = _scales(record)[-1]
    near = _ranked(record, nfe, errors)
    if judges and near and near[0]["sampler"] != rows[0]["sampler"]:
        best = errors.of(rows[0])
        where = f", where {called[rows[0]['sampler']]} has {with_error(*best)}" if best else ""
        yield (
            f"Nearest to the exact solution, pixel by pixel, is another: "
            f"{called[near[0]['sampler']]}, with an error of {with_error(*_of(errors, near[0]))}"
            f"{where}."
        )


def count_of(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + "s" * (number != 1)


def with_error(value: float, spread: float, digits: int | None = None) -> str:
    """The value and its standard error, with as many decimals as the latter bears out; three
    figures of the value where there is none."""
    if not spread > 0:
        return f"{value:#.3g}".rstrip(".")
    digits = decimals(spread) if digits is None else digits
    return f"{value:.{digits}f}\u00a0±\u00a0{spread:.{digits}f}"


def decimals(spread: float) -> int:
    """One figure of a standard error, two where the first is 1 or 2: 0.0009, 0.0013."""
    power = math.floor(math.log10(spread) + math.log10(1 / 0.95))
    lead = spread / 10.0**power
    return min(9, max(0, -power + (lead < 2.95)))


def _ms(row: Row) -> str:
    ms = 1000 * row["seconds"]
    return f"{ms:.1f}" if ms < 99.95 else f"{ms:,.0f}"


# Figures.


def _figures(record: Record) -> Iterator[str]:
    nfe, main = _main_budget(record), deciding(record)
    several = len(_budgets(record)) > 1
    scales = sorted(_scales(record), key=lambda scale: scale.title != main.title)
    for scale in scales if several else ():
        if any(_ranked(record, budget, scale) for budget in _budgets(record)):
            yield _figure(
                f"{scale.title[0].upper()}{scale.title[1:]} against budget and time",
                lambda colours, scale=scale: draw_curves(record, scale, colours),
                _curve_caption(record, scale),
            )
    yield _figure(
        f"At {_evaluations([nfe])}",
        lambda colours: draw_ranking(record, nfe, colours),
        "Each sampler at its setting, best first. Bars reach two standard errors to either side: "
        "where they overlap, more seeds may turn the order round.",
    )


def _curve_caption(record: Record, scale: Scale) -> str:
    lower = "Lower is better. "
    bars = "Bars reach two standard errors to either side. "
    colour = "The colours are those of the best by " + deciding(record).title + "."
    several = len(record["sources"]) > 1
    mixed = " Times are from several runs, so compare them with care." if several else ""
    return lower + bars + colour + mixed


def _figure(heading: str, draw: Callable[[dict[str, Any]], bytes], caption: str) -> str:
    light, dark = (
        "data:image/svg+xml;base64," + base64.b64encode(draw(colours)).decode()
        for colours in (LIGHT, DARK)
    )
    return (
        f"<h2>{html.escape(heading)}</h2>\n<figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{html.escape(heading)}" src="{light}"></picture>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "fewstep"})
    return buffer.getvalue()


def _paint(record: Record, colours: dict[str, Any]) -> dict[str, str]:
    """A colour for each of the best samplers; the others have none."""
    bright = (*colours["series"][1:], colours["noise"][2])[:BRIGHT]
    return dict(zip(_chosen(record), bright, strict=False))


def draw_curves(record: Record, scale: Scale, colours: dict[str, Any]) -> bytes:
    """One scale against the budget and against wall time, side by side, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    called, paint = short_names(record), _paint(record, colours)
    lines: dict[str, list[Row]] = {}
    for nfe in _budgets(record):
        for row in _ranked(record, nfe, scale):
            lines.setdefault(row["sampler"], []).append(row)
    with matplotlib.rc_context(_style(colours)):
        figure = Figure(figsize=(WIDTH, 4.9))
        room = (0.55 + 0.078 * max(len(_clipped(called[name])) for name in lines)) / WIDTH
        wide = (0.9 - room) / 2
        left = figure.add_axes((0.085, 0.125, wide, 0.845))
        right = figure.add_axes((0.985 - wide, 0.125, wide, 0.845), sharey=left)
        right.tick_params(axis="y", labelleft=False)
        for axes, x_of in (
            (left, lambda row: row["nfe"]),
            (right, lambda row: 1000 * row["seconds"]),
        ):
            for name, rows in lines.items():
                bright = name in paint
                x = [x_of(row) for row in rows]
                y, spread = np.array([_of(scale, row) for row in rows]).T
                colour = paint.get(name, colours["series"][0])
                axes.errorbar(
                    x, y, yerr=2 * spread, fmt="o-", color=colour, lw=2.2 if bright else 1.0,
                    ms=5 if bright else 3, elinewidth=1.4 if bright else 0.8,
                    alpha=1.0 if bright else 0.55, zorder=3 if bright else 2,
                )  # fmt: skip
            axes.grid(axis="y", which="major")
        _limits(left, [_of(scale, row) for rows in lines.values() for row in rows])
        _budget_ticks(left, _budgets(record))
        left.set_xlabel("evaluations")
        left.set_ylabel(scale.title)
        _log_ticks(right, 1000 * np.array([r["seconds"] for rows in lines.values() for r in rows]))
        right.set_xlabel("wall time, ms a picture")
        last = _budgets(record)[-1]
        for name, rows in lines.items():  # from a line that ends early to its label
            if name in paint and rows[-1]["nfe"] < last:
                y = _of(scale, rows[-1])[0]
                ends_at = [rows[-1]["nfe"], last]
                left.plot(ends_at, [y, y], ":", color=paint[name], lw=1, alpha=0.6)
        ends = {called[name]: _of(scale, rows[-1])[0] for name, rows in lines.items()}
        tints = {called[name]: paint.get(name) or colours["faint"] for name in lines}
        _end_labels(figure, left, ends, tints, [called[name] for name in paint])
        return _svg(figure)


def _limits(axes: Axes, values: Sequence[tuple[float, float]]) -> None:
    """A log axis where all values are clear of 0; linear up to a standard error, then log, where
    some are not."""
    y, spread = np.array(values).T
    if (y > 0).all() and (y > 2 * spread).all():
        low, high = float((y - 2 * spread).min()), float((y + 2 * spread).max())
        axes.set_yscale("log")
        axes.set_ylim(low / 1.15, high * 1.15)
    else:
        straight = max(float(np.median(spread)), float(np.abs(y).max()) / 1000, 1e-12)
        axes.set_yscale("symlog", linthresh=straight)
        low, high = float((y - 2 * spread).min()), float((y + 2 * spread).max())
        axes.set_ylim(min(0.0, 1.3 * low), 1.3 * high)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _tick_marks(axes.yaxis, axes.get_ylim())


def _tick_marks(axis: Any, limits: tuple[float, float], least: int = 4, apart: float = 0.0) -> None:
    """At least so many ticks: at 1, 3, or 2 and 5 times powers of ten where a log axis spans few of
    them; matplotlib's own leave such axes nearly bare.

    apart: least distance of two, as a share of the axis, where their numbers stand side by side
    """
    low, high = limits
    if axis.get_scale() != "log":
        return
    from matplotlib.ticker import FixedLocator

    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [s * 10.0**p for p in powers for s in steps if low <= s * 10.0**p <= high]
        if len(ticks) >= least:
            break
    spaced: list[float] = []
    for tick in ticks:
        if not spaced or math.log(tick / spaced[-1]) >= apart * math.log(high / low):
            spaced.append(tick)
    axis.set_major_locator(FixedLocator(spaced))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(FixedLocator([]))


def _budget_ticks(axes: Axes, budgets: list[int]) -> None:
    """A tick at each; on a log axis where few of them would crowd the many, and without the numbers
    that would run into the next one's."""
    if budgets[-1] > 4 * budgets[0]:
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(budgets, readable(budgets))
    else:
        axes.set_xticks(budgets, [*map(str, budgets)])


def readable(budgets: list[int], digit: float = 0.018) -> list[str]:
    """Their labels on a log axis, empty where one would touch that of the next greater.

    digit: half of a digit's width and a share of the gap, as a share of the axis
    """
    span = math.log(budgets[-1] / budgets[0])
    labels, taken = [""] * len(budgets), math.inf
    after = 0
    for i in reversed(range(len(budgets))):
        place, digits = math.log(budgets[i]) / span, len(str(budgets[i]))
        if taken - place >= digit * (digits + after):
            labels[i], taken, after = str(budgets[i]), place, digits
    return labels


def _log_ticks(axes: Axes, x: np.ndarray) -> None:
    axes.set_xscale("log")
    low, high = float(x.min()), float(x.max())
    room = max((high / low) ** 0.06, 1.04)
    axes.set_xlim(low / room, high * room)
    _tick_marks(axes.xaxis, axes.get_xlim())


def _end_labels(
    figure: Figure, axes: Axes, ends: dict[str, float], tints: dict[str, str], bright: list[str]
) -> None:
    """Names beside the right ends of lines, moved apart where they would overlap: the bright ones,
    and of the others the lowest for which there is room."""
    figure.draw_without_rendering()
    scale = figure.dpi / 72  # pixels per point
    right = axes.get_xlim()[1]
    at = {name: axes.transData.transform((right, y))[1] / scale for name, y in ends.items()}
    names = sorted(at, key=at.__getitem__)
    box = axes.get_window_extent()
    low, high = box.y0 / scale - 4, box.y1 / scale
    names = with_room(names, bright, int((high - low) / GAP) + 1)
    places = spread_out([at[name] for name in names], GAP, low, high)
    edge = box.x1 / scale
    for name, place in zip(names, places, strict=True):
        bold = name in bright
        axes.annotate(
            _clipped(name), (edge + 16, place), xycoords="figure points", va="center",
            size=9.5 if bold else 8.5, weight="bold" if bold else "normal", color=tints[name],
            annotation_clip=False,
        )  # fmt: skip
        axes.annotate(
            "", (edge - 1, at[name]), (edge + 14, place), xycoords="figure points",
            textcoords="figure points", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "lw": 0.8, "color": tints[name], "alpha": 0.6,
                        "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip


def with_room(names: list[str], bright: list[str], room: int) -> list[str]:
    """So many of the names as there is room for: the bright ones, and then from the first on."""
    others = [name for name in names if name not in bright]
    kept = {*bright, *others[: max(0, room - len(bright))]}
    return [name for name in names if name in kept]


def _clipped(name: str) -> str:
    """In the middle, for names of runs differ at the end."""
    return name if len(name) <= 17 else f"{name[:11]}…{name[-5:]}"


def spread_out(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places that rise by at least `gap`, near the rising ones wanted, within [low, high] where
    there is room: overlapping groups stand around their own middle."""
    groups: list[list[float]] = []  # each its members' wanted places
    for value in wanted:
        groups.append([value])
        while len(groups) > 1 and _start(groups[-1], gap, low, high) < gap * len(groups[-2]) + (
            _start(groups[-2], gap, low, high)
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_start(group, gap, low, high) + gap * i for group in groups for i in range(len(group))]


def _start(group: Sequence[float], gap: float, low: float, high: float) -> float:
    long = gap * (len(group) - 1)
    return max(low, min(sum(group) / len(group) - long / 2, high - long))


def draw_ranking(record: Record, nfe: int, colours: dict[str, Any]) -> bytes:
    """All samplers at one budget on every scale, in the order of the deciding one, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    called, paint, main = short_names(record), _paint(record, colours), deciding(record)
    rows = _ranked(record, nfe, main)
    scales = [scale for scale in _scales(record) if _ranked(record, nfe, scale)]
    scales.sort(key=lambda scale: scale.title != main.title)
    high = 0.85 + 0.33 * len(rows)
    with matplotlib.rc_context(_style(colours)):
        figure = Figure(figsize=(WIDTH, high))
        every = np.atleast_1d(figure.subplots(1, len(scales), sharey=True))
        figure.subplots_adjust(
            left=0.31, right=0.985, top=1 - 0.08 / high, bottom=0.58 / high, wspace=0.08
        )
        for axes, scale in zip(every, scales, strict=True):
            shown = [(i, row) for i, row in enumerate(rows) if scale.of(row) is not None]
            for i, row in shown:
                value, spread = _of(scale, row)
                colour = paint.get(row["sampler"], colours["series"][0])
                axes.errorbar(
                    value, i, xerr=2 * spread, fmt="o", ms=6.5, color=colour, elinewidth=1.6,
                    zorder=3,
                )  # fmt: skip
            axes.grid(axis="x", which="major")
            values = np.array([_of(scale, row) for _, row in shown])
            _across(axes, values)
            axes.set_xlabel(scale.title)
            axes.set_yticks([])
            for i in range(len(rows)):
                axes.axhline(i, color=colours["line"], lw=0.6, zorder=0)
        every[0].set_ylim(len(rows) - 0.5, -0.5)
        for i, row in enumerate(rows):
            name = called[row["sampler"]]
            # a transform that reads sideways in the figure and upwards in the data
            where = every[0].get_yaxis_transform()
            settings = {"transform": where, "va": "center", "clip_on": False}
            every[0].text(
                -0.035, i, setting_words(row), size=8.5, ha="right", color=colours["faint"],
                **settings,
            )  # fmt: skip
            figure.text(
                0.0, _height(figure, len(rows), i), _clipped(name),
                va="center", size=10.5, color=paint.get(row["sampler"], colours["ink"]),
                weight="bold" if row["sampler"] in paint else "normal",
            )  # fmt: skip
        return _svg(figure)


def _height(figure: Figure, rows: int, i: int) -> float:
    """Where the i-th of the rows is, as a share of the figure's height."""
    places = figure.subplotpars
    return places.top - (places.top - places.bottom) * (i + 0.5) / rows


def _across(axes: Axes, values: np.ndarray) -> None:
    """As `_limits`, sideways."""
    x, spread = values.T
    low, high = float((x - 2 * spread).min()), float((x + 2 * spread).max())
    if low > 0 and high > 3 * low:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.2, high * 1.2)
        _tick_marks(axes.xaxis, axes.get_xlim(), 3, apart=0.2)
    else:
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_xlim(min(low, 0.0) - room * (low < 0), high + room)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


# Pictures.


def _pictures(record: Record, strips: dict[str, np.ndarray]) -> Iterator[str]:
    """First the sizes for the style sheet, then the strips, budget by budget."""
    exact = strips.get("")
    if exact is None:
        yield ""
        return
    exact = _shrunk(exact)
    height, width = _strip(exact, 1, 1).shape[:2]
    yield f":root {{ --w: {width}; --h: {height}; --exact: url({_data_url(exact)}); }}\n" + "".join(
        # 232 for the label, 48 for the margins, 20 for a scroll bar, as in the demo
        WIDE.format(least=300 + k * width, width=k * width)
        for k in ((1, 2) if width > 600 else (2, 3))
    )
    yield "<h2>The same noise, sampler by sampler</h2>"
    text = "Hold the pointer over a row to see the exact solution in its place."
    yield f'<p class="hint"><span class="pointer">{text}</span></p>'
    called = short_names(record)
    scales = dict.fromkeys((deciding(record).title, "error"))
    shown = count_of(len(exact), "picture")
    yield '<table class="strips">'
    for nfe in _budgets(record):
        rows = [
            row
            for row in _distinct(ordered(record))
            if row["nfe"] == nfe and f"{row['sampler']}@{nfe}" in strips
        ]
        if not rows:
            continue
        yield f'<tbody><tr><th class="budget" scope="rowgroup">{_evaluations([nfe])}</th></tr>'
        yield (
            f'<tr><th scope="row"><b>exact</b><span class="about figure">'
            f"{record['references']['nfe']} evaluations</span></th>"
            f'<td><div class="strip" role="img" aria-label="{shown} of the exact solution">'
            "</div></td></tr>"
        )
        for row in rows:
            name = html.escape(called[row["sampler"]])
            told = [
                f"{scale.title.partition(' ')[0]} {with_error(_of(scale, row)[0], 0.0)}"
                for scale in _scales(record)
                if scale.title in scales and scale.of(row) is not None
            ]
            url = _data_url(_shrunk(strips[f"{row['sampler']}@{nfe}"])[: len(exact)])
            yield (
                f'<tr><th scope="row"><b>{name}</b>'
                f'<span class="about figure">{html.escape(", ".join(told))}</span></th>'
                f'<td><div class="strip"><img alt="{shown} by {name}" src="{url}"></div></td></tr>'
            )
        yield "</tbody>"
    yield "</table>"


def _shrunk(pictures: np.ndarray) -> np.ndarray:
    """As many pictures as a strip has, large ones made smaller, uint8 [k, h, w, c]."""
    high, wide = pictures.shape[1:3]
    if max(high, wide) <= LARGE:
        return pictures[: SHOWN if max(high, wide) <= LARGE // 2 else FEW]
    share = LARGE / max(high, wide)
    size = max(1, round(wide * share)), max(1, round(high * share))
    out = []
    for picture in pictures[:FEW]:
        image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
        out.append(np.asarray(image.resize(size, Image.Resampling.LANCZOS)))
    return np.stack(out).reshape(len(out), size[1], size[0], -1)


# Numbers.


def _numbers(record: Record) -> Iterator[str]:
    scales, called, judges = _scales(record), short_names(record), list(record["floor"])
    data = [judge for judge in judges if "fd_data" in record["floor"][judge]]
    heads = ["error", "PSNR, dB", *(f"excess FD-{j}" for j in judges), *(f"FD-{j}" for j in judges)]
    heads += [f"FD-{judge} to data" for judge in data] + ["ms/picture"]
    columns = zip(*(_values(record, row) for row in record["rows"]), strict=True)
    digits = [decimals(min((s for _, s in column if s > 0), default=1.0)) for column in columns]
    names = "".join(f'<th scope="col" class="right">{html.escape(head)}</th>' for head in heads)
    yield (
        '<div class="scroll"><table class="numbers"><thead><tr><th scope="col">sampler</th>'
        f'<th scope="col">setting</th>{names}</tr></thead>'
    )
    for nfe in _budgets(record):
        rows = [row for row in ordered(record) if row["nfe"] == nfe]
        leading = [
            {id(row) for row in _level(rows, scale)} if len(rows) > 1 else set() for scale in scales
        ]
        yield (
            f'<tbody><tr><th class="budget" colspan="{len(heads) + 2}" scope="rowgroup">'
            f"{_evaluations([nfe])}</th></tr>"
        )
        for row in rows:
            *excesses, error = (
                _cell(with_error(*value, places), id(row) in ids)
                for value, places, ids in zip(_values(record, row), digits, leading, strict=True)
            )
            cells = [error, f"{row['psnr']:.1f}", *excesses]
            cells += [
                with_error(row["fd"][judge]["value"], row["fd"][judge]["se"], places)
                for judge, places in zip(judges, digits, strict=False)
            ]
            cells += [f"{row['fd_data'][j]:.2f}" if j in row["fd_data"] else "-" for j in data]
            values = "".join(f'<td class="right figure">{cell}</td>' for cell in [*cells, _ms(row)])
            note = f' <span class="about">{_calls(row)}</span>' if _calls(row) else ""
            yield (
                f'<tr><th scope="row">{html.escape(called[row["sampler"]])}{note}</th>'
                f'<td class="setting">{html.escape(_setting(row))}</td>{values}</tr>'
            )
        yield "</tbody>"
    yield "</table></div>"


def _values(record: Record, row: Row) -> Iterator[tuple[float, float]]:
    """On each scale; the error of a stochastic solver too."""
    for judge in record["floor"]:
        yield row["fd"][judge]["excess"], row["fd"][judge]["excess_se"]
    yield row["error"], row["error_se"] or 0.0


def _cell(text: str, best: bool) -> str:
    return f"<b>{text}</b>" if best else text


def _calls(row: Row) -> str:
    """Worth saying where guidance doubles them."""
    calls = row["network_calls"]
    words = [count(calls, "network call")] if calls != row["nfe"] else []
    return ", ".join(words + ["stochastic"] * bool(row.get("stochastic")))


def _setting(row: Row) -> str:
    """A setting in words; what "auto" and a learned solver's folder stand for comes before it."""
    named = row["sampler"] != row["solver"]
    return (f"{row['solver']}: " if named else "") + setting_words(row)


def _notes(record: Record) -> Iterator[str]:
    seeds, references = count_of(record["pictures"], "seed"), record["references"]
    yield (
        "Error is the root of the mean squared distance to the exact solution of the same noise, "
        f"pixels in [-1, 1]; the mean over {seeds}, ± its standard error. One grey level of 256 is "
        f"0.008. The exact solution is a solve of {references['nfe']} evaluations, itself within "
        f"{references['own_error']:.2g} of a finer one by another method. PSNR is "
        "10 log10(4 / mean squared error)."
    )
    for judge, floor in record["floor"].items():
        data = f"; {floor['fd_data']:.2f} to data" if "fd_data" in floor else ""
        yield (
            f"FD-{judge} is the Frechet distance to exact solves from other seeds, in the space of "
            f"that network. Exact solves of the same seeds score {floor['fd']:.3f}{data}: that is "
            "the floor. The excess is the distance less that floor, and 0 is a perfect sampler. "
            "Its standard error is a bootstrap over seeds, the same ones drawn from both."
        )
    if record["floor"]:
        yield (
            "A small error means the exact picture; a small excess means pictures that are as good "
            "and as varied, though perhaps others. The two need not agree."
        )
    if record["screen"]["seeds"]:
        by = record["screen"]["by"]
        judge = [*record["floor"], "error"][max(len(record["floor"]) - 1, 0)]
        same = (
            "which also judges here, though on other seeds"
            if by == judge
            else "which is not what judges here"
        )
        yield f"Each setting was chosen on other seeds than these, by {by}, {same}."
    if any(row.get("stochastic") for row in record["rows"]):
        yield (
            "Stochastic solvers add noise on the way and end elsewhere: their error says nothing "
            "about quality, so they have no place in the order by error."
        )
    yield (
        "Bold is the best of a budget, and what is within two standard errors of it. ms/picture "
        "is wall time from noise to uint8, of one batch, the median of three rounds through all "
        "rows; it has whatever else the machine did in it."
    )
    for why in record.get("left_out", {}).values():
        yield f"Left out: {why}"


def _protocol_items(record: Record) -> Iterator[str]:
    references, screen = record["references"], record["screen"]
    condition = record["condition"]
    label, scale = condition["label"], condition["guidance"]
    items = [
        ("model", f"{record['model']['name']}, weights {record['model']['weights']}"),
        ("seeds", f"{record['seeds']}, {count_of(record['pictures'], 'picture')} a sampler"),
    ]
    if label is not None:
        guided = "" if scale is None else f", guidance {scale:g}"
        items.append(("condition", f"label {label}{guided}"))
    items.append(
        (
            "references",
            f"{references['solver']} at {references['nfe']} evaluations, {references['grid']} "
            f"grid, {references['dtype']}; own error {references['own_error']:.2g}; population: "
            f"seeds {references['population']}",
        )
    )
    for judge, name in record.get("features", {}).items():
        items.append((f"FD-{judge}", f"{name}; floor {record['floor'][judge]['fd']:.4f}"))
    chosen = "nothing was chosen: every solver has its usual setting"
    if screen["seeds"]:
        chosen = (
            f"on seeds {screen['seeds']} by {screen['by']}; all on the first "
            f"{screen['first_round']} of them, the best {FINALISTS} on all. Grids "
            f"{', '.join(screen['grids'])}; first step {', '.join(screen['afs'])}; end "
            f"{', '.join(screen['ends'])}"
        )
    items.append(("settings", chosen))
    for source in record["sources"]:
        machine = source["machine"]
        gpu = f"{machine['gpu']}, " if machine["gpu"] else ""
        if source["command"]:
            items.append(("command", source["command"]))
        items.append(
            (
                "machine",
                f"{source['made']}: network in {source['dtype']}; {gpu}{machine['processor']}, "
                f"{count(machine['cores'], 'core')}, {count(machine['threads'], 'thread')}; torch "
                f"{machine['torch']}, Python {machine['python']}",
            )
        )
    for name, value in items:
        text = html.escape(value)
        yield f"<dt>{html.escape(name)}</dt>"
        yield f"<dd>{f'<code>{text}</code>' if name == 'command' else text}</dd>"


PLAIN = """
figure { margin: 0 0 8px; }
figure img { display: block; width: min(100%, 1080px); height: auto; }
figcaption { color: var(--faint); font-size: .92rem; max-width: 68ch; margin-top: 8px; }
.scroll { overflow-x: auto; }
.numbers { max-width: none; width: auto; font-size: .92rem; }
.numbers th, .numbers td { white-space: nowrap; padding-top: 5px; padding-bottom: 5px; }
.numbers td.setting { color: var(--faint); font-size: .86rem; }
.numbers .about { display: inline; color: var(--faint); }
.numbers td b { font-weight: 650; color: var(--accent); }
.numbers th.budget { padding-top: 26px; font-weight: 600; border-bottom-color: var(--faint); }
.strips th.budget { font-size: .98rem; font-weight: 600; padding: 18px 0 2px; }
.name { white-space: nowrap; }
main { max-width: min(100%, 1500px); }
"""
