"""A comparison's rows in order and in words, as CSV, and as Markdown over training seeds."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np

__all__ = ["comparison_csv", "ordered", "seeds_table", "setting_words", "short_names"]

PLAIN = (
    "sampler",
    "nfe",
    "network_calls",
    "solver",
    "grid",
    "afs",
    "end",
    "error",
    "error_se",
    "psnr",
    "seconds",
)


def setting_words(row: dict[str, Any]) -> str:
    """A row's setting in short: "karras, mean first, to 0"; of a student, its sampler, unless that
    is a learned solver with its own grid."""
    if "student" in row and row["grid"] is not None:
        return "consistency-ode" if row["solver"] == "ddim" else row["solver"]
    grid = row["grid"] if isinstance(row["grid"], str) else "own grid"
    afs = f", {row['afs']} first" if row["afs"] not in (None, "none") else ""
    return grid + afs + (", to 0" if row["end"] == "zero" else "")


def short_names(record: dict[str, Any]) -> dict[str, str]:
    """What each sampler is called: a folder by its last part, unless two end so."""
    names = list(dict.fromkeys(row["sampler"] for row in record["rows"]))
    last = {name: PurePath(name).name if "/" in name else name for name in names}
    short = list(last.values())
    return {name: last[name] if short.count(last[name]) == 1 else name for name in names}


def ordered(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows by budget, the best first: by the last feature network's excess, else by error, where
    stochastic solvers, to which an error says little, come last."""
    judges = list(record["floor"])

    def key(row: dict[str, Any]) -> tuple[int, bool, float]:
        if judges:
            return row["nfe"], False, row["fd"][judges[-1]]["excess"]
        return row["nfe"], bool(row.get("stochastic")), row["error"]

    return sorted(record["rows"], key=key)


def seeds_table(record: dict[str, Any]) -> str:
    """What was trained, over its training seeds, in Markdown: for each feature network, and for the
    error, the mean of the excess by budget with its standard error over training seeds, and for
    students the same of the difference to LCM with the same seed where there is one. Samplers that
    draw noise have no place among errors. Below them the training-free sampler that the first
    feature network prefers; among errors, the one with the least. Empty where nothing was trained
    with more than one seed: students lie in folders called NAME-SEED, learned solvers in
    NAME-sSEED."""
    called, judges = short_names(record), list(record["floor"])
    trained: dict[str, dict[int, dict[int, dict[str, Any]]]] = {}  # by name, training seed, budget
    students, plain = set(), []
    for row in record["rows"]:
        if found := training_seed(row, called[row["sampler"]]):
            name, seed = found
            trained.setdefault(name, {}).setdefault(seed, {})[row["nfe"]] = row
            students |= {name} if "student" in row else set()
        elif row["grid"] is not None and "student" not in row:
            plain.append(row)
    if all(len(runs) < 2 for runs in trained.values()):
        return ""
    budgets = sorted({nfe for runs in trained.values() for rows in runs.values() for nfe in rows})
    base = trained["lcm"] if "lcm" in students else {}

    def value(row: dict[str, Any], judge: str) -> float:
        if judge:
            return row["fd"][judge]["excess"]
        return math.nan if row.get("stochastic") else row["error"]

    tables = []
    for judge in [*judges, ""]:
        table = {name: _over_seeds(runs, budgets, judge, value) for name, runs in trained.items()}
        for name in trained:
            paired = {seed: rows for seed, rows in trained[name].items() if seed in base}
            if paired and name in students - {"lcm"}:
                cells = _over_seeds(paired, budgets, judge, value, base)
                table[f"{name} less lcm, by seed"] = cells
        best = {}
        for nfe in budgets:
            rows = [row for row in plain if row["nfe"] == nfe and not row.get("stochastic")]
            if rows:
                row = min(rows, key=lambda row: value(row, judges[0] if judge else ""))
                best[nfe] = f"{value(row, judge):.3f} ({called[row['sampler']]})"
        table |= {"best training-free solver": best} if best else {}
        what = f"excess FD-{judge}" if judge else "error"
        lines = [f"| {what} | {' | '.join(f'{nfe} NFE' for nfe in budgets)} |"]
        lines += ["|---" * (len(budgets) + 1) + "|"]
        for name, cells in table.items():
            lines.append(f"| {name} | {' | '.join(cells.get(nfe, '-') for nfe in budgets)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def training_seed(row: dict[str, Any], name: str) -> tuple[str, int] | None:
    """What is trained, `name` without its seed, and the seed; None for what does not say one."""
    if "student" in row:
        seed = row["student"]["recipe"].get("seed", 0)
        return (name.removesuffix(f"-{seed}"), seed) if name.endswith(f"-{seed}") else None
    stem, found, seed = name.rpartition("-s")
    return (stem, int(seed)) if found and seed.isdecimal() and row["grid"] is None else None


def _over_seeds(
    runs: Mapping[int, Mapping[int, dict[str, Any]]],
    budgets: list[int],
    judge: str,
    value: Any,
    less: Mapping[int, Mapping[int, dict[str, Any]]] | None = None,
) -> dict[int, str]:
    """By budget, the mean over training seeds ± its standard error, with how many there are."""
    cells = {}
    for nfe in budgets:
        found = np.array(
            [
                value(rows[nfe], judge) - (0 if less is None else value(less[seed][nfe], judge))
                for seed, rows in runs.items()
                if nfe in rows and (less is None or nfe in less[seed])
            ]
        )
        found = found[~np.isnan(found)]
        if len(found):
            error = f" ± {found.std(ddof=1) / len(found) ** 0.5:.3f}" if len(found) > 1 else ""
            cells[nfe] = f"{found.mean():{'.3f' if less is None else '+.3f'}}{error} ({len(found)})"
    return cells


def comparison_csv(record: dict[str, Any]) -> str:
    """One line for each row, plain numbers."""
    judges = list(record["floor"])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    distances = ("value", "se", "excess", "excess_se")
    writer.writerow(
        [*PLAIN, *(f"fd-{judge} {what}" for judge in judges for what in distances)]
        + [f"fd-{judge} to data" for judge in judges]
        + [f"{judge} agreement" for judge in judges]
    )
    for row in ordered(record):
        plain = [row[name] if row[name] is not None else "" for name in PLAIN]
        plain[PLAIN.index("grid")] = (
            row["grid"] if isinstance(row["grid"], str) else " ".join(map(str, row["grid"] or ()))
        )
        numbers = [row["fd"][judge][what] for judge in judges for what in distances]
        cosines = row.get("agreement", {}).get("cosine", {})
        more = [there.get(judge, "") for there in (row["fd_data"], cosines) for judge in judges]
        writer.writerow([*plain, *numbers, *more])
    return out.getvalue()
