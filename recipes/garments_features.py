"""Train the judges of `garments`, the feature networks `garments-a` and `garments-b`.

    python -m recipes.garments_features --data FOLDER --network a --out RUN --export TO

a   cross-entropy on what a picture shows: garment and colour in two places, and background. Half
    of the pictures are blurred a little, as a decoder blurs them.
b   VICReg on two views of each picture, without labels; its head is a linear probe on the frozen
    features, fitted afterwards. Views differ in place, size and turn, a little in light, and half
    of them have a box erased: never in colour.

Losses, batch norms and their folding are those of recipes/fashion_features.py. Every random draw is
a function of (seed, step), so a run that is killed and started again is exact.

Source: Bardes et al. 2022 (VICReg), arXiv:2105.04906.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.data.garments import Garments, scene
from fewstep.data.idx import to_unit
from fewstep.evaluate.agreement import HEADS, targets
from fewstep.files import file_hash, open_folder, write_json, write_whole
from fewstep.networks.features import (
    CARD_FILE,
    FORMAT,
    REFERENCE_FILE,
    WEIGHTS_FILE,
    load_feature_folder,
    make_trunk,
)
from fewstep.noise import generator
from fewstep.provenance import VERSION
from fewstep.train import loop
from fewstep.train.interrupts import Stopped
from fewstep.train.loop import Folder, Progress, Schedule, Step
from fewstep.train.optimiser import Adam, check_finite
from fewstep.train.order import batch_indices
from fewstep.train.run import Identity, Run
from recipes.fashion_features import Recipe, Student, erased, folded, over, uniform, vicreg

SCENES = 200_000  # of training
FITTED = 20_000  # training scenes for the features' mean and spread, and the probe
REFERENCE = 20_000  # test scenes of the reference statistics, which begin at FROM
FROM = 100_000  # scenes before it are for prompts
EXAMINED = 10_000  # test scenes of the accuracies, from the first
SIZES = [len(names) for names in HEADS.values()]

RECIPES = {
    "a": Recipe(
        {"kind": "residual", "widths": [32, 64, 128], "blocks": 1, "inputs": 3, "dim": 128},
        pictures=600_000,
        batch=128,
        weight_decay=0.02,
    ),
    "b": Recipe(
        {
            "kind": "patches",
            "patch": 4,
            "width": 96,
            "blocks": 2,
            "channels": 16,
            "dim": 128,
            "inputs": 3,
        },
        labels=False,
        pictures=150_000,
        weight_decay=0.01,
    ),
}


def blurred(x: Tensor, gen: torch.Generator) -> Tensor:
    """Pictures [b, c, h, w], half of them mixed with their means over 3x3 pixels."""
    share = uniform(len(x), -0.7, 0.7, gen).clamp(min=0)[:, None, None, None]
    return torch.lerp(x, F.avg_pool2d(F.pad(x, (1,) * 4, "replicate"), 3, 1), share)


def view(x: Tensor, gen: torch.Generator) -> Tensor:
    """Pictures in [0, 1], a little moved, turned, enlarged or reduced, lighter or darker; half of
    them have a box erased."""
    b = len(x)
    zoom = uniform(b, 0.9, 1.1, gen)
    angle = uniform(b, -math.pi / 24, math.pi / 24, gen)
    moved = [uniform(b, -0.12, 0.12, gen) for _ in range(2)]
    rows = (
        torch.stack((zoom * angle.cos(), -zoom * angle.sin(), moved[0]), 1),
        torch.stack((zoom * angle.sin(), zoom * angle.cos(), moved[1]), 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    x = (x * uniform(b, 0.92, 1.08, gen)[:, None, None, None]).clamp(0, 1)
    return erased(x, 4, 12, 0.5, gen)


def cross_entropy(logits: Tensor, right: Tensor) -> Tensor:
    """The mean over the heads; right: int64 [b, heads]."""
    parts = zip(logits.split(SIZES, 1), right.T, strict=True)
    losses = [F.cross_entropy(one, answer, label_smoothing=0.02) for one, answer in parts]
    return torch.stack(losses).mean()


class Training:
    """Of one of the two networks, on pictures made as they are needed, and AdamW."""

    def __init__(self, recipe: Recipe, data: Garments) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.net = Student(recipe, sum(SIZES))
            self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.recipe, self.data = recipe, data
        self.adam = Adam(dict(self.net.named_parameters()), weight_decay=recipe.weight_decay)
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        settings = asdict(recipe)
        identity = Identity("a judge's training", settings, {"pictures": data.digest()})
        self.run = Run(identity, tensors | self.adam.tensors())

    def update(self, step: int) -> Step:
        recipe, gen = self.recipe, generator(self.recipe.seed, "judge", step)
        chosen = batch_indices(SCENES, recipe.batch, recipe.seed, step).tolist()
        x = self.data.pictures(chosen).float() / 255
        if recipe.labels:
            right = targets([scene(self.data.split, index) for index in chosen])
            loss = cross_entropy(self.net(2 * blurred(x, gen) - 1), right)
        else:
            views = torch.cat((view(x, gen), view(x, gen)))
            loss = vicreg(*self.net(2 * views - 1).chunk(2))
        loss.backward()
        check_finite(step, value := loss.item(), self.adam.clip(5.0))
        self.adam.step(lr := recipe.lr_at(step))
        return Step(value, lr)

    def validate(self) -> dict[str, float]:
        return {}


def train(recipe: Recipe, data: Garments, out: Path, checkpoint_every: int) -> Training:
    """To the end of the recipe, from a checkpoint in `out` where there is one.

    Raises:
        ValueError: for a checkpoint of another run.
        OSError: where `out` cannot be written.
        FloatingPointError: where the loss is not finite.
    """
    plan = Schedule(recipe.total_steps, recipe.batch, checkpoint_every, None)
    folder = Folder(out)
    folder.check()
    task = Training(recipe, data)
    folder.resume(task.run, recipe.total_steps)
    task.net.train()

    def show(progress: Progress) -> None:
        if plan.saves(progress.step):
            speed = f"{progress.per_second:.0f} pictures/s"
            done = f"{progress.step}/{progress.total_steps}"
            print(f"{done} loss {progress.loss:.4f}, {speed}", flush=True)

    loop.train(task, folder, plan, show)
    return task


def probe(features: Tensor, right: Tensor, decay: float = 1e-5) -> nn.Linear:
    """Logistic regressions of all heads on features [n, dim], to convergence by L-BFGS."""
    head = nn.Linear(features.shape[1], sum(SIZES))
    for w in head.parameters():
        nn.init.zeros_(w)
    solver = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = cross_entropy(head(features), right) + decay * head.weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)  # pyright: ignore[reportArgumentType]  (torch types it as a float)
    return head


@torch.no_grad()
def trained_head(net: Student, shift: Tensor, scale: Tensor) -> nn.Linear:
    """The classifier behind `net`'s norm as one on (h - shift) * scale."""
    top, norm = net.top[0], net.norm
    assert isinstance(top, nn.Linear)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    spread = (norm.running_var + norm.eps).sqrt()
    head = nn.Linear(top.in_features, top.out_features)
    head.weight.copy_(top.weight / (spread * scale))
    head.bias.copy_(top.bias + top.weight @ ((shift - norm.running_mean) / spread))
    return head


def export(task: Training, test: Garments, out: Path, name: str, command: str) -> dict[str, Any]:
    """Write weights, reference statistics and card into `out`; returns the card."""
    recipe = task.recipe
    trunk = make_trunk(recipe.network).eval()
    weights = {n: w.half() for n, w in folded(task.net.trunk.state_dict()).items()}
    trunk.load_state_dict({n: w.float() for n, w in weights.items()})
    h = over(trunk, task.data.pictures(range(FITTED)))
    shift = h.double().mean(0).float()
    scale = h.double().std(0).clamp(min=1e-6).reciprocal().float()
    if recipe.labels:
        head = trained_head(task.net, shift, scale)
    else:
        right = targets([scene("train", index) for index in range(FITTED)])
        head = probe((h - shift) * scale, right)
    tensors = {f"trunk.{n}": w.contiguous() for n, w in weights.items()}
    tensors |= {f"head.{n}": w.detach().half() for n, w in head.state_dict().items()}
    tensors |= {"shift": shift, "scale": scale}
    write_whole(out / WEIGHTS_FILE, safetensors.torch.save(tensors))
    card = {
        "format": FORMAT,
        "name": name,
        "network": recipe.network,
        "outputs": sum(SIZES),
        "heads": {head: list(names) for head, names in HEADS.items()},
        "dim": trunk.dim,
        "summary": "features of 32x32 pictures of coloured clothes in [-1, 1]",
        "weights_sha256": file_hash(out / WEIGHTS_FILE),
        "objective": "cross-entropy on garments, colours and background"
        if recipe.labels
        else "VICReg, self-supervised: no label is used but by the head",
        "features": "what the trunk gives, shifted and scaled to mean 0 and standard deviation 1 "
        f"in every dimension over the first {FITTED} training scenes",
        "head": "trained with the network"
        if recipe.labels
        else "linear probe: logistic regression on the frozen features",
        "parameters": sum(w.numel() for w in weights.values()),
        "recipe": asdict(recipe),
        "command": command,
        "fewstep": VERSION,
        "torch": torch.__version__,
        "data": "scenes of fewstep.data.garments, from Fashion-MNIST (Xiao, Rasul and Vollgraf "
        "2017, arXiv:1708.07747)",
        "reference": f"{REFERENCE} test scenes from number {FROM} on",
        "licence": "weights Apache-2.0; data MIT, Copyright (c) 2017 Zalando SE",
    }
    write_json(out / CARD_FILE, card)
    net = load_feature_folder(out)
    features = over(net, test.pictures(range(FROM, FROM + REFERENCE))).double().numpy()
    buffer = io.BytesIO()
    np.savez(
        buffer,
        mu=features.mean(0),
        sigma=np.cov(features, rowvar=False),
        count=np.int64(len(features)),
        extractor=np.str_(net.full_name),
    )
    write_whole(out / REFERENCE_FILE, buffer.getvalue())
    card["accuracy"] = {**examined(net, test), "pictures": EXAMINED}
    card["reference_sha256"] = file_hash(out / REFERENCE_FILE)
    write_json(out / CARD_FILE, card)
    return card


@torch.no_grad()
def examined(net: Any, test: Garments) -> dict[str, float]:
    """Share of right answers by head, on test scenes; of a second garment, where there is one."""
    right = targets([scene("test", index) for index in range(EXAMINED)])
    pictures = test.pictures(range(EXAMINED))
    logits = torch.cat([net.logits(to_unit(some)) for some in pictures.split(500)])
    found = torch.stack([one.argmax(1) for one in logits.split(SIZES, 1)], 1)
    hits, paired = (found == right).double(), right[:, 2] < SIZES[2] - 1
    named = {
        "garment": torch.cat((hits[:, 0], hits[paired, 2])),
        "colour": torch.cat((hits[:, 1], hits[paired, 3])),
        "background": hits[:, 4],
        "number of garments": (found[:, 2] == SIZES[2] - 1).eq(~paired).double(),
    }
    return {name: round(values.mean().item(), 4) for name, values in named.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a judge of garments.")
    parser.add_argument("--data", required=True, type=Path, help="folder of Fashion-MNIST's files")
    parser.add_argument("--network", required=True, choices=RECIPES)
    parser.add_argument("--out", required=True, type=Path, help="folder of the run's checkpoint")
    parser.add_argument("--export", type=Path, help="folder to write the network to, at the end")
    parser.add_argument("--pictures", type=int, help="length of the run")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--checkpoint-every", type=int, default=100, help="in steps")
    options = parser.parse_args(argv)
    given = {n: getattr(options, n) for n in ("pictures", "batch", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        recipe = replace(RECIPES[options.network], **given)
        test = Garments(options.data, "test") if options.export else None
        task = train(recipe, Garments(options.data), options.out, options.checkpoint_every)
        if test:
            open_folder(options.export)
            command = f"python -m recipes.garments_features --data DATA --network {options.network}"
            command += "".join(f" --{name} {value}" for name, value in given.items())
            name = f"garments-{options.network}"
            card = export(task, test, options.export, name, f"{command} --out RUN --export TO")
            print(f"{options.export}: {card['accuracy']}")
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        return stopped.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
