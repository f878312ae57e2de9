"""Students of `garments` beside solvers on it: prompt agreement and Frechet distance by budget.

    python -m studies.garments_students --model garments --judges FOLDER --guidance 4 \\
        --rows dpmpp-2m unipc ./splam ./lora --nfe 1 2 4 8 --out results/garments-students.json

A row is a solver's name, a folder of a learned solver, or of one for each budget, a student's
folder, or a folder of adapters. All have the same prompts and seeds; see `studies.garments_teacher`
for these and for the judges.

Rows that are in the file already are kept, and not made again. What tells them apart are the name
of the folder, the budget, and what is in the folder: the hash of a student's weights and its levels
where they were chosen later, the hash of an adapter's file, the digest of a learned solver. The
weights of the last two are those of the network that they are used with.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fewstep
from fewstep.evaluate.agreement import prompts
from fewstep.files import write_json
from fewstep.learned import LearnedSolver
from fewstep.models import is_model
from fewstep.models.formats.loras import DIFFUSERS
from fewstep.provenance import VERSION, machine
from fewstep.records import read_json
from fewstep.sampling.choose import choose, locate
from fewstep.sampling.settings import Settings
from studies.commands import at_least, ended, positive, stop_after
from studies.garments_teacher import Judges, pictures_of
from studies.rows import chosen, same

FIELDS = ("row", "nfe", "weights", "adapter", "solver", "chosen")  # what tells rows apart


@dataclass(frozen=True)
class Sampler:
    """What a row samples.

    row: as it was asked for
    solver: auto, of a student and of adapters, or the row itself
    guidance: that it is given; students have their own
    """

    row: str
    model: Any
    solver: str = "auto"
    guidance: float | None = None

    @classmethod
    def of(cls, row: str, base: str, guidance: float, device: str = "cpu") -> Sampler:
        if is_model(row):
            return cls(row, fewstep.load(row, device=device))
        if (Path(row) / DIFFUSERS).is_file():
            return cls(row, fewstep.load(base, device=device, loras=[(row, 1.0)]))
        return cls(row, fewstep.load(base, device=device), row, guidance)

    def known(self, nfe: int) -> dict[str, Any]:
        """What tells its row at a budget from others.

        Raises:
            ValueError: there is no such solver, or it is of other budgets.
        """
        choose(self.model, Settings(self.solver, nfe))  # raises now for what cannot be sampled
        card = self.model.card
        known = {"row": self.row, "nfe": nfe, "weights": card.weights_sha256}
        if self.solver == "auto":
            loras = getattr(self.model, "loras", ())
            adapter = {"adapter": loras[-1]["sha256"]} if loras else {}
            return {**known, "row": Path(self.row).name, **adapter, **chosen(card, nfe)}
        found = locate(self.model, self.solver, nfe)
        if isinstance(found, LearnedSolver):
            known |= {"row": Path(self.row).name, "solver": found.digest}
        return known


def earlier_rows(path: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What the file has; none where there is none.

    Raises:
        ValueError: it is of other prompts, models or judges.
    """
    if not path.exists():
        return []
    earlier = read_json(path, "a file of judged students")
    rows = earlier.get("rows")
    if not isinstance(rows, list) or any(earlier.get(n) != value for n, value in facts.items()):
        raise ValueError(f"{path} is of other prompts, models or judges; move it away")
    return rows


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description="Judge students of garments beside solvers.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--judges", required=True, type=Path)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--rows", nargs="+", default=["dpmpp-2m", "unipc"])
    parser.add_argument("--nfe", type=at_least(1), nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--count", type=at_least(2), default=500)
    parser.add_argument("--first", type=at_least(0), default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=positive, help="stop then; what is done is kept")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    judges, card = Judges.load(options.judges), fewstep.load(options.model).card
    facts = {"model": card.name, "weights": card.weights_sha256, "fewstep": VERSION}
    facts |= {"judge": judges.tells.full_name, "features": judges.sees.full_name}
    facts |= {name: vars(options)[name] for name in ("count", "first", "guidance")}
    found = earlier_rows(options.out, facts)
    samplers = [
        Sampler.of(r, options.model, options.guidance, options.device) for r in options.rows
    ]
    work = [(one, one.known(nfe)) for one in samplers for nfe in options.nfe]
    asked = prompts(options.count, options.first)
    texts = [one.text for one in asked]
    stop_after(options.minutes)
    for one, known in work:
        if any(same(row, known, FIELDS) for row in found):
            continue
        begun = time.perf_counter()
        images = pictures_of(
            one.model, texts, options.first, one.guidance, known["nfe"], one.solver
        )
        seconds = round(time.perf_counter() - begun, 1)
        found.append({**known, "seconds": seconds, **judges.row(images, asked)})
        print(json.dumps(found[-1]), flush=True)
        write_json(options.out, {**facts, "machine": machine(), "rows": found})
    return found


if __name__ == "__main__":
    sys.exit(ended(main))
