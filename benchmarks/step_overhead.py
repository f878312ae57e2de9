"""Time per step outside the network: our loop beside diffusers' `scheduler.step`, one CPU thread.

Both sides get the network's answer ready-made: ours a D, whose conversion to eps counts where a
solver wants eps; theirs an eps, in the form that their schedulers convert fastest. Each round times
both, one after the other; the figures are medians over rounds, the ratio the median of the rounds'
ratios.

    make bench          or    python benchmarks/step_overhead.py --rounds 30
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import fewstep

SHAPES = ((1, 4, 64, 64), (16, 4, 64, 64))
STEPS = 20
# our solver, diffusers' class and options, most of their time that we may take at each shape
PAIRS: tuple[tuple[str, str, dict[str, Any], tuple[float, float]], ...] = (
    ("ddim", "DDIMScheduler", {}, (1 / 3, 0.6)),
    ("dpmpp-2m", "DPMSolverMultistepScheduler", {"solver_order": 2}, (1 / 3, 1 / 3)),
    ("unipc-2", "UniPCMultistepScheduler", {"solver_order": 2}, (1 / 3, 1 / 3)),
    ("deis-2", "DEISMultistepScheduler", {"solver_order": 2}, (1 / 3, 0.6)),
    ("unipc-3", "UniPCMultistepScheduler", {"solver_order": 3}, (1 / 3, 1 / 3)),
    ("deis-3", "DEISMultistepScheduler", {"solver_order": 3}, (1 / 3, 0.6)),
)


def ours(solver: str, shape: tuple[int, ...]) -> Callable[[], None]:
    """One whole run of `STEPS` evaluations, to call again and again."""
    x_T, denoised = 80 * torch.randn(shape), torch.randn(shape)

    def run() -> None:
        fewstep.solve(lambda x, sigma: denoised, x_T, solver, STEPS)

    return run


def theirs(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> Callable[[], None]:
    import diffusers

    scheduler = getattr(diffusers, name)(**options)
    x_T, eps = torch.randn(shape), torch.randn(shape)

    def run() -> None:
        scheduler.set_timesteps(STEPS)
        x = x_T
        for t in scheduler.timesteps:
            x = scheduler.step(eps, t, x, return_dict=False)[0]

    return run


def setup_only(name: str, options: dict[str, Any]) -> Callable[[], None]:
    """What `theirs` spends on its grid, which is not part of a step."""
    import diffusers

    scheduler = getattr(diffusers, name)(**options)
    return lambda: scheduler.set_timesteps(STEPS)


def seconds(run: Callable[[], None]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


@torch.inference_mode()
def measure(rounds: int) -> list[dict[str, Any]]:
    """One row per solver and shape: microseconds a step on both sides, their ratio, and its
    limit."""
    rows = []
    for solver, name, options, limits in PAIRS:
        for shape, limit in zip(SHAPES, limits, strict=True):
            sides = ours(solver, shape), theirs(name, options, shape), setup_only(name, options)
            for side in sides:
                side()
            times = [[seconds(side) for side in sides] for _ in range(rounds)]
            pairs = [(mine, other - setup) for mine, other, setup in times]
            rows.append(
                {
                    "solver": solver,
                    "beside": name,
                    "shape": list(shape),
                    "us": 1e6 / STEPS * statistics.median(mine for mine, _ in pairs),
                    "their_us": 1e6 / STEPS * statistics.median(other for _, other in pairs),
                    "ratio": statistics.median(mine / other for mine, other in pairs),
                    "limit": limit,
                }
            )
    return rows


def main(rounds: int = 30, as_json: bool = False) -> bool:
    """Print the table; returns whether every ratio is within its limit."""
    torch.set_num_threads(1)
    rows = measure(rounds)
    if as_json:
        print(json.dumps(rows, indent=1))
        return all(row["ratio"] <= row["limit"] for row in rows)
    print(f"{'solver':10} {'shape':16} {'ours':>9} {'diffusers':>10} {'ratio':>6} {'limit':>6}")
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        verdict = "pass" if row["ratio"] <= row["limit"] else "FAIL"
        print(
            f"{row['solver']:10} {shape:16} {row['us']:6.0f} us {row['their_us']:7.0f} us "
            f"{row['ratio']:6.2f} {row['limit']:6.2f}  {verdict}"
        )
    return all(row["ratio"] <= row["limit"] for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    raise SystemExit(0 if main(arguments.rounds, arguments.json) else 1)
