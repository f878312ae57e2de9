"""How a student is best sampled: fresh noise, the chord, or the path of Gaussian data.

    python -m studies.student_samplers fashion-mnist-splam --budgets 2 4 8
    python -m studies.student_samplers fashion-mnist-splam --samplers consistency runs/tuned

A sampler is a name, or a folder of solvers that were learned on the student. For each sampler and
budget, on seeds that no test uses:

    error     root mean square distance to the teacher's exact solution of the same seed, in pixels
              of [-1, 1]
    excess    Frechet distance to exact solutions of other seeds, less that of the exact solutions
              of the same seeds, in each feature network
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import torch

import fewstep
from fewstep.evaluate import frechet_distance
from fewstep.evaluate.features import own_features, resolve_features
from fewstep.evaluate.references import References

SAMPLERS = (
    *("consistency", "consistency-ode", "consistency-pca"),
    *(f"consistency-kappa:c={c:g}" for c in (0.06, 0.12, 0.25)),
)
FIRST = 1_000_000  # of the seeds


def measure(images: np.ndarray, exact: np.ndarray, spaces: dict[str, Callable]) -> dict[str, float]:
    """Error and excess distances of pictures uint8 [n, h, w, c]."""
    gap = (images.astype(np.float64) - exact) / 127.5
    figures = {"error": float(np.sqrt(np.square(gap).mean()))}
    return figures | {f"excess {name}": excess(images) for name, excess in spaces.items()}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    options = parse(arguments)
    student = fewstep.load(options.student)
    how = student.card.distilled
    if how is None:
        raise SystemExit(f"{options.student} is not distilled, so it has no levels")
    teacher = fewstep.load(how.teacher)
    seeds = range(FIRST, FIRST + options.seeds)
    others = range(seeds.stop, seeds.stop + options.seeds)
    solved = References(teacher)
    exact, other = (
        teacher.decode(torch.from_numpy(solved.endpoints(part)[:, 0])) for part in (seeds, others)
    )

    def against(name: str) -> Callable[[np.ndarray], float]:
        space = resolve_features(name)
        there = space(other)
        floor = frechet_distance(space(exact), there)
        return lambda images: float(frechet_distance(space(images), there) - floor)

    spaces = {name: against(name) for name in own_features(teacher.card.name)}
    rows = []
    for nfe in options.budgets:
        for name in options.samplers:
            images = fewstep.sample(student, solver=name, nfe=nfe, seeds=seeds).images
            rows.append(measure(images, exact, spaces))
            figures = "  ".join(f"{key} {value:.4g}" for key, value in rows[-1].items())
            print(f"{name:26} nfe {nfe}  {figures}", flush=True)
    return rows


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("student", help="a name or folder")
    parser.add_argument("--budgets", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS, help="names or folders")
    parser.add_argument("--seeds", type=int, default=500, help="how many, from 1,000,000 on")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
