"""How good `garments` itself is: prompt agreement and Frechet distance by guidance.

    python -m studies.garments_teacher --model garments --judges FOLDER --out results/garments.json

FOLDER holds the judges garments-a and garments-b, as recipes/garments_features.py writes them.

Prompts are captions of test scenes, which were never trained on, from number --first on; picture i
starts from the noise of seed i. The distance is in the features of garments-b, to its reference of
20,000 test pictures; its bias at this count is that of as many real pictures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fewstep
from fewstep.data.garments import Garments
from fewstep.data.idx import to_unit
from fewstep.evaluate.agreement import Prompt, agreement, prompts
from fewstep.evaluate.statistics import Statistics, own_bias
from fewstep.files import write_json
from fewstep.networks.features import REFERENCE_FILE, FeatureNetwork, load_feature_folder
from fewstep.provenance import VERSION

BATCH = 100


def pictures_of(
    model: Any, texts: Sequence[str], first: int, guidance: float | None, nfe: int, solver: str
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


@dataclass(frozen=True)
class Judges:
    """garments-a, garments-b, and the statistics of real pictures in the features of the second."""

    tells: FeatureNetwork
    sees: FeatureNetwork
    real: Statistics

    @classmethod
    def load(cls, folder: Path) -> Judges:
        first, second = (load_feature_folder(folder / f"garments-{name}") for name in "ab")
        return cls(first, second, Statistics.load(folder / "garments-b" / REFERENCE_FILE))

    def row(self, images: np.ndarray, asked: Sequence[Prompt]) -> dict[str, Any]:
        """What they say of pictures uint8 [n, h, w, 3] with their prompts, rounded."""
        parts = torch.from_numpy(images).permute(0, 3, 1, 2).split(500)
        features = torch.cat([self.sees(to_unit(part)) for part in parts]).numpy()
        found = Statistics.of(features, self.sees.full_name)
        shares = asdict(agreement(images, asked, self.tells))
        distances = {
            "frechet": found.frechet(self.real),
            "frechet_bias": own_bias(self.real, len(images)),
        }
        values = shares | distances
        return {name: v if v is None else round(v, 4) for name, v in values.items()}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description="Judge garments itself.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--judges", required=True, type=Path)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0, 5.0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--nfe", type=int, default=50)
    parser.add_argument("--solver", default="ddim")
    parser.add_argument("--data", type=Path, help="Fashion-MNIST's files: real scenes too")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    model, judges = fewstep.load(options.model), Judges.load(options.judges)
    asked, rows = prompts(options.count, options.first), []
    texts = [one.text for one in asked]
    for guidance in options.guidance:
        images = pictures_of(model, texts, options.first, guidance, options.nfe, options.solver)
        rows.append({"guidance": guidance, **judges.row(images, asked)})
        print(json.dumps(rows[-1]), flush=True)
    if options.data:
        numbers = range(options.first, options.first + options.count)
        real = Garments(options.data, "test").pictures(numbers).permute(0, 2, 3, 1).numpy()
        rows.append({"real": True, **judges.row(real, asked)})
        print(json.dumps(rows[-1]), flush=True)
    if options.out:
        given = {name: vars(options)[name] for name in ("count", "first", "nfe", "solver")}
        names = {"judge": judges.tells.full_name, "features": judges.sees.full_name}
        facts = {"model": model.card.name, "weights": model.card.weights_sha256, "fewstep": VERSION}
        write_json(options.out, {**facts, **names, **given, "rows": rows})
    return rows


if __name__ == "__main__":
    main()
