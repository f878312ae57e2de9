"""How far solvers end from the exact solution of the same seeds, in pixels and in features.

    python studies/paired.py --solvers study/solvers/tuned-s0 ipndm-4 --nfe 5 --afs zero

For each solver, on seeds that no test uses:

    error    mean root mean square distance in pixels of [-1, 1]
    FD       Frechet distance between its pictures and the exact solution's, of the same seeds
    mean     the part of FD that is a shift common to all pictures: squared distance of the means
    spread   variance of its pictures, over that of the exact ones
    paired   mean squared distance of each picture to its own target, in features

A distance of pictures to their own targets hardly sees a common shift; FD counts it in full.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import fewstep
from fewstep.cli.parsing import parse_seeds
from fewstep.evaluate.features import own_features, resolve_features
from fewstep.evaluate.references import References
from fewstep.evaluate.statistics import Statistics
from fewstep.models import Model
from fewstep.sampling.choose import locate
from fewstep.solver import Solver

BATCH = 50


@torch.inference_mode()
def ends(model: Model, seeds: Sequence[int], solver: Any, settings: dict[str, Any]) -> np.ndarray:
    """float32 [n, c, h, w]. settings: keywords of `fewstep.solve`."""
    parts = [seeds[start : start + BATCH] for start in range(0, len(seeds), BATCH)]
    return np.concatenate([
        fewstep.solve(model.denoiser(), model.prior(part), solver, **settings).cpu().numpy()
        for part in parts
    ])  # fmt: skip


def distances(ours: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """FD, its part of the means, the ratio of variances, and the mean squared distance, of features
    [n, d] of the same seeds."""
    ours, exact = ours.astype(np.float64), exact.astype(np.float64)
    return {
        "fd": Statistics.of(ours).frechet(Statistics.of(exact)),
        "mean": float(np.square(ours.mean(0) - exact.mean(0)).sum()),
        "spread": float(ours.var(0).sum() / exact.var(0).sum()),
        "paired": float(np.square(ours - exact).sum(1).mean()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    model = fewstep.load(options.model, dtype=options.dtype)
    exact = References(fewstep.load(options.model)).endpoints(options.seeds)
    spaces = [resolve_features(name) for name in own_features(model.card.name)]

    def pictures(x: np.ndarray) -> np.ndarray:
        return model.decode(torch.from_numpy(x))

    targets = [[space(pictures(exact[:, end])) for space in spaces] for end in range(2)]
    for name in options.solvers:
        solver = locate(model, name, options.nfe)
        if isinstance(solver, Solver):
            given = {key: getattr(options, key) for key in ("nfe", "grid", "afs", "end")}
            to_zero = options.end == "zero"
        else:  # learned: all is its own
            given, to_zero = {}, solver.program().sigmas[-1] == 0
        x = ends(model, options.seeds, solver, given)
        gap = x - exact[:, int(to_zero)]
        error = np.sqrt(np.square(gap).reshape(len(x), -1).mean(1)).mean()
        print(f"{name}  error {error:.4f}", end="")
        for space, target in zip(spaces, targets[int(to_zero)], strict=True):
            found = distances(space(pictures(x)), target)
            shown = " ".join(f"{key} {value:.3f}" for key, value in found.items())
            print(f"  {space.label} {shown}", end="")
        print(flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", default="fashion-mnist")
    add("--solvers", nargs="+", required=True, help="names, or folders of learned ones")
    add("--nfe", type=int, default=5)
    add("--grid", default="time-uniform", help="of solvers by name, as are --afs and --end")
    add("--afs", default="mean")
    add("--end", default="sigma_min")
    add("--seeds", type=parse_seeds, default=range(1_000_000, 1_000_500), help="first-last")
    add("--dtype", default="bfloat16", help="of the solvers' network; the exact one is float32")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
