"""Put a trained student among the built-in models, where `fewstep.load` finds it by name.

    python recipes/ship_student.py study/runs/whole-lr0.0003/splam-0 --name fashion-mnist-splam \\
        --comparison study/students/comparison.json

The folder is what `fewstep distill` wrote: weights in float16, and a card that names teacher,
method, data, settings and the last validation. A comparison that has the student gives its card the
sampler that was chosen for each budget on the validation seeds, and the figures on the test seeds.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

import fewstep
from fewstep.evaluate.compare import read_comparison
from fewstep.files import write_json, write_whole
from fewstep.models import BUILTIN, Card, read_card
from fewstep.models.card import CARD_FILE, WEIGHTS_FILE
from fewstep.report.tables import setting_words

MOST = 6_000_000  # bytes of weights


def ship(
    folder: Path, name: str, comparison: Path | None = None, into: Path = BUILTIN
) -> fewstep.models.Model:
    """Copy a student into `into`/`name`; returns it as it is loaded from there.

    Errors: ValueError, before anything is written, where it is no student of a model that ships,
    is too large or not in float16, was not validated, or is not in the comparison.
    """
    card, weights = read_card(folder), folder / WEIGHTS_FILE
    teachers = [read_card(path.parent) for path in into.glob(f"*/{CARD_FILE}")]
    if not card.distilled or not card.about.get("validation"):
        raise ValueError(f"{folder} is no student of fewstep distill with a validation at its end")
    hashes = [teacher.weights_sha256 for teacher in teachers if teacher.name != name]
    if card.distilled.teacher_weights not in hashes:
        raise ValueError(f"{folder} was distilled from a model that does not ship")
    if weights.stat().st_size > MOST:
        raise ValueError(f"{weights} has {weights.stat().st_size:,} bytes, more than {MOST:,}")
    with safe_open(weights, "pt") as file:
        kinds = {file.get_slice(tensor).get_dtype() for tensor in file.keys()}  # noqa: SIM118
    if kinds != {"F16"}:
        raise ValueError(f"{weights} must be float16 throughout, got {', '.join(sorted(kinds))}")
    about = {key: value for key, value in card.about.items() if key != "teacher"}
    card = replace(card, name=name, about=about)
    if comparison is not None:
        card = with_comparison(card, read_comparison(comparison))
    write_whole(into / name / WEIGHTS_FILE, weights.read_bytes())
    write_json(into / name / CARD_FILE, card.to_dict())
    return fewstep.load(into / name)


def with_comparison(card: Card, record: dict[str, Any]) -> Card:
    """The card with the sampler that was chosen at each budget, or at the next lower one, and with
    the figures. Errors: ValueError where the comparison does not have these weights."""
    rows = {
        row["nfe"]: row
        for row in record["rows"]
        if row.get("student", {}).get("weights") == card.weights_sha256
        and row["grid"] is not None  # no learned solver on it
    }
    if not rows:
        raise ValueError(
            f"the comparison has no rows of the student with {card.weights_sha256[:8]}"
        )
    auto = {}
    for nfe, entry in card.auto.items():
        below = max((budget for budget in rows if budget <= int(nfe)), default=min(rows))
        auto[nfe] = replace(entry, solver=setting_words(rows[below]))
    figures = {
        str(nfe): {
            "error": row["error"],
            **{f"excess FD-{judge}": fd["excess"] for judge, fd in row["fd"].items()},
        }
        for nfe, row in sorted(rows.items())
    }
    source = record["sources"][rows[min(rows)]["source"]]
    test = {"seeds": record["seeds"], "command": source["command"], **figures}
    return replace(card, auto=auto, about={**card.about, "test": test})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--comparison", type=Path)
    parser.add_argument("--into", type=Path, default=BUILTIN)
    options = parser.parse_args()
    model = ship(options.folder, options.name, options.comparison, options.into)
    size = (options.into / options.name / WEIGHTS_FILE).stat().st_size
    print(f"{options.into / options.name}: {model.card.summary}, {size:,} bytes")


if __name__ == "__main__":
    main()
