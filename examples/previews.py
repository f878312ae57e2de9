"""Watch pictures form: the denoised estimate at every evaluation, side by side.

    python examples/previews.py previews.png

There is one row per seed and one column per evaluation, with the result in the last column.
`fewstep.iterate` is `fewstep.solve`, one step at a time. Four calls lead from a checkpoint to
pictures: load, denoiser, solve (or iterate), decode.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import fewstep


@torch.no_grad()
def main(
    out: str | Path | None = None,
    model: str = "fashion-mnist",
    label: int | str | None = "boot",
    seeds: Sequence[int] = (1_000_000, 1_000_001, 1_000_002),
    solver: str = "dpmpp-2m",
    nfe: int = 5,
) -> np.ndarray:
    """Return the sheet, uint8 [rows * h, columns * w, c], written to `out` where that is given."""
    loaded = fewstep.load(model)
    denoiser = loaded.denoiser(label)
    columns = []
    for state in fewstep.iterate(denoiser, loaded.prior(seeds, label=label), solver, nfe):
        assert state.denoised is not None  # every step has evaluated by then
        columns.append(loaded.decode(state.denoised))  # [n, h, w, c]
        print(f"{state.nfe} evaluations, now at sigma {state.sigma:.3g}")
    columns.append(loaded.decode(state.x))
    sheet = np.concatenate([np.concatenate(list(column)) for column in columns], axis=1)
    if out is not None:
        Image.fromarray(sheet.squeeze()).save(out)
    return sheet


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
