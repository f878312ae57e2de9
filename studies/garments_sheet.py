"""Draw scenes of garments, or pictures that a model of them makes, as one sheet.

Scenes: python -m studies.garments_sheet --data FOLDER --out docs/garments-data.png
A model: python -m studies.garments_sheet --model garments --guidance 3 --out docs/garments.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import fewstep
from fewstep.data.garments import Garments
from fewstep.data.images import contact_sheet, write_png

PROMPTS = (
    "a red dress on a white background",
    "a yellow bag on a black background",
    "a pair of blue trousers, pale pink background",
    "photo of a green sneaker on a lilac background",
    "a purple t-shirt",
    "two bags, one black, one orange, pale yellow background",
    "a brown ankle boot on pale blue",
    "a teal pullover in front of a grey wall",
)


def main(argv: Sequence[str] | None = None) -> np.ndarray:
    parser = argparse.ArgumentParser(description="Draw a sheet of garments.")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's files: real scenes")
    parser.add_argument("--model", default="garments")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--nfe", type=int, default=50)
    parser.add_argument("--columns", type=int, default=12)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args(argv)
    if options.data is not None:
        indices = range(len(PROMPTS) * options.columns)
        images = Garments(options.data, "test").pictures(indices).permute(0, 2, 3, 1).numpy()
    else:
        texts = [text for text in PROMPTS for _ in range(options.columns)]
        images = fewstep.sample(
            fewstep.load(options.model),
            prompt=texts,
            seeds=[seed for _ in PROMPTS for seed in range(options.columns)],
            guidance=options.guidance,
            nfe=options.nfe,
            solver="ddim",
        ).images
    sheet = contact_sheet(list(images), columns=options.columns)
    write_png(options.out, sheet)
    return sheet


if __name__ == "__main__":
    main()
