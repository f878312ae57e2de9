"""What one training iteration of a distillation costs beside its network passes alone, in time, and
what it takes in memory.

The passes alone, at the same batch, on the same network and in the same arithmetic:

    sub-paths     the teacher forward, as often as its step on one sub-path takes it (with guidance
                  each is one batched call of twice the batch), the target forward, the student
                  forward and backward
    trajectories  the teacher forward, as often as the whole path takes it; for each number of
                  segments the student forward and backward once a segment, or end to end forward
                  through all of them and then backward
    a loss in features: its network forward on the goal, without gradient, and on the estimate,
                  forward and backward; end to end once for each number of segments

Each round times both, one after the other; the figures are medians over rounds, the ratio the
median of the rounds' ratios. Seconds are CPU time of the one thread, so that another program on the
machine counts little. The memory is the process's largest so far, data and both networks included.

    python -m benchmarks.distill_overhead --batch 32 --rounds 10
    python -m benchmarks.distill_overhead --model garments --batch 32 [--train lora]
    python -m benchmarks.distill_overhead --phases 1 2 4 8 --loss fashion-a
    python -m benchmarks.distill_overhead --method trajectory --phases 1 2 4 8 --loss fashion-a \\
        [--end-to-end]

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fewstep
from fewstep.data.images import write_png
from fewstep.data.training import NoData, mapped
from fewstep.distillation import Pictures, Recipe
from fewstep.distillation.encoded import encoded
from fewstep.distillation.metric import InFeatures, metric
from fewstep.distillation.recipe import METHODS, Encoding
from fewstep.distillation.subject import Training, subject
from fewstep.distillation.teacher import Stepper, stepper, walker
from fewstep.distillation.training import Distillation
from fewstep.noise import generator

MOST, MOST_OF_PIPELINES = 1.15, 1.05  # times the passes alone
TEXTS = ("a red dress", "a teal bag on a white background")
COUNT = 60_000  # pictures, as many as Fashion-MNIST has
PICTURES = 64  # of a pipeline's cache; how many does not change what an iteration costs


def start_run(recipe: Recipe, model: str) -> Distillation:
    """A run on noise pictures: their content does not change what an iteration costs."""
    loaded: Any = fewstep.load(model)
    how = Training(recipe.train, recipe.rank, recipe.targets, recipe.checkpointing)
    known = subject(loaded, recipe.told, recipe.seed, how)
    recipe = replace(recipe, **{n: v for n, v in known.defaults.items() if n == "lr"})
    of = walker if recipe.method == "trajectory" else stepper
    step = of(
        recipe.teacher,
        sigma_max=known.sigma_max,
        sigma_min=known.sigma_min,
        schedule=known.schedule,
        points=recipe.points,
        grid=recipe.grid,
        substeps=recipe.substeps,
        usual=known.usual,
        phases=recipe.segments,
    )
    data = data_of(loaded, recipe)
    return Distillation(recipe, known, step, data, metric=metric(recipe.loss, loaded))


def data_of(loaded: Any, recipe: Recipe) -> Any:
    """What training reads; trajectories of a network on pixels need noise alone."""
    if loaded.card.kind == "pipeline":
        return cached(loaded)
    if recipe.method == "trajectory":
        return NoData(tuple(loaded.shape), len(loaded.card.classes))
    return pictures(loaded)


def pictures(loaded: Any) -> Pictures:
    """Of Fashion-MNIST's number."""
    gen, classes = generator("distill overhead"), len(loaded.card.classes)
    shape = (COUNT, *loaded.shape)
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
    calls = run.stepper.evaluations  # of a sub-path, or of a walker's whole path
    if recipe.method == "trajectory" and isinstance(run.stepper, Stepper):
        calls *= len(run.stepper.levels) - 1

    def student(start: torch.Tensor) -> torch.Tensor:
        return known.denoise(known.student, start, sigma, condition, told)

    def losses() -> Iterator[torch.Tensor]:
        """What is to be gone back through, one after the other."""
        with torch.no_grad():
            for _ in range(calls):
                known.teacher(*many)
        if recipe.method != "trajectory":
            with torch.no_grad():
                known.denoise(run.target, x, sigma, condition, told)
            yield distance(run, student(x))
            return
        for count in recipe.segments:
            end = x
            for _ in range(count):
                end = student(end if recipe.end_to_end else x)
                if not recipe.end_to_end:
                    yield distance(run, end)
            if recipe.end_to_end:
                yield distance(run, end)

    def one() -> None:
        found = losses()
        while True:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                loss = next(found, None)
            if loss is None:
                break
            loss.sum().backward()
        for weight in run.weights.values():
            weight.grad = None

    return one


def distance(run: Distillation, out: torch.Tensor) -> torch.Tensor:
    """A loss in features with its passes; the output itself without one."""
    if not isinstance(run.metric, InFeatures):
        return out
    loss = run.metric.of_ends if run.recipe.end_to_end else run.metric
    return loss(out, torch.zeros_like(out))


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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The cost of an iteration beside its passes.")
    parser.add_argument("--model", default="fashion-mnist")
    parser.add_argument("--method", choices=METHODS, default="splam")
    parser.add_argument("--end-to-end", action="store_true", help="of trajectories")
    parser.add_argument("--train", choices=("full", "lora"), default="full")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--phases", type=int, nargs="+", help="segments")
    parser.add_argument("--loss", default="huber")
    parser.add_argument("--compile", action="store_true", help="the iteration, not the passes")
    parser.add_argument("--check", action="store_true", help="fail above what is allowed")
    options = parser.parse_args(arguments)
    names = ("method", "end_to_end", "batch", "dtype", "compile", "train", "phases", "loss")
    settings = {name: getattr(options, name) for name in names}
    try:
        recipes = [Recipe(guidance=guidance, **settings) for guidance in (None, 3.0)]
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    pipeline = fewstep.load(options.model).card.kind == "pipeline"
    most, slow = MOST_OF_PIPELINES if pipeline else MOST, []
    for recipe in recipes:
        figures = measure(recipe, options.rounds, options.model)
        figures |= {"ms_per_picture": 1000 * figures["iteration"] / options.batch}
        figures |= {"peak_mib": peak_memory()}
        what = {"model": options.model, "guidance": recipe.guidance, **settings}
        print(json.dumps({**what, **{k: round(v, 4) for k, v in figures.items()}}))
        slow += [recipe.guidance] * (figures["ratio"] > most)
    if options.check and slow:
        raise SystemExit(f"an iteration takes more than {most} times its passes: {slow}")


if __name__ == "__main__":
    main()
