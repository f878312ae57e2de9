"""What one training iteration of a distillation costs beside its network passes alone, in time, and
what it takes in memory.

The passes alone, at the same batch, on the same network and in the same arithmetic: the student
forward and backward, one forward of the teacher (with guidance one batched call of twice the
batch), one forward of the target. Each round times both, one after the other; the figures are
medians over rounds, the ratio the median of the rounds' ratios. Seconds are CPU time of the one
thread, so that another program on the machine counts little. The memory is the process's largest so
far, data and both networks included.

    python benchmarks/distill_overhead.py --batch 32 --rounds 10
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import fewstep
from fewstep.distillation import Pictures, Recipe
from fewstep.distillation.subject import subject
from fewstep.distillation.teacher import stepper
from fewstep.distillation.training import Distillation
from fewstep.noise import generator

MOST = 1.15  # times the passes alone


def start_run(recipe: Recipe, model: str) -> Distillation:
    """A run on noise pictures: their content does not change what an iteration costs."""
    loaded = fewstep.load(model)
    gen, classes = generator("distill overhead"), len(loaded.card.classes)
    shape = (60_000, *loaded.shape)  # as many as there are in Fashion-MNIST
    images = torch.randint(0, 256, shape, generator=gen, dtype=torch.uint8)
    labels = torch.randint(0, max(1, classes), (len(images),), generator=gen)
    known = subject(loaded, recipe.told, recipe.seed)
    ends = known.sigma_max, known.sigma_min
    step = stepper(recipe.teacher, *ends, known.schedule, substeps=recipe.substeps)
    return Distillation(recipe, known, step, Pictures(images, labels))


def passes(run: Distillation) -> Callable[[], None]:
    """The network passes of one iteration and nothing else."""
    recipe, known = run.recipe, run.subject
    twice = 1 if recipe.scales == (1.0, 1.0) else 2
    x = torch.randn(recipe.batch, *run.shape)
    sigma = torch.full((recipe.batch,), 1.0)
    condition = known.none.expand(recipe.batch)
    told = torch.zeros(recipe.batch, len(recipe.told)) if recipe.told else None
    many = [v.repeat(twice, *[1] * (v.ndim - 1)) for v in (x, sigma, condition)]
    enabled = recipe.dtype == "bfloat16"

    def one() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            with torch.no_grad():
                for _ in range(run.stepper.evaluations):
                    known.teacher(*many)
                known.denoise(run.target, x, sigma, condition, told)
            out = known.denoise(known.student, x, sigma, condition, told)
        out.sum().backward()
        for weight in run.weights.values():
            weight.grad = None

    return one


def timed(call: Callable[[], Any]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def peak_memory() -> float:
    """Of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(recipe: Recipe, rounds: int, model: str = "fashion-mnist") -> dict[str, float]:
    """Seconds of an iteration and of its passes alone, and their ratio."""
    run = start_run(recipe, model)
    alone = passes(run)
    for step in range(2):
        run.update(step)
        alone()
    steps = range(2, rounds + 2)
    pairs = [(timed(lambda at=step: run.update(at)), timed(alone)) for step in steps]
    return {
        "iteration": statistics.median(a for a, _ in pairs),
        "passes": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of an iteration beside its passes.")
    parser.add_argument("--model", default="fashion-mnist")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="the iteration, not the passes")
    parser.add_argument("--check", action="store_true", help=f"fail above {MOST}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    slow = []
    for guidance in (None, 3.0):
        settings = {name: getattr(options, name) for name in ("batch", "dtype", "compile")}
        recipe = Recipe(guidance=guidance, **settings)
        figures = measure(recipe, options.rounds, options.model)
        figures |= {"ms_per_picture": 1000 * figures["iteration"] / options.batch}
        figures |= {"peak_mib": peak_memory()}
        what = {"guidance": guidance, "batch": options.batch, "dtype": options.dtype}
        print(json.dumps({**what, **{k: round(v, 4) for k, v in figures.items()}}))
        slow += [guidance] * (figures["ratio"] > MOST)
    if options.check and slow:
        raise SystemExit(f"an iteration takes more than {MOST} times its passes: {slow}")


if __name__ == "__main__":
    main()
