"""A comparison as one page: the finding in words, curves, pictures, every number.

Nothing is computed here: the numbers come from `fewstep.evaluate.compare`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from fewstep.evaluate.compare import Comparison
from fewstep.evaluate.compare.design import FINALISTS
from fewstep.files import write_json, write_whole
from fewstep.report import figures
from fewstep.report.figures import PAPER, Curve, Drawn, draw, saved
from fewstep.report.pages import Cell, Group, Line, Sheet, Strip, render, shown_pictures
from fewstep.report.tables import comparison_csv, ordered, setting_words, short_names
from fewstep.text import clean, count, joined, label

__all__ = ["comparison_page", "curves_file", "deciding", "with_error", "write_comparison"]

Row = dict[str, Any]
Record = dict[str, Any]

HEADLINE = 5  # the budget that the ranking is drawn at, where it is there
LONGEST = 110  # letters of a headline
MOST_CURVES = 14  # that a figure can show; the others stand in the tables


@dataclass(frozen=True)
class Scale:
    """What samplers are measured by; less is better on each.

    Args:
        title: of the axis and the column
        of: a row's value and its standard error, which is 0 where there is none; None where the
            number says nothing about it
    """

    title: str
    of: Callable[[Row], tuple[float, float] | None]

    def known(self, row: Row) -> tuple[float, float]:
        found = self.of(row)
        assert found is not None
        return found


def comparison_page(record: Record, strips: dict[str, np.ndarray], plots: bool = True) -> bytes:
    """The report as one HTML file that needs nothing else.

    Args:
        record, strips: as in `Comparison`; rows without a strip have no pictures on the page
        plots: whether to draw figures
    """
    return render(
        "comparison.html.j2",
        kicker=f"fewstep compare, {record['model']['name']}",
        title=_unbroken(_headline(record), record),
        lead=[_unbroken(text, record) for text in _lead(record)],
        curves=_curves(record) if plots else [],
        ranking=_ranking(record) if plots and _ranked_on_all(record) else None,
        main=_evaluations([_main_budget(record)]),
        deciding=deciding(record).title,
        several=len(record["sources"]) > 1,
        sheet=_sheet(record, strips),
        heads=_heads(record),
        groups=list(_groups(record)),
        record=record,
        judge=[*record["floor"], "error"][max(len(record["floor"]) - 1, 0)],
        stochastic=any(row.get("stochastic") for row in record["rows"]),
        protocol=list(_protocol(record)),
    )


def write_comparison(result: Comparison, out: Path, plots: bool = True) -> tuple[Path, ...]:
    """comparison.json, .csv and report.html in a folder; returns their paths."""
    paths = out / "comparison.json", out / "comparison.csv", out / "report.html"
    write_json(paths[0], result.record)
    write_whole(paths[1], comparison_csv(result.record).encode())
    write_whole(paths[2], comparison_page(result.record, result.strips, plots))
    return paths


# What the record says.


def _scales(record: Record) -> list[Scale]:
    """The feature networks in their order, then the error."""

    def excess(judge: str) -> Scale:
        return Scale(
            f"excess FD-{judge}",
            lambda row: (row["fd"][judge]["excess"], row["fd"][judge]["excess_se"]),
        )

    def error(row: Row) -> tuple[float, float] | None:
        return None if row.get("stochastic") else (row["error"], row["error_se"] or 0.0)

    return [*(excess(judge) for judge in record["floor"]), Scale("error", error)]


def deciding(record: Record) -> Scale:
    """The last feature network; the error where there is none."""
    return _scales(record)[max(len(record["floor"]) - 1, 0)]


def _shown_scales(record: Record) -> list[Scale]:
    """All, the deciding one first."""
    main = deciding(record).title
    return sorted(_scales(record), key=lambda scale: scale.title != main)


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
    return sorted(_distinct(rows), key=lambda row: scale.known(row)[0])


def _level(rows: Sequence[Row], scale: Scale) -> list[Row]:
    """Those within two standard errors of the best."""
    known = [(row, *found) for row in rows if (found := scale.of(row)) is not None]
    least, own = min(((value, spread) for _, value, spread in known), default=(0.0, 0.0))
    return [row for row, value, spread in known if value - least <= 2 * math.hypot(spread, own)]


def _chosen(record: Record) -> list[str]:
    """Samplers in the order in which they deserve a place: the best of each budget, the main one
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
        leaders = _level(_ranked(record, nfe, scale), scale)
        shared.setdefault(tuple(called[row["sampler"]] for row in leaders), []).append(nfe)
    parts, said = [], ""
    for names, at in shared.items():
        if not names:
            continue
        who = joined(names) if len(names) < 4 else f"{len(names)} samplers"
        verb = " leads" if len(names) == 1 else " share the lead"
        where = joined(at) if parts else _evaluations(at)
        parts.append(f"{who}{'' if verb == said else verb} at {where}")
        said = verb
    return "; ".join(parts) or f"{len(called)} stochastic samplers"


def _unbroken(text: str, record: Record) -> Markup:
    """As HTML in which no sampler's name is cut at a hyphen."""
    names = sorted({str(escape(clean(n))) for n in short_names(record).values()}, key=len)
    words = "|".join(re.escape(name) for name in reversed(names) if name)
    found = re.sub(
        rf"(?<![\w-])({words})(?![\w-])", r'<span class="name">\1</span>', str(escape(clean(text)))
    )
    return Markup(found)


def _evaluations(budgets: Sequence[int]) -> str:
    return f"{joined(budgets)} evaluation" + "s" * (list(budgets) != [1])


def _lead(record: Record) -> Iterator[str]:
    """What the headline rests on, in figures."""
    scale, called, nfe = deciding(record), short_names(record), _main_budget(record)
    pictures, judges = count(record["pictures"], "picture"), list(record["floor"])
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
    if (whole := _who_leads(record, _budgets(record))) != _headline(record):
        yield f"{whole}."

    def told(row: Row) -> str:
        return f"{called[row['sampler']]} at {with_error(*scale.known(row))}"

    then = f", then {joined([told(row) for row in rows[1:3]])}" if len(rows) > 1 else ""
    last = f"; last comes {told(rows[-1])}" if len(rows) > 3 else ""
    yield f"{how} With {_evaluations([nfe])} {told(rows[0])} comes first{then}{last}."
    errors = _scales(record)[-1]
    near = _ranked(record, nfe, errors)
    if judges and near and near[0]["sampler"] != rows[0]["sampler"]:
        best = errors.of(rows[0])
        where = f", where {called[rows[0]['sampler']]} has {with_error(*best)}" if best else ""
        yield (
            f"Nearest to the exact solution, pixel by pixel, is another: "
            f"{called[near[0]['sampler']]}, with an error of {with_error(*errors.known(near[0]))}"
            f"{where}."
        )


def with_error(value: float, spread: float, digits: int | None = None) -> str:
    """The value and its standard error, with as many decimals as the latter bears out; three
    figures of the value where there is none."""
    if not spread > 0:
        return f"{value:#.3g}".rstrip(".")
    digits = _decimals(spread) if digits is None else digits
    return f"{value:.{digits}f}\u00a0±\u00a0{spread:.{digits}f}"


def _decimals(spread: float) -> int:
    """One figure of a standard error, two where the first is 1 or 2: 0.0009, 0.0013."""
    power = math.floor(math.log10(spread) + math.log10(1 / 0.95))
    lead = spread / 10.0**power
    return min(9, max(0, -power + (lead < 2.95)))


# Figures.


def _curves(record: Record) -> list[tuple[str, Drawn]]:
    """Each scale that has something to show against budget and time."""
    if len(_budgets(record)) < 2:
        return []
    found = []
    for scale in _shown_scales(record):
        if lines := _lines(record, scale):
            heading = f"{scale.title[0].upper()}{scale.title[1:]} against budget and time"
            found.append((heading, draw(_painter(scale, lines), 4.8, 8.2)))
    return found


def _painter(scale: Scale, lines: Sequence[Curve]) -> figures.Painter:
    title = label(scale.title)
    return lambda figure, narrow: figures.curves(figure, narrow, lines, title)


def _lines(record: Record, scale: Scale) -> list[Curve]:
    """The samplers that deserve a place, as curves."""
    called, lines = short_names(record), []
    for name in _chosen(record)[:MOST_CURVES]:
        ranked = [row for nfe in _budgets(record) for row in _ranked(record, nfe, scale)]
        rows = [row for row in ranked if row["sampler"] == name]
        if rows:
            value, spread = zip(*map(scale.known, rows), strict=True)
            nfe = [row["nfe"] for row in rows]
            ms = [1000 * row["seconds"] for row in rows]
            lines.append(Curve(label(called[name]), nfe, ms, value, spread))
    return lines


def curves_file(record: Record) -> bytes:
    """The deciding scale against budget and time as an SVG file on a ground of its own."""
    scale = deciding(record)
    return saved(_painter(scale, _lines(record, scale)), (9.6, 4.8), paper=PAPER)


def _ranked_on_all(record: Record) -> list[Row]:
    return _ranked(record, _main_budget(record), deciding(record))


def _ranking(record: Record) -> Drawn:
    """All samplers at the main budget on every scale, in the order of the deciding one."""
    rows, called = _ranked_on_all(record), short_names(record)
    scales = [
        (label(scale.title), np.array([scale.of(row) or (math.nan, math.nan) for row in rows]))
        for scale in _shown_scales(record)
    ]
    scales = [(title, values) for title, values in scales if not np.isnan(values[:, 0]).all()]
    names = [label(called[row["sampler"]]) for row in rows]
    high = 0.7 + 0.27 * len(rows)
    return draw(
        lambda figure, narrow: figures.ranking(figure, narrow, names, scales),
        high,
        high * len(scales),
    )


# Pictures and numbers.


def _sheet(record: Record, strips: dict[str, np.ndarray]) -> Sheet | None:
    """The strips, budget by budget."""
    if strips.get("") is None:
        return None
    exact, shown, width, height = shown_pictures(strips[""])
    called, groups = short_names(record), []
    scales = {scale.title: scale for scale in (deciding(record), _scales(record)[-1])}
    for nfe in _budgets(record):
        rows = [Strip("exact", f"{record['references']['nfe']} evaluations", exact, shown)]
        for row in _distinct(ordered(record)):
            if row["nfe"] != nfe or f"{row['sampler']}@{nfe}" not in strips:
                continue
            url, number, *_ = shown_pictures(strips[f"{row['sampler']}@{nfe}"])
            told = [
                f"{title.partition(' ')[0]} {with_error(scale.known(row)[0], 0.0)}"
                for title, scale in scales.items()
                if scale.of(row) is not None
            ]
            rows.append(Strip(called[row["sampler"]], ", ".join(told), url, min(number, shown)))
        if len(rows) > 1:
            groups.append(Group(_evaluations([nfe]), blocks=[rows]))
    return Sheet(exact, width, height, groups)


def _heads(record: Record) -> list[str]:
    return ["sampler", "error", *(f"excess FD-{judge}" for judge in record["floor"]), "ms/picture"]


def _groups(record: Record) -> Iterator[Group]:
    """The table, budget by budget: below each excess the distances, below each error the PSNR."""
    scales, called, judges = _scales(record), short_names(record), list(record["floor"])
    columns = zip(*(_values(record, row) for row in record["rows"]), strict=True)
    digits = [_decimals(min((s for _, s in column if s > 0), default=1.0)) for column in columns]
    for nfe in _budgets(record):
        rows = [row for row in ordered(record) if row["nfe"] == nfe]
        leading = [
            {id(row) for row in _level(rows, scale)} if len(rows) > 1 else set() for scale in scales
        ]
        lines = []
        for row in rows:
            *excesses, error = (
                Cell(with_error(*value, places), _below(record, row, judge), id(row) in ids)
                for value, places, ids, judge in zip(
                    _values(record, row), digits, leading, [*judges, ""], strict=True
                )
            )
            ms = 1000 * row["seconds"]
            time = Cell(f"{ms:.1f}" if ms < 99.95 else f"{ms:,.0f}")
            lines.append(Line(called[row["sampler"]], _setting(row), [error, *excesses, time]))
        yield Group(_evaluations([nfe]), lines)


def _values(record: Record, row: Row) -> Iterator[tuple[float, float]]:
    """On each scale; the error of a stochastic solver too."""
    for judge in record["floor"]:
        yield row["fd"][judge]["excess"], row["fd"][judge]["excess_se"]
    yield row["error"], row["error_se"] or 0.0


def _below(record: Record, row: Row, judge: str) -> str:
    """What belongs to a number: PSNR to the error, distances and agreement to an excess."""
    if not judge:
        return f"PSNR {row['psnr']:.1f} dB"
    data = f", to data {row['fd_data'][judge]:.2f}" if judge in row["fd_data"] else ""
    told = row.get("agreement", {"cosine": {}})
    near = f", {told['cosine'][judge]:.3f} like {told['nfe']}" if judge in told["cosine"] else ""
    return f"FD {with_error(row['fd'][judge]['value'], 0.0)}{data}{near}"


def _setting(row: Row) -> str:
    """A setting in words; what "auto" and a learned solver's folder stand for comes before it."""
    named = row["sampler"] == row["solver"] or "student" in row
    words = [setting_words(row) if named else f"{row['solver']}: {setting_words(row)}"]
    if row["network_calls"] != row["nfe"]:  # guidance doubles them
        words.append(count(row["network_calls"], "network call"))
    return ", ".join(words + ["stochastic"] * bool(row.get("stochastic")))


def _protocol(record: Record) -> Iterator[tuple[str, str]]:
    references, screen, condition = record["references"], record["screen"], record["condition"]
    yield "model", f"{record['model']['name']}, weights {record['model']['weights']}"
    yield "seeds", f"{record['seeds']}, {count(record['pictures'], 'picture')} a sampler"
    if given := [f"{name} {value}" for name, value in condition.items() if value is not None]:
        yield "condition", ", ".join(given)
    yield (
        "references",
        f"{references['solver']} at {references['nfe']} evaluations, {references['grid']} grid, "
        f"{references['dtype']}; own error {references['own_error']:.2g}; population: seeds "
        f"{references['population']}",
    )
    for judge, name in record.get("features", {}).items():
        yield f"FD-{judge}", f"{name}; floor {record['floor'][judge]['fd']:.4f}"
    chosen = "nothing was chosen: every solver has its usual setting"
    if screen["seeds"]:
        chosen = (
            f"on seeds {screen['seeds']} by {screen['by']}; all on the first "
            f"{screen['first_round']} of them, the best {FINALISTS} on all. Grids "
            f"{', '.join(screen['grids'])}; analytic first step {', '.join(screen['afs'])}; end "
            f"{', '.join(screen['ends'])}"
        )
    yield "settings", chosen
    for source in record["sources"]:
        machine = source["machine"]
        gpu = f"{machine['gpu']}, " if machine["gpu"] else ""
        if source["command"]:
            yield "command", source["command"]
        yield (
            "machine",
            f"{source['made']}: network in {source['dtype']}; {gpu}{machine['processor']}, "
            f"{count(machine['cores'], 'core')}, {count(machine['threads'], 'thread')}; torch "
            f"{machine['torch']}, Python {machine['python']}",
        )
