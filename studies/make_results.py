"""Write docs/results.md, its figure and the README's table from the comparisons in results/.

    make results                                    rewrites all of them from the stored numbers
    python studies/make_results.py --check       says whether they are what the numbers give; of
                                                    the figure, whether it was drawn from these

Nothing here computes a number: `fewstep compare` made them, and each file says with which command.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from fewstep.report.comparison import deciding, draw_curves
from fewstep.report.geometry import LIGHT
from fewstep.report.tables import ordered, seeds_table, setting_words, short_names

ROOT = Path(__file__).parents[1]
STORED = ROOT / "results"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
SHOWN = (1, 2, 4, 5, 7, 10)  # budgets of the README's table
SHOWN_IN_README = "fashion-mnist"  # the record that it is of
Record = dict[str, Any]


def judge(record: Record) -> str:
    """The feature network that no choice was made by: the last. Errors: ValueError without one."""
    if not record["floor"]:
        raise ValueError("a stored comparison needs a feature network; see fewstep compare -h")
    return list(record["floor"])[-1]


def named(record: Record) -> Record:
    """Without what only a folder of somebody's runs has, unless that is all."""
    rows = [row for row in record["rows"] if "/" not in row["sampler"]]
    return {**record, "rows": rows or record["rows"]}


def excess(row: Record, name: str) -> str:
    return f"{row['fd'][name]['excess']:.2f} ± {row['fd'][name]['excess_se']:.2f}"


def readme_table(record: Record) -> str:
    """Samplers down, budgets across: the judge's excess distance, the best of each budget bold."""
    name = judge(record)
    budgets = [nfe for nfe in SHOWN if any(row["nfe"] == nfe for row in record["rows"])]
    middle = budgets[(len(budgets) - 1) // 2]
    excesses: dict[str, dict[int, float]] = {}
    for row in record["rows"]:
        excesses.setdefault(row["sampler"], {})[row["nfe"]] = row["fd"][name]["excess"]
    best = {nfe: min(of[nfe] for of in excesses.values() if nfe in of) for nfe in budgets}

    def cell(nfe: int, of: dict[int, float]) -> str:
        if nfe not in of:
            return "-"
        return f"**{of[nfe]:.2f}**" if of[nfe] == best[nfe] else f"{of[nfe]:.2f}"

    called = short_names(record)
    order = sorted(excesses, key=lambda sampler: excesses[sampler].get(middle, float("inf")))
    lines = [
        f"| evaluations | {' | '.join(map(str, budgets))} |",
        "|---" + "|--:" * len(budgets) + "|",
        *(
            f"| {called[sampler]} | {' | '.join(cell(n, excesses[sampler]) for n in budgets)} |"
            for sampler in order
        ),
    ]
    return "\n".join(lines)


def chosen(screen: dict[str, Any]) -> str:
    """How the settings were chosen, as a sentence."""
    if not screen["seeds"]:
        return "Nothing was chosen: every solver has its usual setting."
    return (
        f"Settings were chosen on the validation seeds {screen['seeds']} by {screen['by']}, out of "
        f"{', '.join(screen['grids'])}; first step {', '.join(screen['afs'])}; end "
        f"{', '.join(screen['ends'])}."
    )


def results_page(records: dict[str, Record]) -> str:
    """The whole of docs/results.md."""
    parts = [
        "# Results",
        "Written by `make results` from the files in `results/`; never edited by hand. What the "
        "columns mean stands in [Compare samplers](compare.md), and how quality is measured in "
        "[Measure pictures](evaluate.md). The README's table has the last excess column: "
        "the distance by the network that no setting was chosen by.",
    ]
    for stem, record in records.items():
        names, references = list(record["floor"]), record["references"]
        data = [name for name in names if "fd_data" in record["floor"][name]]
        called = short_names(record)
        parts += [
            f"## {stem}",
            f"{record['model']['name']}, weights `{record['model']['weights'][:16]}`; "
            f"{record['pictures']:,} pictures, seeds {record['seeds']}. Reference solves: "
            f"{references['solver']} at {references['nfe']} evaluations on the "
            f"{references['grid']} grid, float32, within {references['own_error']:.2g} of a finer "
            f"solve by another method. Population: seeds {references['population']}. "
            f"{chosen(record['screen'])}",
            "The floor, which excess subtracts: "
            + "; ".join(f"FD-{name} {record['floor'][name]['fd']:.3f}" for name in names)
            + ".",
            f"Numbers: `results/{stem}.json`.",
        ]
        if has_curves(record):
            parts += [
                f"![The distance of the samplers against their evaluations and time]({stem}.svg)",
                "Bars reach two standard errors to either side. Learned solvers and students that "
                "do not come with fewstep are in the tables alone.",
            ]
        for nfe in sorted({row["nfe"] for row in record["rows"]}):
            head = ["sampler", "setting", "error", "PSNR"]
            head += [f"excess FD-{name}" for name in names]
            head += [f"{name}, data" for name in data]
            lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
            for row in ordered(record):
                if row["nfe"] != nfe:
                    continue
                spread = f" ± {row['error_se']:.4f}" if row["error_se"] is not None else ""
                cells = [called[row["sampler"]], setting_words(row), f"{row['error']:.4f}{spread}"]
                cells += [f"{row['psnr']:.1f}", *(excess(row, name) for name in names)]
                cells += [f"{row['fd_data'][name]:.2f}" for name in data]
                lines.append(f"| {' | '.join(cells)} |")
            parts += [f"### {nfe} evaluation{'s' * (nfe > 1)}", "\n".join(lines)]
        if table := seeds_table(record):
            parts += [
                "### Over training seeds",
                "Mean ± standard error over training seeds, and their number.",
                *table.split("\n\n"),
            ]
        parts += [f"Left out: {why}" for why in record.get("left_out", {}).values()]
        parts.append("### How these were made")
        for source in record["sources"]:
            machine = source["machine"]
            parts += [as_code(source["command"])] if source["command"] else []
            parts.append(
                f"On {source['made']}, network in {source['dtype']}, "
                f"{machine['gpu'] or machine['processor']}, {machine['cores']} cores, torch "
                f"{machine['torch']}."
            )
    return "\n\n".join(wrapped(part) for part in parts) + "\n"


def has_curves(record: Record) -> bool:
    return len({row["nfe"] for row in record["rows"]}) > 1


def figure(record: Record) -> bytes:
    """The judge's distance against evaluations and wall time, as SVG; its last line says which
    numbers it was drawn from, for its other bytes change with matplotlib."""
    shown = named(record)
    return draw_curves(shown, deciding(shown), LIGHT) + mark(record)


def mark(record: Record) -> bytes:
    stored = json.dumps(record, sort_keys=True).encode()
    return f"<!-- {hashlib.sha256(stored).hexdigest()} -->\n".encode()


def as_code(command: str) -> str:
    """A command in lines that a shell reads as one: broken between words, else after commas."""
    lines = []
    for line in textwrap.wrap(command, 98, break_long_words=False, break_on_hyphens=False):
        parts = line.replace(",", ", ") if len(line) > 98 else line
        pieces = textwrap.wrap(parts, 98, break_long_words=False, break_on_hyphens=False)
        lines += [piece.replace(", ", ",") + "\\" for piece in pieces[:-1]]
        lines.append(pieces[-1].replace(", ", ",") + " \\")
    return "\n".join(["```", *lines])[:-2] + "\n```"


def wrapped(part: str) -> str:
    """A paragraph in lines of 100; headings and tables as they are."""
    if part.startswith(("#", "|", "```")):
        return part
    return textwrap.fill(part, 100, break_long_words=False, break_on_hyphens=False)


def with_table(readme: str, table: str) -> str:
    """The README with the part between the marks replaced."""
    head, found, rest = readme.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"README.md needs the marks {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def main(check: bool = False) -> int:
    paths = sorted(STORED.glob("*.json"), key=lambda path: path.stem)
    records = {path.stem: json.loads(path.read_text()) for path in paths}
    if not records:
        raise ValueError(f"there is no comparison in {STORED}")
    main_record = named(records.get(SHOWN_IN_README, next(iter(records.values()))))
    wanted = {
        ROOT / "docs" / "results.md": results_page(records),
        ROOT / "README.md": with_table((ROOT / "README.md").read_text(), readme_table(main_record)),
    }
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    drawn = {ROOT / "docs" / f"{n}.svg": one for n, one in records.items() if has_curves(one)}
    old = [
        path
        for path, record in drawn.items()
        if not path.exists() or not path.read_bytes().endswith(mark(record))
    ]
    for path in stale + old:
        print(f"{path.relative_to(ROOT)} {'is out of date: make results' if check else 'written'}")
        if not check:
            path.write_bytes(figure(drawn[path]) if path in drawn else wanted[path].encode())
    return int(check and bool(stale + old))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if out of date")
    sys.exit(main(parser.parse_args().check))
