"""Train the built-in feature networks, `fashion-a` and `fashion-b`, and write their folders.

    python recipes/fashion_features.py --data FOLDER --network a --out RUN --export TO

a   cross-entropy on the ten classes; shifts, flips and erased boxes.
b   VICReg: two views of each picture must agree, while each of their features keeps its spread and
    no two are correlated. No label is used. Views differ in the shading of the cloth (a power, a
    smooth field), little in shape and place, and half of them have a box erased; there is no change
    of contrast, no noise, and no blur beyond that of moving them, which a judge has to see.

Convolutions have a batch norm behind them while they train, and so have the pooled features; the
export folds the former into the convolutions and fixes the latter to the training pictures' own
mean and spread, so the shipped network has no norm at all. The head of b is a linear probe, fitted
to the frozen features of the shipped file.

Every random draw is a function of (seed, step): a run that is killed and started again takes the
path of one that was not, to the bit, on one kind of machine and number of threads. One core,
OMP_NUM_THREADS=1, takes about ten minutes for a and a quarter of an hour for b.

Source: Bardes et al. 2022 (VICReg), arXiv:2105.04906.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.data.idx import load_idx_folder, to_unit
from fewstep.files import file_hash, open_folder, write_json, write_whole
from fewstep.networks.features import (
    CARD_FILE,
    CLASSES,
    FORMAT,
    REFERENCE_FILE,
    WEIGHTS_FILE,
    load_feature_folder,
    make_trunk,
)
from fewstep.noise import generator
from fewstep.provenance import VERSION
from fewstep.train import loop
from fewstep.train.loop import Folder, Progress, Schedule, Step
from fewstep.train.network import data_hash
from fewstep.train.optimiser import Adam, check_finite
from fewstep.train.order import batch_indices
from fewstep.train.run import Identity, Run

PROJECTOR = 256  # width of VICReg's projector
INVARIANCE, VARIANCE, COVARIANCE = 25.0, 25.0, 1.0  # VICReg, section 4.2


@dataclass(frozen=True)
class Recipe:
    """What decides the trained weights, to the bit, on one kind of machine.

    labels: cross-entropy on the classes, or VICReg without them
    pictures: length of the run, rounded up to whole batches
    warmup: pictures until the learning rate is reached; it then falls to zero along a cosine
    """

    network: dict[str, Any] = field(default_factory=dict)
    labels: bool = True
    pictures: int = 1_200_000
    batch: int = 256
    lr: float = 2e-3
    warmup: int = 30_000
    weight_decay: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pictures < 1 or self.batch < 4:
            raise ValueError(
                "pictures must be positive and batch at least 4, "
                f"got pictures={self.pictures}, batch={self.batch}"
            )

    @property
    def total_steps(self) -> int:
        return math.ceil(self.pictures / self.batch)

    def lr_at(self, step: int) -> float:
        """Learning rate of the update after `step` earlier ones."""
        rise = (step + 1) * self.batch / self.warmup if self.warmup else 1.0
        return self.lr * min(1.0, rise) * (1 + math.cos(math.pi * step / self.total_steps)) / 2


RECIPES = {
    "a": Recipe({"kind": "residual", "widths": [32, 64, 128], "blocks": 1}),
    "b": Recipe(
        {"kind": "patches", "patch": 4, "width": 96, "blocks": 2, "channels": 16, "dim": 128},
        labels=False,
        pictures=900_000,
        weight_decay=0.01,
    ),
}


class NormedConv(nn.Module):
    """A convolution and a batch norm, as the network trains; `folded` makes one of the two."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        padding = 0 if stride == kernel else kernel // 2
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def folded(trunk: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a trunk of plain convolutions from those of one of `NormedConv`s, whose other
    layers stay as they are."""
    out = {n: w for n, w in trunk.items() if ".conv." not in n and ".norm." not in n}
    for place in (n.removesuffix(".conv.weight") for n in trunk if n.endswith(".conv.weight")):
        gain, bias, mean, var = (
            trunk[f"{place}.norm.{part}"].double()
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        gain = gain / (var + nn.BatchNorm2d(1).eps).sqrt()
        out[f"{place}.weight"] = trunk[f"{place}.conv.weight"].double() * gain[:, None, None, None]
        out[f"{place}.bias"] = bias - gain * mean
    return out


class Student(nn.Module):
    """What is trained: the trunk, a norm of its features, and a top, which VICReg throws away."""

    def __init__(self, recipe: Recipe, outputs: int = CLASSES) -> None:
        super().__init__()
        self.trunk = make_trunk(recipe.network, NormedConv)
        self.norm = nn.BatchNorm1d(self.trunk.dim, affine=False)
        if recipe.labels:
            self.top = nn.Sequential(nn.Linear(self.trunk.dim, outputs))
        else:
            self.top = nn.Sequential(
                nn.Linear(self.trunk.dim, PROJECTOR, bias=False),
                nn.BatchNorm1d(PROJECTOR),
                nn.ReLU(),
                nn.Linear(PROJECTOR, PROJECTOR, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.trunk(x.contiguous(memory_format=torch.channels_last))
        return self.top(self.norm(h.float()))


def uniform(count: int, low: float, high: float, gen: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=gen)


def erased(x: Tensor, low: int, high: int, chance: float, gen: torch.Generator) -> Tensor:
    """Pictures [b, 1, h, w] in [0, 1], a share of them with a black box of `low` to `high` pixels a
    side."""
    b, _, h, w = x.shape
    inside = []
    for size in (h, w):
        length = torch.randint(low, high + 1, (b, 1), generator=gen)
        start = (torch.rand(b, 1, generator=gen) * (size - length)).long()
        place = torch.arange(size)
        inside.append((place >= start) & (place < start + length))  # [b, size]
    box = inside[0][:, :, None] & inside[1][:, None, :]
    box &= (torch.rand(b, generator=gen) < chance)[:, None, None]
    return x.masked_fill(box[:, None], 0.0)


def shifted(x: Tensor, gen: torch.Generator, most: int = 2) -> Tensor:
    """Pictures moved by up to `most` whole pixels, half of them mirrored."""
    b, _, h, w = x.shape
    y_0, x_0 = torch.randint(0, 2 * most + 1, (2, b, 1), generator=gen)
    rows, columns = y_0 + torch.arange(h), x_0 + torch.arange(w)  # [b, h], [b, w]
    mirrored = torch.rand(b, 1, generator=gen) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(x, (most,) * 4)[:, 0]
    return padded[torch.arange(b)[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]


def view(x: Tensor, gen: torch.Generator) -> Tensor:
    """Another shading of the cloth (a power, a smooth field), a little moved, turned,
    stretched and enlarged or reduced, half of them with a box erased.

    The light varies much, for that is how two pictures of one kind of garment differ; shape and
    place vary little, for they are what it is.
    """
    b = len(x)
    column = (slice(None), None, None, None)
    x = x.pow(uniform(b, -0.6, 0.6, gen).exp()[column])
    field = 0.8 * torch.rand(b, 1, 4, 4, generator=gen)
    field = field - field.mean((2, 3), keepdim=True)
    x = (x * F.interpolate(field, size=x.shape[2:], mode="bicubic").exp()).clamp(max=1)

    zoom = uniform(b, 0.85, 1.1, gen).sqrt()
    stretch = uniform(b, -math.log(1.1), math.log(1.1), gen).mul(0.5).exp()
    angle = uniform(b, -math.pi / 24, math.pi / 24, gen)
    width, height = zoom * stretch, zoom / stretch
    moved = [uniform(b, -1, 1, gen) * ((1 - side).clamp(min=0) + 0.08) for side in (width, height)]
    rows = (
        torch.stack((width * angle.cos(), -height * angle.sin(), moved[0]), 1),
        torch.stack((width * angle.sin(), height * angle.cos(), moved[1]), 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", align_corners=False)
    return erased(x, 4, 14, 0.5, gen)


def vicreg(first: Tensor, second: Tensor) -> Tensor:
    """VICReg's loss of the projections [b, d] of two views."""
    loss = INVARIANCE * F.mse_loss(first, second)
    for z in (first, second):
        z = z - z.mean(0)
        spread = (z.var(0) + 1e-4).sqrt()
        cov = (z.T @ z) / (len(z) - 1)
        loss = loss + VARIANCE / 2 * F.relu(1 - spread).mean()
        loss = loss + COVARIANCE * (cov.square().sum() - cov.diagonal().square().sum()) / len(cov)
    return loss


class Training:
    """Of a feature network: its loss on pictures, and AdamW."""

    def __init__(self, recipe: Recipe, images: Tensor, labels: Tensor) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.net = Student(recipe)
            self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.recipe, self.images, self.labels = recipe, images, labels
        named = dict(self.net.named_parameters())
        self.adam = Adam(named, weight_decay=recipe.weight_decay)
        inputs = {"pictures or labels": data_hash(images, labels)}
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        identity = Identity("a feature network's training", asdict(recipe), inputs)
        self.run = Run(identity, tensors | self.adam.tensors())

    def update(self, step: int) -> Step:
        recipe, gen = self.recipe, generator(self.recipe.seed, "batch", step)
        chosen = batch_indices(len(self.images), recipe.batch, recipe.seed, step, whole=True)
        x = self.images[chosen].float() / 255
        if recipe.labels:
            x = erased(shifted(x, gen), 4, 12, 0.5, gen)
            logits = self.net(2 * x - 1)
            loss = F.cross_entropy(logits, self.labels[chosen], label_smoothing=0.05)
        else:
            views = torch.cat((view(x, gen), view(x, gen)))
            loss = vicreg(*self.net(2 * views - 1).chunk(2))
        loss.backward()
        check_finite(step, value := loss.item(), self.adam.clip(5.0))
        self.adam.step(lr := recipe.lr_at(step))
        return Step(value, lr)

    def validate(self) -> dict[str, float]:
        return {}


def train(
    images: Tensor,
    labels: Tensor,
    out: Path,
    recipe: Recipe,
    *,
    checkpoint_every: int = 100,
    report: Callable[[Progress], None] | None = None,
) -> Training:
    """Train to the end of the recipe, resuming from a checkpoint in `out` where there is one.

    Args:
        images: uint8 [n, 1, 32, 32].

    Raises:
        ValueError: for too few pictures or a checkpoint of another run.
        OSError: where `out` cannot be written.
        FloatingPointError: where the loss is not finite.
    """
    if len(images) < recipe.batch:
        raise ValueError(f"batch must be at most the {len(images)} pictures, got {recipe.batch}")
    plan = Schedule(recipe.total_steps, recipe.batch, checkpoint_every, None)

    def show(progress: Progress) -> None:
        if plan.saves(progress.step):
            speed = f"{progress.per_second:.0f} pictures/s"
            print(f"{progress.step}/{progress.total_steps} loss {progress.loss:.4f}, {speed}")

    with Folder(out) as folder:
        folder.check()
        task = Training(recipe, images, labels)
        folder.resume(task.run, recipe.total_steps)
        task.net.train()
        loop.train(task, folder, plan, report or show)
    return task


@torch.no_grad()
def over(net: nn.Module, images: Tensor, part: int = 500) -> Tensor:
    """net of uint8 pictures, in parts, [n, dim]."""
    return torch.cat([net(to_unit(some)) for some in images.split(part)])


def probe(features: Tensor, labels: Tensor, decay: float = 1e-5) -> nn.Linear:
    """Logistic regression of labels on features [n, dim], to convergence by L-BFGS."""
    head = nn.Linear(features.shape[1], CLASSES)
    for w in head.parameters():
        nn.init.zeros_(w)
    solver = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(head(features), labels) + decay * head.weight.square().sum()
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


def export(
    run: Training,
    training: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    out: Path,
    *,
    name: str,
    command: str,
) -> dict[str, Any]:
    """Write weights, reference statistics and card into `out`; returns the card, whose accuracy and
    statistics are those of the weights file as it is loaded."""
    recipe, (images, labels) = run.recipe, training
    trunk = make_trunk(recipe.network).eval()
    weights = {n: w.half() for n, w in folded(run.net.trunk.state_dict()).items()}
    trunk.load_state_dict({n: w.float() for n, w in weights.items()})
    h = over(trunk, images)
    shift = h.double().mean(0).float()
    scale = h.double().std(0).clamp(min=1e-6).reciprocal().float()
    if recipe.labels:
        head = trained_head(run.net, shift, scale)
    else:
        head = probe((h - shift) * scale, labels)
    tensors = {f"trunk.{n}": w.contiguous() for n, w in weights.items()}
    tensors |= {f"head.{n}": w.detach().half() for n, w in head.state_dict().items()}
    write_whole(
        out / WEIGHTS_FILE, safetensors.torch.save({**tensors, "shift": shift, "scale": scale})
    )
    card = {
        "format": FORMAT,
        "name": name,
        "network": recipe.network,
        "dim": trunk.dim,
        "summary": "features of 32x32 grey pictures of clothes in [-1, 1]",
        "weights_sha256": file_hash(out / WEIGHTS_FILE),
        "objective": "cross-entropy on ten classes, label smoothing 0.05"
        if recipe.labels
        else "VICReg, self-supervised: no label is used but by the head",
        "features": "what the trunk gives, shifted and scaled to mean 0 and standard deviation 1 "
        "in every dimension over the training pictures; not normalised per picture",
        "head": "trained with the network"
        if recipe.labels
        else "linear probe: logistic regression on the frozen features of the training pictures",
        "parameters": sum(w.numel() for w in weights.values()),
        "recipe": asdict(recipe),
        "command": command,
        "fewstep": VERSION,
        "torch": torch.__version__,
        "data": "Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747), its training "
        "pictures, 28x28 grey, zero-padded to 32x32 and scaled to [-1, 1]",
        "licence": "weights Apache-2.0; data MIT, Copyright (c) 2017 Zalando SE",
    }
    write_json(out / CARD_FILE, card)
    net = load_feature_folder(out)
    features = over(net, images).double().numpy()
    buffer = io.BytesIO()
    np.savez(
        buffer,
        mu=features.mean(0),
        sigma=np.cov(features, rowvar=False),
        count=np.int64(len(features)),
        extractor=np.str_(net.full_name),
    )
    write_whole(out / REFERENCE_FILE, buffer.getvalue())
    guessed = net.head(over(net, test[0])).argmax(1)
    card["accuracy"] = {
        "test": round((guessed == test[1]).double().mean().item(), 4),
        "pictures": len(guessed),
    }
    card["reference_sha256"] = file_hash(out / REFERENCE_FILE)
    write_json(out / CARD_FILE, card)
    return card


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a built-in feature network.")
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
    try:
        if options.checkpoint_every < 1:
            raise ValueError(f"checkpoint-every must be positive, got {options.checkpoint_every}")
        recipe = replace(
            RECIPES[options.network], **{n: v for n, v in given.items() if v is not None}
        )
        training = load_idx_folder(options.data)
        test = load_idx_folder(options.data, "test") if options.export else None
        run = train(*training, options.out, recipe, checkpoint_every=options.checkpoint_every)
        if test:
            open_folder(options.export)
            command = f"python recipes/fashion_features.py --data DATA --network {options.network}"
            command += "".join(f" --{n} {v}" for n, v in given.items() if v is not None)
            card = export(
                run,
                training,
                test,
                options.export,
                name=f"fashion-{options.network}",
                command=f"{command} --out RUN --export TO",
            )
            print(f"{options.export}: test accuracy {card['accuracy']['test']}")
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
