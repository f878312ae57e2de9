"""Which solver, grid and first step are best at each budget, by error to the exact solution.

Every solver's setting (grid, analytic first step, end) is chosen on validation seeds (1,000,000 and
up); then each runs at its chosen setting on test seeds, and those errors are the ones reported. The
error of a picture is the root mean square distance between its endpoint and the same seed's fine
reference solve, in pixel units of [-1, 1].

    python studies/screen_solvers.py --write     puts the winners into the model's card as `auto`
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep
from fewstep.files import write_json
from fewstep.models import BUILTIN, Model

CHOOSE_ON = range(1_000_000, 1_000_032)
REPORT_ON = range(128)
SOLVERS = ("ddim", "heun", "dpmpp-2m", "exp-adams-3", "unipc-2", "deis-2", "ipndm-2", "ipndm-3")
GRIDS = ("karras", "log-snr", "time-uniform")
FIRSTS = ("none", "mean")
ENDS = ("sigma_min", "zero")
REFERENCE = ("exp-adams-4", 80)  # within 1e-4 of a finer solve by another method
SHOWN = ("3", "5", "7")  # budgets of the table
Rows = dict[str, list[dict[str, Any]]]


def errors(x: Tensor, reference: Tensor) -> Tensor:
    """Root mean square difference of each picture, [n]."""
    return (x - reference).square().flatten(1).mean(1).sqrt()


@torch.inference_mode()
def screen(model: Model, budgets: list[int]) -> Rows:
    """For each budget, one row per solver at its best setting on the validation seeds."""
    denoiser, x_T = model.denoiser(), model.prior(CHOOSE_ON)
    reference = fewstep.solve(denoiser, x_T, *REFERENCE)
    table: Rows = {}
    for nfe in budgets:
        rows = []
        for solver in SOLVERS:
            tries = []
            for grid, first, end in itertools.product(GRIDS, FIRSTS, ENDS):
                run: dict[str, Any] = {
                    "solver": solver, "grid": grid, "afs": first, "end": end,
                }  # fmt: skip
                try:
                    x = fewstep.solve(denoiser, x_T, nfe=nfe, **run)
                except ValueError:  # a budget that this solver cannot spend
                    continue
                tries.append({**run, "screened": errors(x, reference).mean().item()})
            if tries:
                rows.append(min(tries, key=lambda row: row["screened"]))
        table[str(nfe)] = sorted(rows, key=lambda row: row["screened"])
        print(
            nfe, *(f"{row['solver']} {row['screened']:.4f}" for row in table[str(nfe)]), flush=True
        )
    return table


@torch.inference_mode()
def measure(model: Model, table: Rows) -> None:
    """Add to the rows of the shown budgets the error on the test seeds, with its standard error."""
    denoiser, x_T = model.denoiser(), model.prior(REPORT_ON)
    reference = fewstep.solve(denoiser, x_T, *REFERENCE)
    for nfe in set(SHOWN) & set(table):
        for row in table[nfe]:
            run = {key: row[key] for key in ("solver", "grid", "afs", "end")}
            each = errors(fewstep.solve(denoiser, x_T, nfe=int(nfe), **run), reference)
            row |= {"rmse": each.mean().item(), "se": (each.std() / len(each) ** 0.5).item()}


def markdown(table: Rows) -> str:
    """The table of the README: solvers down, budgets across, the best of each budget in bold."""
    budgets = [nfe for nfe in SHOWN if nfe in table]
    lines = [
        f"| solver | {' | '.join(f'{nfe} NFE' for nfe in budgets)} |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    for solver in SOLVERS:
        cells = []
        for nfe in budgets:
            row = next((row for row in table[nfe] if row["solver"] == solver), None)
            best = min(other["rmse"] for other in table[nfe])
            if row is None:
                cells.append("-")
                continue
            text = f"{row['rmse']:.3f} ± {row['se']:.3f}"
            first = ", mean first" if row["afs"] == "mean" else ""
            first += ", to 0" if row["end"] == "zero" else ""
            bold = "**" if row["rmse"] == best else ""
            cells.append(f"{bold}{text}{bold} ({row['grid']}{first})")
        lines.append(f"| {solver} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(name: str = "fashion-mnist", budgets: str = "1-8", write: bool = False) -> None:
    low, _, high = budgets.partition("-")
    model = fewstep.load(name)
    table = screen(model, list(range(int(low), int(high or low) + 1)))
    measure(model, table)
    print(f"\nweights {model.card.weights_sha256[:16]}, torch {torch.__version__}\n")
    print(markdown(table))
    if write:
        folder = BUILTIN / name if (BUILTIN / name).is_dir() else Path(name)
        card = json.loads((folder / "card.json").read_text())
        keys = ("solver", "grid", "afs", "end")
        best = {nfe: {key: rows[0][key] for key in keys} for nfe, rows in table.items()}
        usual = {"end": "sigma_min"}
        card["auto"] = {
            nfe: {key: value for key, value in row.items() if usual.get(key) != value}
            for nfe, row in best.items()
        }
        write_json(folder / "card.json", card)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="fashion-mnist", help="a name or a model folder")
    parser.add_argument("--nfe", default="1-8", help="budgets, such as 5 or 3-8")
    parser.add_argument("--write", action="store_true", help="put the winners into the card")
    arguments = parser.parse_args()
    main(arguments.model, arguments.nfe, arguments.write)
