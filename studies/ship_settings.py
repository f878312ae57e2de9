r"""Put the settings that comparisons screened into a model's card, for pictures that compare.

    fewstep compare fashion-mnist --solvers $ODE --nfe 3,5,8 --afs none,mean --screen 128 \
        --features none --choose-by error --seeds 0-15 --dtype bfloat16 --out a
    fewstep compare fashion-mnist --solvers ddim-eta,churn,dpmpp-2m-sde --nfe 3,5,8 \
        --afs none,mean --screen 128 --features fashion-a --seeds 0-15 --dtype bfloat16 --out b
    python studies/ship_settings.py fashion-mnist a/comparison.json b/comparison.json \
        results/fashion-mnist.json

with ODE the solvers of `fewstep.evaluate.demo.FAMILIES`. An error says nothing about a stochastic
solver, so those are chosen by a distance, as in results/ all are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fewstep.evaluate.compare import read_comparison
from fewstep.files import write_whole
from fewstep.models import BUILTIN

KEYS = ("solver", "grid", "afs", "end")


def settings(paths: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """By budget, each solver's setting, which was chosen among several on validation seeds; that of
    the first file that has it."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for record in map(read_comparison, paths):
        for row in record["rows"]:
            if row["sampler"] == row["solver"] and row.get("screened"):
                setting = {key: row[key] for key in KEYS}
                found.setdefault(row["nfe"], {}).setdefault(row["solver"], setting)
    return {
        str(nfe): [found[nfe][solver] for solver in sorted(found[nfe])] for nfe in sorted(found)
    }


def card_text(card: dict[str, Any], screened: dict[str, list[dict[str, Any]]]) -> str:
    """A card's JSON with these settings at its end, a line for each."""
    rest = {key: value for key, value in card.items() if key != "screened"}
    head = json.dumps(rest, indent=2).removesuffix("\n}")
    blocks = []
    for nfe, rows in screened.items():
        lines = ",\n".join(f"      {json.dumps(row)}" for row in rows)
        blocks.append(f"    {json.dumps(nfe)}: [\n{lines}\n    ]")
    return head + ',\n  "screened": {\n' + ",\n".join(blocks) + "\n  }\n}\n"


def main(name: str, paths: list[Path]) -> None:
    folder = BUILTIN / name if (BUILTIN / name).is_dir() else Path(name)
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    write_whole(folder / "card.json", card_text(card, settings(paths)).encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a name or a model folder")
    parser.add_argument("comparisons", nargs="+", type=Path, help="comparison.json files")
    arguments = parser.parse_args()
    main(arguments.model, arguments.comparisons)
