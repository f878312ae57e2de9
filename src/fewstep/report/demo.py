"""How the demo's results look: one picture for a document, and a page.

Nothing is computed here: the numbers come from `fewstep.evaluate.demo`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fewstep.data.images import write_png
from fewstep.evaluate.demo import DemoResult, Row
from fewstep.files import write_whole
from fewstep.report.figures import COLOURS, FAINT, INK, LINE, PAPER
from fewstep.report.pages import Cell, Group, Line, Sheet, Strip, render, shown_pictures
from fewstep.text import clean, count, label

__all__ = ["demo_page", "error_words", "ms_words", "own_error", "poster", "write_demo"]

SHOWN = 16  # pictures in a row of the poster at most; the numbers are over all seeds
MARGIN, LABELS, TILE, GAP, SKIP = 44, 292, 96, 3, 30  # pixels, of the poster


def write_demo(result: DemoResult, out: Path) -> DemoResult:
    """demo.png and demo.html in a folder; the result with their paths."""
    files = (out / "demo.png", out / "demo.html")
    write_png(files[0], np.asarray(poster(result)), result.protocol)
    write_whole(files[1], demo_page(result))
    return replace(result, files=files)


# Words.


def own_error(result: DemoResult) -> str:
    """The exact solution's distance to its check, one figure."""
    value = result.exact.rmse or 0.0
    return np.format_float_positional(value, precision=1, fractional=False, trim="-")


def ms_words(row: Row) -> str:
    """Milliseconds a picture."""
    return f"{row.ms:.1f}" if row.ms < 9.95 else f"{row.ms:.0f}"


def error_words(row: Row) -> tuple[str, str]:
    """The error and its standard error, in figures."""
    spread = row.standard_error
    return f"{row.rmse:.3f}", "" if spread is None else f"± {spread:.3f}"


def _caption(result: DemoResult, row: Row) -> str:
    """What stands under a solver's name beside its pictures."""
    if row is result.exact:
        return count(row.nfe, "evaluation")
    if row.errors is None:
        return f"{count(row.nfe, 'evaluation')}, stochastic"
    error = f"error {error_words(row)[0]}"
    if row.student:
        return f"{count(row.nfe, 'evaluation')}, {error}"
    # of a learned solver's name, "tuned from ipndm-3 5ac1e314215b", the first word has room
    called = row.about.partition(",")[0].partition(" ")[0]
    return f"{called}, {error}" if row.solver == "auto" else error


def _off(result: DemoResult, row: Row) -> str:
    """What a solver spent that could not spend the budget; else nothing."""
    off = row is not result.exact and not row.student and row.nfe != result.nfe
    return f"{row.nfe} evaluations" if off else ""


def _full_bar(result: DemoResult) -> float:
    """The error that fills a bar: the worst, but at most 1, the way from black to middle grey."""
    return min(1.0, max((row.rmse or 0.0 for row in result.ode_rows), default=1.0)) or 1.0


def _title(result: DemoResult) -> str:
    names = {row.solver for row in result.rows if not row.student} - {"auto"} or {"auto"}
    return f"Same noise, {count(result.nfe, 'evaluation')}, {count(len(names), 'solver')}"


def _fair(result: DemoResult) -> str:
    """How the settings were chosen."""
    if result.screened:
        return "each solver at its best setting on other seeds"
    return "solvers that the card does not name at their usual setting"


# The picture.


def poster(result: DemoResult) -> Image.Image:
    """All strips with their labels on one sheet, RGB."""
    shown = min(len(result.seeds), SHOWN)
    scale = max(1, round(TILE / result.exact.pictures.shape[1]))
    strip = _strip(result.exact.pictures[:shown], scale)
    height, width = strip.shape[:2]
    pitch, left, blocks = height + 9, MARGIN + LABELS, result.blocks
    top = MARGIN + 116
    tall = top + sum(len(block) * pitch + SKIP for block in blocks) + MARGIN + 6
    sheet = Image.new("RGB", (max(left + width + MARGIN, 1000), tall), PAPER)
    draw = ImageDraw.Draw(sheet)

    def write(
        x: float, y: float, text: str, size: int, fill: str = INK, anchor: str = "ls"
    ) -> None:
        font = ImageFont.load_default(size=size)
        draw.text((x, y), clean(text), fill=fill, font=font, anchor=anchor)

    write(MARGIN - 1, MARGIN + 30, _title(result), 38)
    same = f"{result.model}: every row starts from the same noise, {_fair(result)}"
    write(MARGIN, MARGIN + 66, same, 21, FAINT)
    for i, seed in enumerate(result.seeds[:shown]):
        middle = left + (i + 0.5) * (width + GAP) / shown - GAP / 2
        write(middle, top - 8, str(seed), 17, FAINT, "ms")
    write(left - 18, top - 8, "seed", 17, FAINT, "rs")
    y = top
    for block in blocks:
        for row in block:
            tile = Image.fromarray(_strip(row.pictures[:shown], scale))
            sheet.paste(tile.convert("RGB"), (left, y), tile.getchannel("A"))
            base = y + height // 2
            write(MARGIN, base - 5, label(row.solver, 24), 25)
            write(MARGIN, base + 22, _caption(result, row), 19, FAINT)
            if row.rmse is not None and row is not result.exact:
                long = max(2.0, (LABELS - 24) * min(1.0, row.rmse / _full_bar(result)))
                draw.rectangle((MARGIN, base + 32, MARGIN + long, base + 35), fill=COLOURS[0])
                write(left - 24, base + 22, _off(result, row), 17, COLOURS[0], "rs")
            y += pitch
        y += SKIP
        if block is not blocks[-1]:
            rule = y - SKIP // 2 - 5
            draw.line((MARGIN, rule, left + width, rule), fill=LINE, width=2)
    foot = "error: RMSE to the exact solution, pixels in [-1, 1], mean over"
    write(MARGIN, tall - MARGIN, f"{foot} {count(len(result.seeds), 'seed')}", 19, FAINT)
    return sheet


def _strip(pictures: np.ndarray, scale: int) -> np.ndarray:
    """Pictures side by side, enlarged, with transparent gaps: uint8 [h, w, c + 1]."""
    n, height, width, channels = pictures.shape
    big = pictures.repeat(scale, axis=1).repeat(scale, axis=2)
    cells = np.zeros((n, height * scale, width * scale + GAP, channels + 1), dtype=np.uint8)
    cells[:, :, : width * scale, :channels] = big
    cells[:, :, : width * scale, channels] = 255
    return np.concatenate(list(cells), axis=1)[:, :-GAP]


# The page.


def demo_page(result: DemoResult) -> bytes:
    """The report as one HTML file that needs nothing else."""
    exact, shown, width, height = shown_pictures(result.exact.pictures)
    blocks = [[_strip_of(result, row) for row in block] for block in result.blocks]
    best = result.ode_rows[0] if result.ode_rows else None
    return render(
        "demo.html.j2",
        kicker=f"fewstep demo, {result.model}",
        title=_title(result),
        result=result,
        fair=_fair(result),
        best=best and (best.solver, count(best.nfe, "evaluation"), ms_words(best)),
        exact=(result.exact.nfe, ms_words(result.exact), own_error(result)),
        students=", ".join(dict.fromkeys(row.solver for row in result.student_rows)),
        more=count(len(result.seeds) - shown, "more seed") if len(result.seeds) > shown else "",
        sheet=Sheet(exact, width, height, [Group("", blocks=blocks)], result.seeds[:shown]),
        heads=["solver", "error", "evaluations", "ms a picture", "setting"],
        groups=[Group("", [_line(result, row) for row in block]) for block in result.blocks],
        protocol=list(result.protocol.items()),
    )


def _strip_of(result: DemoResult, row: Row) -> Strip:
    url, shown, *_ = shown_pictures(row.pictures)
    off = _off(result, row) if row.errors is not None else ""
    return Strip(row.solver, _caption(result, row), url, shown, off)


def _line(result: DemoResult, row: Row) -> Line:
    if row is result.exact:
        error = Cell(f"checked to {own_error(result)}")
    elif row.errors is None:
        error = Cell("stochastic")
    else:
        value, spread = error_words(row)
        share = 100 * min(1.0, (row.rmse or 0.0) / _full_bar(result))
        error = Cell(value, spread, bar=share)
    about = f"{row.about}, {_off(result, row)}" if _off(result, row) else row.about
    cells = [error, Cell(str(row.nfe)), Cell(ms_words(row)), Cell("", row.settings)]
    return Line(row.solver, about, cells)
