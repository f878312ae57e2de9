"""How the demo's results look: a table for the terminal, one picture, and a self-contained page.

Nothing is computed here; `fewstep.report.demo` is where the numbers come from.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table

__all__ = ["DemoResult", "Row", "count", "page", "poster", "render_table", "span"]

SHOWN = 16  # pictures in a row at most; the numbers are over all seeds


@dataclass(frozen=True, eq=False)
class Row:
    """One solver's run.

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
    """What the demo computed and wrote.

    rows: the ODE solvers by error, then the stochastic ones; students among both
    exact: the reference, whose errors are its distances to the check on the first seeds
    protocol: how to make all this again, in words
    files: what was written
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
        return [row for row in self.rows if row.errors is not None and not row.student]

    @property
    def stochastic_rows(self) -> list[Row]:
        return [row for row in self.rows if row.errors is None and not row.student]

    @property
    def student_rows(self) -> list[Row]:
        """By name and budget."""
        rows = [row for row in self.rows if row.student]
        return sorted(rows, key=lambda row: (row.solver, row.nfe))

    @property
    def students(self) -> str:
        """Their names."""
        return ", ".join(dict.fromkeys(row.solver for row in self.student_rows))

    @property
    def blocks(self) -> list[list[Row]]:
        """The rows as they are shown, those of a kind together."""
        blocks = [[self.exact], self.ode_rows, self.student_rows, self.stochastic_rows]
        return [block for block in blocks if block]


def count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def span(seeds: Sequence[int]) -> str:
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
        title=f"{result.model}: {result.nfe} evaluations, seeds {span(result.seeds)}",
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
    for row in (row for block in result.blocks[1:] for row in block):
        error = ("stochastic", "") if row.errors is None else _error(row)
        about = row.about.partition(",")[0] + ", " if row.solver == "auto" else ""
        table.add_row(row.solver, str(row.nfe), _ms(row), *error, about + row.settings)
    return table


def _caption(result: DemoResult, row: Row) -> str:
    """What stands under a solver's name beside its pictures."""
    if row is result.exact:
        return count(row.nfe, "evaluation")
    if row.errors is None:
        return f"{count(row.nfe, 'evaluation')}, stochastic"
    error = f"error {_error(row)[0]}"
    if row.student:
        return f"{count(row.nfe, 'evaluation')}, {error}"
    # of a learned solver's name, "tuned from ipndm-3 5ac1e314215b", the first word has room
    called = row.about.partition(",")[0].partition(" ")[0]
    return f"{called}, {error}" if row.solver == "auto" else error


def _full_bar(result: DemoResult) -> float:
    """The error that fills a bar: the worst, but at most 1, the way from black to middle grey."""
    return min(1.0, max((row.rmse or 0.0 for row in result.ode_rows), default=1.0)) or 1.0


def _exceeds(result: DemoResult, row: Row) -> bool:
    """Whether a solver could not spend the budget."""
    return row is not result.exact and not row.student and row.nfe != result.nfe


def _title(result: DemoResult) -> str:
    names = {row.solver for row in result.rows if not row.student} - {"auto"} or {"auto"}
    return f"Same noise, {count(result.nfe, 'evaluation')}, {count(len(names), 'solver')}"


def _headline(result: DemoResult) -> str:
    """What there is to see, in a sentence or two."""
    text = "Each column starts from one noise; each row takes it to a picture with another solver."
    if result.ode_rows:
        best, exact = result.ode_rows[0], result.exact
        text += (
            f" The closest to the exact solution is {best.solver}: {count(best.nfe, 'evaluation')}"
            f" and {_ms(best)} ms a picture, where the exact one took {exact.nfe} and"
            f" {_ms(exact)} ms."
        )
    if result.students:
        text += f" Distilled from this network for the fewest evaluations: {result.students}."
    return text


# The picture.

PAPER, INK, FAINT, LINE, ACCENT = "#fbfaf7", "#1d1c1a", "#77736b", "#dcd8cf", "#b5502b"
MARGIN, LABELS, TILE, GAP, SKIP = 44, 292, 96, 3, 30


def poster(result: DemoResult) -> Image.Image:
    """All strips with their labels on one sheet, RGB."""
    shown = min(len(result.seeds), SHOWN)
    scale = max(1, round(TILE / result.exact.pictures.shape[1]))
    strip = _strip(result.exact.pictures[:shown], scale, GAP)
    height, width = strip.shape[:2]
    pitch = height + 9
    left = MARGIN + LABELS
    full = max(left + width + MARGIN, 960)
    blocks = result.blocks
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
    write(MARGIN, tall - MARGIN, f"{foot} {count(len(result.seeds), 'seed')}", 19, FAINT)
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


def page(result: DemoResult) -> str:
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
    note = f"The numbers are over {count(more, 'more seed')} than the pictures." if more else ""
    return f'<span class="pointer">{text}</span> {note}'


def _strips(result: DemoResult, shown: int) -> Iterator[str]:
    seeds = "".join(f"<span>{seed}</span>" for seed in result.seeds[:shown])
    yield '<table class="strips">\n<tbody>'
    yield f'<tr><th class="about">seed</th><td><div class="seeds figure">{seeds}</div></td></tr>'
    for block in result.blocks:
        if block[0] is not result.exact:
            yield "</tbody>\n<tbody>"
        for row in block:
            name = html.escape(row.solver)
            about = html.escape(_caption(result, row))
            if _exceeds(result, row) and row.errors is not None:
                about += f', <span class="off">{row.nfe} evaluations</span>'
            text = f"pictures by {name} for seeds {span(result.seeds[:shown])}"
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
    for row in (row for block in result.blocks for row in block):
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
    seeds = count(len(result.seeds), "seed")
    yield (
        "NFE is the number of network evaluations for one picture, counted while the solver ran. "
        f"A solver that cannot spend exactly {result.nfe} has the next larger budget that it can: "
        "so much is in its favour."
    )
    yield (
        "Error is the root of the mean squared difference to the exact solution, pixels in "
        f"[-1,\u00a01], at the grid's end; the mean over {seeds}, ± the standard "
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
    if result.students:
        yield (
            f"Students ({result.students}) were trained to end at once where this network's path "
            "ends. Those that add fresh noise before each further evaluation end elsewhere: judge "
            "these rows as pictures."
        )
    if result.stochastic_rows:
        yield (
            "The stochastic solvers add noise on the way and end elsewhere, so a distance to the "
            "exact solution of the ODE would say nothing about them."
        )
    yield f"{seeds} can only rank solvers roughly; judge a close call on more."


def _protocol_items(result: DemoResult) -> Iterator[str]:
    for name, value in result.protocol.items():
        text = html.escape(value)
        yield f"<dt>{name}</dt><dd>{f'<code>{text}</code>' if name == 'command' else text}</dd>"


def _data_url(pictures: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(_strip(pictures, 1, 1)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
