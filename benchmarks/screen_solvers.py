"""Which solver, grid and first step are best at each budget, by error to the exact solution.

Every candidate runs at its best self, over grids and analytic first steps, on validation seeds
(1,000,000 and up; never the test seeds). The error is the mean over seeds of the root mean square
distance between its endpoint and the same seed's fine reference solve, in pixel units of [-1, 1].

    python benchmarks/screen_solvers.py --write     puts the winners into the model's card as `auto`
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
from fewstep.models import BUILTIN

SEEDS = range(1_000_000, 1_000_128)
SOLVERS = ("ddim", "heun", "dpmpp-2m", "exp-adams-3", "unipc-2", "deis-2", "ipndm-2", "ipndm-3")
GRIDS = ("karras", "log-snr", "time-uniform")
FIRSTS = ("none", "mean")
REFERENCE = ("exp-adams-4", 80)  # within 1e-4 of a finer solve by another method


def error(x: Tensor, reference: Tensor) -> float:
    """Mean over pictures of the root mean square difference."""
    return (x - reference).square().flatten(1).mean(1).sqrt().mean().item()


@torch.inference_mode()
def screen(
    model_name: str, budgets: list[int], seeds: range = SEEDS
) -> dict[str, list[dict[str, Any]]]:
    """For each budget, one row per solver at its best setting, best first."""
    model = fewstep.load(model_name)
    denoiser, x_T = model.denoiser(), model.prior(seeds)
    reference = fewstep.solve(denoiser, x_T, *REFERENCE)
    table = {}
    for nfe in budgets:
        rows = []
        for solver in SOLVERS:
            tries = []
            for grid, first in itertools.product(GRIDS, FIRSTS):
                setting = {"solver": solver, "grid": grid, "first": first}
                try:
                    x = fewstep.solve(denoiser, x_T, solver, nfe, grid=grid, first=first)
                except ValueError:  # a budget that this solver cannot spend
                    continue
                tries.append({**setting, "rmse": round(error(x, reference), 5)})
            if tries:
                rows.append(min(tries, key=lambda row: row["rmse"]))
        table[str(nfe)] = sorted(rows, key=lambda row: row["rmse"])
        for row in table[str(nfe)]:
            print(nfe, row, flush=True)
    return table


def main(model: str = "fashion-mnist", budgets: str = "1-10", write: bool = False) -> None:
    low, _, high = budgets.partition("-")
    table = screen(model, list(range(int(low), int(high or low) + 1)))
    if write:
        folder = BUILTIN / model if (BUILTIN / model).is_dir() else Path(model)
        card = json.loads((folder / "card.json").read_text())
        card["auto"] = {nfe: rows[0] for nfe, rows in table.items()}
        write_json(folder / "card.json", card)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="fashion-mnist", help="a name or a model folder")
    parser.add_argument("--nfe", default="1-10", help="budgets, such as 5 or 3-8")
    parser.add_argument("--write", action="store_true", help="put the winners into the card")
    arguments = parser.parse_args()
    main(arguments.model, arguments.nfe, arguments.write)
