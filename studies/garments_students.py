"""Students of `garments` beside solvers on it: prompt agreement and Frechet distance by budget.

    python -m studies.garments_students --model garments --judges FOLDER --guidance 4 \\
        --rows dpmpp-2m unipc ./splam ./lora --nfe 1 2 4 8 --out results/garments-students.json

A row is a solver's name, a student's folder, or a folder of adapters. All have the same prompts and
seeds; see `studies.garments_teacher` for these and for the judges. Rows that are in the file
already are kept, and not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fewstep
from fewstep.evaluate.agreement import prompts
from fewstep.files import write_json
from fewstep.models import is_model
from fewstep.models.formats.loras import DIFFUSERS
from fewstep.provenance import VERSION, machine
from studies.commands import positive, stop_after
from studies.garments_teacher import Judges, pictures_of


def sampler(
    row: str, base: str, guidance: float, device: str = "cpu"
) -> tuple[Any, str, float | None]:
    """The model that a row samples, its solver, and the guidance that it is given."""
    if is_model(row):
        return fewstep.load(row, device=device), "auto", None
    if (Path(row) / DIFFUSERS).is_file():
        return fewstep.load(base, device=device, loras=[(row, 1.0)]), "auto", None
    return fewstep.load(base, device=device), row, guidance


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description="Judge students of garments beside solvers.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--judges", required=True, type=Path)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--rows", nargs="+", default=["dpmpp-2m", "unipc"])
    parser.add_argument("--nfe", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=positive, help="stop then; what is done is kept")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    judges, card = Judges.load(options.judges), fewstep.load(options.model).card
    facts = {"model": card.name, "weights": card.weights_sha256, "fewstep": VERSION}
    facts |= {"judge": judges.tells.full_name, "features": judges.sees.full_name}
    facts |= {name: vars(options)[name] for name in ("count", "first", "guidance")}
    asked, found = prompts(options.count, options.first), []
    if options.out.exists():
        earlier = json.loads(options.out.read_text(encoding="utf-8"))
        if any(earlier.get(name) != value for name, value in facts.items()):
            raise ValueError(f"{options.out} is of other prompts, models or judges; move it away")
        found = earlier["rows"]
    done = {(one["row"], one["nfe"]) for one in found}
    stop_after(options.minutes)
    for row in options.rows:
        model, solver, guidance = sampler(row, options.model, options.guidance, options.device)
        name = row if solver != "auto" else Path(row).name
        for nfe in options.nfe:
            if (name, nfe) in done:
                continue
            begun = time.perf_counter()
            texts = [one.text for one in asked]
            images = pictures_of(model, texts, options.first, guidance, nfe, solver)
            seconds = round(time.perf_counter() - begun, 1)
            weights = model.card.weights_sha256
            line = {"row": name, "nfe": nfe, "weights": weights, "seconds": seconds}
            found.append({**line, **judges.row(images, asked)})
            print(json.dumps(found[-1]), flush=True)
            write_json(options.out, {**facts, "machine": machine(), "rows": found})
    return found


if __name__ == "__main__":
    main()
