"""What one training iteration of a distillation costs beside its network passes alone, in time, and
what it takes in memory.

The passes alone, at the same batch, on the same network and in the same arithmetic: the student
forward and backward, one forward of the teacher (with guidance one batched call of twice the
batch), one forward of the target; with a loss in features those of its network too. Each round
times both, one after the other; the figures are medians over rounds, the ratio the median of the
rounds' ratios. Seconds are CPU time of the one thread, so that another program on the machine
counts little. The memory is the process's largest so far, data and both networks included.

    python -m benchmarks.distill_overhead --batch 32 --rounds 10
    python -m benchmarks.distill_overhead --model garments --batch 32 [--train lora]
    python -m benchmarks.distill_overhead --phases 1 2 4 8 --loss fashion-a

Of a pipeline, latents and texts come from the cache on disk, as in training, and neither the
autoencoder nor a text encoder has a part in an iteration.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fewstep
from fewstep.data.images import write_png
from fewstep.data.training import mapped
from fewstep.distillation import Pictures, Recipe
from fewstep.distillation.encoded import encoded
from fewstep.distillation.metric import InFeatures, metric
from fewstep.distillation.recipe import Encoding
from fewstep.distillation.subject import Training, subject
from fewstep.distillation.teacher import stepper
from fewstep.distillation.training import Distillation
from fewstep.noise import generator

MOST, MOST_OF_PIPELINES = 1.15, 1.05  # times the passes alone
TEXTS = ("a red dress", "a teal bag on a white background")
PICTURES = 64  # of a pipeline's cache; how many does not change what an iteration costs


def start_run(recipe: Recipe, model: str) -> Distillation:
    """A run on noise pictures: their content does not change what an iteration costs."""
    loaded: Any = fewstep.load(model)
    how = Training(recipe.train, recipe.rank, recipe.targets, recipe.checkpointing)
    known = subject(loaded, recipe.told, recipe.seed, how)
    recipe = replace(recipe, **{n: v for n, v in known.defaults.items() if n == "lr"})
    ends = known.sigma_max, known.sigma_min
    given = {"substeps": recipe.substeps, "usual": known.usual, "phases": recipe.segments}
    step = stepper(recipe.teacher, *ends, known.schedule, **given)
    data = cached(loaded) if loaded.card.kind == "pipeline" else pictures(loaded)
    return Distillation(recipe, known, step, data, metric=metric(recipe.loss, loaded))


def pictures(loaded: Any) -> Pictures:
    """As many as there are in Fashion-MNIST."""
    gen, classes = generator("distill overhead"), len(loaded.card.classes)
    shape = (60_000, *loaded.shape)
    images = torch.randint(0, 256, shape, generator=gen, dtype=torch.uint8)
    return Pictures(images, torch.randint(0, max(1, classes), (len(images),), generator=gen))


def cached(loaded: Any) -> Any:
    """Latents and texts in a cache of their own, which this process leaves behind in no place."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    (folder / "data").mkdir()
    gen = generator("distill overhead")
    for i in range(PICTURES):
        pixels = torch.randint(0, 256, loaded.picture, generator=gen, dtype=torch.uint8)
        write_png(folder / "data" / f"{i}.png", pixels.numpy())
        (folder / "data" / f"{i}.txt").write_text(TEXTS[i % len(TEXTS)], encoding="utf-8")
    os.environ["FEWSTEP_CACHE"] = str(folder)
    return encoded(folder / "data", loaded, Encoding())


def passes(run: Distillation) -> Callable[[], None]:
    """The network passes of one iteration and nothing else."""
    recipe, known = run.recipe, run.subject
    twice = 1 if recipe.scales == (1.0, 1.0) else 2
    x = torch.randn(recipe.batch, *run.shape)
    sigma = torch.full((recipe.batch,), 1.0)
    condition = mapped(lambda c: c.expand(recipe.batch, *c.shape[1:]), known.none)
    told = torch.zeros(recipe.batch, len(recipe.told)) if recipe.told else None

    def repeated(value: torch.Tensor) -> torch.Tensor:
        return value.repeat(twice, *[1] * (value.ndim - 1))

    many = [repeated(x), repeated(sigma), mapped(repeated, condition)]
    enabled = recipe.dtype == "bfloat16"

    def one() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            with torch.no_grad():
                for _ in range(run.stepper.evaluations):
                    known.teacher(*many)
                known.denoise(run.target, x, sigma, condition, told)
            out = known.denoise(known.student, x, sigma, condition, told)
            in_features = isinstance(run.metric, InFeatures)
            loss = run.metric(out, torch.zeros_like(out)) if in_features else out
        loss.sum().backward()
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
    parser.add_argument("--train", choices=("full", "lora"), default="full")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--phases", type=int, nargs="+", help="segments")
    parser.add_argument("--loss", default="huber")
    parser.add_argument("--compile", action="store_true", help="the iteration, not the passes")
    parser.add_argument("--check", action="store_true", help="fail above what is allowed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = fewstep.load(options.model).card.kind == "pipeline"
    most, slow = MOST_OF_PIPELINES if pipeline else MOST, []
    for guidance in (None, 3.0):
        names = ("batch", "dtype", "compile", "train", "phases", "loss")
        settings = {name: getattr(options, name) for name in names}
        recipe = Recipe(guidance=guidance, **settings)
        figures = measure(recipe, options.rounds, options.model)
        figures |= {"ms_per_picture": 1000 * figures["iteration"] / options.batch}
        figures |= {"peak_mib": peak_memory()}
        what = {"model": options.model, "guidance": guidance, **settings}
        print(json.dumps({**what, **{k: round(v, 4) for k, v in figures.items()}}))
        slow += [guidance] * (figures["ratio"] > most)
    if options.check and slow:
        raise SystemExit(f"an iteration takes more than {most} times its passes: {slow}")


if __name__ == "__main__":
    main()
