"""How good the teachers of a distillation are: what a student that is right ends in.

    python studies/distill_teachers.py unipc-2:10:2 ddim:18:1 heun:10:1

Each argument is SOLVER:POINTS:SUBSTEPS, the options of `fewstep distill splam`. Its steps are taken
one sub-path after the other, from noise to the clean end, and the pictures of the validation seeds
compared with the model's fine solutions: root mean square error, and excess Frechet distance in the
features of fashion-a.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch

import fewstep
from fewstep.distillation.students import Examination
from fewstep.distillation.teacher import Stepper, stepper
from fewstep.models import Model

BATCH = 50


@torch.inference_mode()
def chain(model: Model, step: Stepper, seeds: range) -> np.ndarray:
    """Pictures uint8 [n, h, w, c] of all sub-paths in turn."""
    images, denoiser = [], model.denoiser()
    for start in range(0, len(seeds), BATCH):
        part = seeds[start : start + BATCH]
        x = model.prior(part)
        for n in range(len(step.levels) - 1):
            x = fewstep.solve(denoiser, x, step.program(torch.full((len(part),), n)))
        images.append(model.decode(x))
    return np.concatenate(images)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("teachers", nargs="+", metavar="SOLVER:POINTS:SUBSTEPS")
    parser.add_argument("--model", default="fashion-mnist")
    parser.add_argument("--grid", default="time-uniform")
    parser.add_argument("--dtype", default="bfloat16", help="of the teacher")
    parser.add_argument("--seeds", type=int, default=500, help="how many of validation")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    exact = fewstep.load(options.model, device=options.device)
    model = fewstep.load(options.model, device=options.device, dtype=options.dtype)
    examine = Examination(exact, options.seeds)
    for text in options.teachers:
        name, points, substeps = text.split(":")
        ends = exact.card.sigma_max, exact.card.sigma_min
        how = {"points": int(points), "substeps": int(substeps), "grid": options.grid}
        step = stepper(name, *ends, **how)
        images = chain(model, step, examine.seeds)
        gap = ((images.astype(float) - examine.reference) / 127.5) ** 2
        figures = {"error": float(np.sqrt(gap.mean((1, 2, 3))).mean())}
        if examine.distance is not None:
            figures["excess"] = examine.distance(images) - examine.distance(examine.reference)
        spent = step.evaluations * (len(step.levels) - 1)
        words = "  ".join(f"{key} {value:.3f}" for key, value in figures.items())
        print(f"{text}: {spent} evaluations  {words}", flush=True)


if __name__ == "__main__":
    main()
