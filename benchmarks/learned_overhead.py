"""What a learned solver adds to sampling, and what a trajectory costs in training.

Sampling: time of a learned solver over that of a plain one at the same evaluations, from noise to
the end, on the same batch: AMED-Solver with features beside dpm-solver-2, AMED-Plugin with
features beside its base, `tuned` beside its base. Their numbers do not change what they cost, so
they are fresh. Each round times both, in turn first; the ratio is the median of the rounds' ratios,
and of the best times beside it, which a busy machine moves less.

Training: seconds a trajectory of AMED-Solver with the authors' teacher and with ours, the network
in bfloat16 as it comes and in float32, over the seconds that a picture takes in one forward pass of
the network in float32 at the same batch, the unit of the authors' figure.

One thread, and on a CPU the time that this process itself works.

    python benchmarks/learned_overhead.py --rounds 40
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import fewstep
from fewstep.grid import make_grid
from fewstep.learned import Progress, train
from fewstep.learned.kinds import kind_of
from fewstep.learned.method import Method, Setup
from fewstep.learned.predictor import feature_count
from fewstep.models import Model

MOST = 1.03  # of a learned solver's time over its base's
AUTHORS = 18.8  # forward passes a trajectory, of the authors' code at 5 evaluations
NFE = 5
# method and base; the plain solver beside it
PAIRS = (
    ("amed", None, "dpm-solver-2"),
    ("amed-plugin", "ipndm-2", "ipndm-2"),
    ("amed-plugin", "dpm-solver-2", "dpm-solver-2"),
    ("tuned", "ipndm-3", "ipndm-3"),
)
TEACHERS = {"authors' teacher": {"teacher": "heun", "inner": 1}, "ours": {}}


def fresh(model: Model, method: str, base: str | None, features: int) -> Method:
    """Untrained, with the analytic first step "mean", at NFE evaluations."""
    kind, card = kind_of(method), model.card
    recipe = kind.recipe(base, NFE, "mean", None, False)
    sigmas = make_grid("time-uniform", recipe.intervals + 1, card.sigma_max, card.sigma_min)
    setup = Setup(recipe.base, sigmas, "mean", features, 0, model.prior([0]).device)
    return kind.fresh(setup)


def clock(device: torch.device) -> float:
    """Seconds: of this process's own work on the CPU, where others may take turns with it, and of
    the wall on a GPU."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    begun = clock(device)
    call()
    return clock(device) - begun


@torch.inference_mode()
def sampling(model: Model, batch: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each pair: milliseconds a picture on both sides, and the ratios."""
    x_T, denoiser = model.prior(range(batch)), model.denoiser()
    level = torch.full((batch,), model.card.sigma_max, device=x_T.device)
    features = feature_count(denoiser.with_features(x_T, level)[1])  # type: ignore[attr-defined]
    rows = []
    for method, base, plain in PAIRS:
        learned = fresh(model, method, base, features)
        options: dict[str, Any] = {"grid": "time-uniform", "afs": "mean"}

        def ours(learned: Method = learned) -> None:
            fewstep.solve(denoiser, x_T, learned)

        def theirs(plain: str = plain, options: dict[str, Any] = options) -> None:
            fewstep.solve(denoiser, x_T, plain, NFE, **options)

        sides = (ours, theirs)
        for side in sides:
            side()
        times = []
        for i in range(rounds):  # each side is the first one of a round as often as the other
            order = sides if i % 2 else sides[::-1]
            taken = {side: seconds(side, x_T.device) for side in order}
            times.append((taken[ours], taken[theirs]))
        mine, other = zip(*times, strict=True)
        rows.append(
            {
                "learned": f"{method} on {base}" if base and method != "tuned" else method,
                "beside": plain,
                "ms": 1000 * statistics.median(mine) / batch,
                "plain_ms": 1000 * statistics.median(other) / batch,
                "ratio": statistics.median(a / b for a, b in times),
                "ratio_of_best": min(mine) / min(other),
            }
        )
    return rows


def training(unit: Model, model: Model, batch: int, batches: int) -> list[dict[str, Any]]:
    """One row for each teacher: milliseconds a trajectory and a forward pass of `unit`, the medians
    over the batches, which take turns with the passes, and their ratio."""
    denoiser, plain = model.denoiser(), unit.denoiser()
    x = model.prior(range(batch))
    level = torch.ones(batch, device=x.device)
    rows = []
    for name, teacher in TEACHERS.items():
        marks, passes = [clock(x.device)], []
        starts: list[float] = []

        def report(
            progress: Progress,
            marks: list[float] = marks,
            passes: list[float] = passes,
            starts: list[float] = starts,
        ) -> None:
            marks.append(clock(x.device))
            with torch.inference_mode():
                passes.append(seconds(lambda: plain(x, level), x.device))
            starts.append(clock(x.device))

        train(
            denoiser, model.shape, method="amed", nfe=NFE, afs="zero", batch=batch,
            trajectories=batch * batches, prior=model.prior, device=x.device, validation=1,
            validate_every=batches + 1, report=report, **teacher,
        )  # fmt: skip
        # the first batch also has the start-up in it, and the last the validation
        each = [end - start for start, end in zip(starts, marks[2:], strict=False)][:-1]
        one, forward = statistics.median(each) / batch, statistics.median(passes) / batch
        rows.append(
            {
                "teacher": name,
                "dtype": str(model.dtype).removeprefix("torch."),
                "ms": 1000 * one,
                "forward_ms": 1000 * forward,
                "passes": one / forward,
            }
        )
    return rows


def main() -> bool:
    """Print the tables; returns whether sampling is within its limit and training within half."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="fashion-mnist")
    parser.add_argument("--batch", type=int, default=64, help="of sampling")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--training-batch", type=int, default=128)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of sampling")
    parser.add_argument("--only", choices=("sampling", "training"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = partial(fewstep.load, options.model, device=options.device)
    model, unit = load(dtype=options.dtype), load()
    rows = [] if options.only == "training" else sampling(model, options.batch, options.rounds)
    runs = []
    for dtype in ("bfloat16", "float32") if options.only != "sampling" else ():
        runs += training(unit, load(dtype=dtype), options.training_batch, options.batches)
    if options.json:
        print(json.dumps({"sampling": rows, "training": runs}, indent=1))
    else:
        show(rows, runs)
    quick = all([run["passes"] <= AUTHORS / 2 for run in runs if run["teacher"] == "ours"][:1])
    return quick and all(row["ratio"] <= MOST for row in rows)


def show(rows: list[dict[str, Any]], runs: list[dict[str, Any]]) -> None:
    for row in rows:
        verdict = "pass" if row["ratio"] <= MOST else "FAIL"
        print(
            f"{row['learned']:28} {row['ms']:7.3f} ms  {row['beside']:13} "
            f"{row['plain_ms']:7.3f} ms  ratio {row['ratio']:.3f}, of the best times "
            f"{row['ratio_of_best']:.3f}  {verdict}"
        )
    for run in runs:
        print(
            f"training amed, {run['teacher']:17} {run['dtype']:9} {run['ms']:7.2f} ms a trajectory,"
            f" {run['passes']:5.1f} forward passes of {run['forward_ms']:.2f} ms "
            f"(the authors' code: {AUTHORS})"
        )


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
