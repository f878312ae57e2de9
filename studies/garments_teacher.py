"""How good `garments` itself is: prompt agreement and Frechet distance by guidance.

    python -m studies.garments_teacher --guidance 1 2 3 --count 500 --out results/garments.json

Prompts are captions of test scenes, which were never trained on, from number --first on; picture i
starts from the noise of seed i. The distance is in the features of garments-b, to its reference of
20,000 test pictures; its bias at this count is that of as many real pictures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import fewstep
from fewstep.evaluate.agreement import agreement, prompts
from fewstep.evaluate.features import resolve_features
from fewstep.evaluate.statistics import Statistics, own_bias
from fewstep.files import write_json
from fewstep.provenance import VERSION

BATCH = 100


def pictures_of(
    model: Any, texts: Sequence[str], first: int, guidance: float, nfe: int, solver: str
) -> np.ndarray:
    """uint8 [n, h, w, 3], one per text; its seed is its number."""
    parts = []
    for start in range(0, len(texts), BATCH):
        some = list(texts[start : start + BATCH])
        seeds = range(first + start, first + start + len(some))
        made = fewstep.sample(
            model, seeds=seeds, prompt=some, guidance=guidance, nfe=nfe, solver=solver
        )
        parts.append(np.asarray(made.images))
    return np.concatenate(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="garments")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0, 5.0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--nfe", type=int, default=50)
    parser.add_argument("--solver", default="ddim")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    model = fewstep.load(options.model)
    asked = prompts(options.count, options.first)
    extract = resolve_features("garments-b")
    assert extract.data is not None
    bias = own_bias(extract.data, options.count)
    rows = []
    for guidance in options.guidance:
        images = pictures_of(
            model, [one.text for one in asked], options.first, guidance, options.nfe, options.solver
        )
        found = Statistics.of(extract(images), extract.name)
        row = {
            "guidance": guidance,
            **{name: round(value, 4) for name, value in asdict(agreement(images, asked)).items()},
            "frechet": round(found.frechet(extract.data), 3),
            "frechet_bias": round(bias, 3),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    if options.out:
        settings = {n: v for n, v in vars(options).items() if n not in ("out", "guidance")}
        facts = {"weights": model.card.weights_sha256, "fewstep": VERSION}
        write_json(options.out, {**settings, **facts, "rows": rows})


if __name__ == "__main__":
    main()
