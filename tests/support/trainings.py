"""Each kind of training at its smallest, by name; as a program, to be killed.

    python -m tests.support.trainings NAME OUT [WRITE]

prints a line for each step. Given WRITE, it kills itself in the middle of that write.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import fewstep.learned.rivals
from fewstep.cache import cache_folder
from fewstep.distillation import distill
from fewstep.learned import train as train_solver
from fewstep.models.exact import GaussianMixture
from fewstep.networks.unet_config import UNetConfig
from fewstep.train.checkpoint import CHECKPOINT
from fewstep.train.loop import Progress
from fewstep.train.network import train_network
from fewstep.train.recipe import Recipe
from recipes import fashion_features
from tests.support.testbed import FEW_RIVALS

__all__ = ["LONGER", "OTHER", "PIPELINES", "RESULTS", "STEPS", "TRAININGS", "step_of"]

Report = Callable[[Progress], None]
STEPS, BATCH = 5, 8


def pictures(seed: int, size: int, count: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    shape = (count, 1, size, size)
    images = torch.randint(0, 256, shape, generator=gen, dtype=torch.uint8)
    return images, torch.arange(count) % 3


def network(out: Path, report: Report, steps: int = STEPS, data: int = 0, **settings: Any) -> None:
    small = UNetConfig(widths=(16, 16), size=8, classes=3, blocks=1)
    recipe = Recipe(
        **{"pictures": BATCH * steps, "batch": BATCH, "dtype": "float32", **settings},
        network=small,
    )
    often: dict[str, Any] = {"checkpoint_every": 1, "validate_every": 2}
    train_network(*pictures(data, 8), pictures(9, 8), out, recipe, report=report, **often)


def features(out: Path, report: Report, steps: int = STEPS, data: int = 0, **settings: Any) -> None:
    kind = {"kind": "patches", "patch": 4, "width": 8, "blocks": 1, "channels": 2, "dim": 8}
    recipe = fashion_features.Recipe(
        **{"network": kind, "labels": False, "pictures": BATCH * steps, "batch": BATCH, **settings}
    )
    fashion_features.train(*pictures(data, 32), out, recipe, checkpoint_every=1, report=report)


def distillation(
    out: Path, report: Report, steps: int = STEPS, data: int = 0, **settings: Any
) -> None:
    from tests.distillation.test_distill import tiny_model

    small = {"batch": BATCH, "points": 5, "dtype": "float32", "guidance": (1.0, 3.0)}
    often = {"checkpoint_every": 1, "validate_every": 2, "validation_seeds": 3}
    recipe = {"pictures": BATCH * steps, **small, **often, **settings}
    distill(tiny_model(), pictures(data, 8), out=out, report=report, **recipe)


def segments(out: Path, report: Report, **given: Any) -> None:
    """In several segments, of which the student is told one."""
    distillation(out, report, **{"phases": (1, 2), **given})


def trajectories(
    out: Path, report: Report, steps: int = STEPS, data: int = 0, **settings: Any
) -> None:
    """From noise, through all steps; `data` decides the noise."""
    from tests.distillation.test_distill import tiny_model

    small = {"batch": BATCH, "points": 5, "dtype": "float32", "method": "trajectory", "seed": data}
    often = {"checkpoint_every": 1, "validate_every": 2, "validation_seeds": 3}
    how = {"phases": (1, 2), "end_to_end": True, "pictures": BATCH * steps}
    distill(tiny_model(), None, out=out, report=report, **small, **often, **how, **settings)


def solver(method: str) -> Callable[..., None]:
    def run(out: Path, report: Report, steps: int = STEPS, data: int = 0, **settings: Any) -> None:
        gen = torch.Generator().manual_seed(data)
        means = torch.randn(3, 4, generator=gen, dtype=torch.float64)
        toy = GaussianMixture(torch.ones(3) / 3, means, 0.1, sigma_min=0.01, sigma_max=20.0)
        small = {"nfe": 4, "trajectories": BATCH * steps, "batch": BATCH, "validation_seeds": 8}
        often = {"checkpoint_every": 1, "validate_every": 2, "cache": cache_folder()}
        known = {"model": {"name": "toy", "weights": f"{data:064d}"}, "method": method}
        train_solver(toy, (4,), out=out, report=report, **{**small, **often, **known, **settings})

    return run


def pipeline(**how: Any) -> Callable[..., None]:
    """Of a Stable Diffusion, which lies with its pictures beside the folder of the run."""

    def run(out: Path, report: Report, steps: int = STEPS, data: int = 0, **settings: Any) -> None:
        import fewstep
        from fewstep.distillation import encoded
        from tests.distillation.test_pipelines import data as write_data
        from tests.support import pipelines

        encoded.ROWS = 2  # in this process, which does nothing else
        teacher, folder = out.parent / "sd", out.parent / "data"
        if not folder.exists():
            pipelines.saved("sd", teacher)
            write_data(folder)
        recipe = {
            "pictures": 4 * steps,
            "batch": 4,
            "dtype": "float32",
            "guidance": 2.0,
            "lr": 1e-3,
        }
        often = {"checkpoint_every": 1, "validate_every": 2, "validation_seeds": 2}
        asked = {**recipe, **often, **how, **settings}
        distill(fewstep.load(teacher), folder, out=out, report=report, **asked)

    return run


TRAININGS: dict[str, Callable[..., None]] = {
    "network": network,
    "features": features,
    "distillation": distillation,
    "tuned": solver("tuned"),
    "amed": solver("amed"),
}
PIPELINES = {  # that are killed and resumed alone
    "segments": segments,
    "trajectories": trajectories,
    "a pipeline": pipeline(),
    "adapters": pipeline(train="lora", rank=2, lora_format="kohya"),
}
OTHER = {"lr": 0.0123}  # a setting by which runs differ
LONGER = ("network", "distillation")  # can be taken further
RESULTS = {
    "network": "model.safetensors",
    "distillation": "card.json",
    "tuned": "solver.json",
    "amed": "solver.json",
}


def step_of(out: Path) -> int:
    """Of the checkpoint in a folder."""
    with safe_open(out / CHECKPOINT, "pt") as file:
        return json.loads(file.metadata()["fewstep"])["state"]["step"]


def die_in(write: int) -> None:
    """Kill this process when it is about to rename its temporary for the time `write`."""
    replace, left = os.replace, [write]

    def dying(source: Any, target: Any) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = dying


if __name__ == "__main__":
    torch.set_num_threads(1)
    fewstep.learned.rivals.RIVALS = FEW_RIVALS
    if len(sys.argv) > 3:
        die_in(int(sys.argv[3]))
    {**TRAININGS, **PIPELINES}[sys.argv[1]](
        Path(sys.argv[2]), lambda progress: print(progress.step, flush=True)
    )
