"""How far off the targets of a distillation are: what a student is taught that no student can be.

    python studies/distill_lines.py                       the recipe's own teacher
    python studies/distill_lines.py --teacher ddim --points 18 --substeps 1

A place x_gamma on the line between x_s and x_t is taught to end where x_s ends. Here both are
solved finely, x_gamma from the level that each rule tells, and their root mean square distance is
printed for each interval of the grid. At gamma = 1, where the rules agree and LCM trains, it is the
error of the teacher's step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import fewstep
from fewstep.distillation import Recipe
from fewstep.distillation.subpath import RULES, on_line
from fewstep.distillation.teacher import stepper

FINE = ("unipc-2", 16, "karras")


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> np.ndarray:
    """Prints and returns the distances [intervals, 1 + rules], gamma = 1 first."""
    usual = Recipe()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", default="fashion-mnist")
    add("--teacher", default=usual.teacher)
    add("--points", type=int)
    add("--substeps", type=int)
    add("--gamma", type=float, default=0.5)
    add("--seeds", type=int, default=32)
    add("--dtype", default="bfloat16")
    add("--device", default="cpu")
    options = parser.parse_args(arguments)
    model = fewstep.load(options.model, device=options.device, dtype=options.dtype)
    denoiser, card = model.denoiser(), model.card
    how = {"points": options.points, "substeps": options.substeps}
    step = stepper(options.teacher, card.sigma_max, card.sigma_min, **how)
    seeds = range(2_000_000, 2_000_000 + options.seeds)
    clean = fewstep.solve(denoiser, model.prior(seeds), FINE[0], 40, grid=FINE[2])
    noise = model.prior([seed + len(seeds) for seed in seeds]) / card.sigma_max

    def end(x: Tensor, sigma: float) -> Tensor:
        if sigma <= card.sigma_min:
            return x
        return fewstep.solve(denoiser, x, *FINE[:2], grid=FINE[2], sigma_max=sigma)

    rows = []
    print(f"{'interval':>16}  gamma 1  " + "  ".join(f"{rule} {options.gamma:g}" for rule in RULES))
    for i, (t, s) in enumerate(zip(step.levels[:-1], step.levels[1:], strict=True)):
        x_t = clean + t * noise
        x_s = fewstep.solve(denoiser, x_t, step.program(torch.full((len(seeds),), i)))
        target, gamma = end(x_s, s), torch.full((len(seeds),), options.gamma)
        there = on_line(x_s, x_t, gamma)
        ratios = [
            float(rule(torch.tensor(options.gamma), torch.tensor(s / t))) for rule in RULES.values()
        ]
        ends = [end(x_t, t), *(end(there, t * ratio) for ratio in ratios)]
        rows.append([float(_distance(one, target)) for one in ends])
        words = "  ".join(f"{value:.4f}" for value in rows[-1])
        print(f"{t:7.2f} to {s:5.3f}  {words}", flush=True)
    found = np.array(rows)
    print(f"{'mean':>16}  " + "  ".join(f"{value:.4f}" for value in found.mean(0)))
    return found


def _distance(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().flatten(1).mean(1).sqrt().mean()


if __name__ == "__main__":
    main()
