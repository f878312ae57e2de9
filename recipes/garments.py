"""Train `garments`, a small Stable Diffusion in the format of diffusers, and write its folder.

    python -m recipes.garments autoencoder --data FOLDER --out RUN
    python -m recipes.garments latents --data FOLDER --out RUN
    python -m recipes.garments decoder --data FOLDER --out RUN
    python -m recipes.garments unet --out RUN
    python -m recipes.garments export --out RUN --to FOLDER

autoencoder  AutoencoderKL, 32x32 pixels to 4 channels of 8x8: the mean of absolute and squared
             errors, and a small KL term
latents      the encoded pictures of the first scenes, and their captions' tokens, once
decoder      the autoencoder's decoder alone, further, on these latents; it may run beside `unet`
unet         UNet2DConditionModel and CLIPTextModel together: the error of epsilon, a tenth of the
             captions empty
export       the averaged weights as a StableDiffusionPipeline, float16

Every random draw is a function of (seed, step): a run that is killed and started again takes the
path of one that was not, to the bit, on one kind of machine and number of threads. `--pictures`
makes a run longer or shorter; its rate is flat before the last part, so a run that has not reached
that part can be given another length without leaving its path.

Sources: Rombach et al. 2022 (latent diffusion), arXiv:2112.10752; Karras et al. 2024 (the average),
arXiv:2312.02696.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.data.garments import Garments, caption
from fewstep.data.idx import to_unit
from fewstep.files import file_hash, open_folder, write_whole
from fewstep.noise import generator
from fewstep.provenance import VERSION
from fewstep.tensors import load_tensors, read_metadata
from fewstep.train import loop
from fewstep.train.average import Average
from fewstep.train.checkpoint import CHECKPOINT
from fewstep.train.interrupts import Stopped
from fewstep.train.loop import Folder, Progress, Schedule, Step
from fewstep.train.optimiser import Adam, check_finite
from fewstep.train.order import batch_indices
from fewstep.train.run import Identity, Run
from recipes.garments_parts import (
    AUTOENCODER,
    BETA_FIRST,
    BETA_LAST,
    TEXT,
    TIMES,
    UNET,
    Conditioned,
    Decoder,
    averaged_autoencoder,
    fast,
    make_autoencoder,
    make_tokenizer,
    tokens_of,
    with_averages,
    write_pipeline,
)

TRAINED = ("autoencoder", "decoder", "unet")
PARTS = ("autoencoder", "latents", "decoder", "unet", "export")
LATENTS = "latents.safetensors"


@dataclass(frozen=True)
class Recipe:
    """What decides the trained weights, to the bit, on one kind of machine.

    network: of the autoencoder or the U-Net; the configs of diffusers
    pictures: length of the run, rounded up to whole batches
    scenes: training scenes, from the first
    warmup: pictures until the learning rate is reached
    cooldown: the last share of the run, over which it falls to zero
    kl: weight of the autoencoder's KL term, per latent
    noise: standard deviation of what is added to the decoder's latents
    dropout: share of empty captions
    """

    network: Mapping[str, Any] = field(default_factory=dict)
    pictures: int = 200_000
    scenes: int = 100_000
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 10_000
    cooldown: float = 0.3
    weight_decay: float = 0.01
    kl: float = 0.0
    noise: float = 0.0
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fine in (
            ("pictures", self.pictures >= 1),
            ("batch", self.batch >= 1),
            ("scenes", self.scenes >= self.batch),
        ):
            if not fine:
                raise ValueError(f"{name} must be positive, and batch at most scenes, got {self}")

    @property
    def total_steps(self) -> int:
        return math.ceil(self.pictures / self.batch)

    def lr_at(self, step: int) -> float:
        """Learning rate of the update after `step` earlier ones."""
        rise = (step + 1) * self.batch / self.warmup if self.warmup else 1.0
        fall = (self.total_steps - step) / (self.cooldown * self.total_steps + 1)
        return self.lr * min(1.0, rise, fall)


AUTOENCODER_RECIPE = Recipe(AUTOENCODER, pictures=80_000, scenes=240_000, lr=2e-3, kl=2e-4)
DECODER_RECIPE = Recipe(AUTOENCODER, pictures=120_000, lr=1e-3, noise=0.03)
UNET_RECIPE = Recipe(
    {"unet": UNET, "text": TEXT}, pictures=400_000, batch=32, warmup=10_000, dropout=0.1
)


class Training:
    """Of one of the networks: AdamW on its loss, and the average of the weights.

    loss: of a step, whose random numbers come from the generator
    """

    def __init__(
        self,
        kind: str,
        recipe: Recipe,
        net: nn.Module,
        inputs: dict[str, str],
        loss: Callable[[int, torch.Generator], Tensor],
    ) -> None:
        self.recipe, self.net, self.loss = recipe, net, loss
        weights = dict(net.named_parameters())
        self.adam = Adam(weights, weight_decay=recipe.weight_decay)
        self.average = Average(weights)
        settings = {k: v for k, v in asdict(recipe).items() if k != "pictures"}
        tensors = {f"weights.{name}": w.detach() for name, w in weights.items()}
        tensors |= self.average.tensors() | self.adam.tensors()
        self.run = Run(Identity(kind, settings, inputs), tensors)

    def update(self, step: int) -> Step:
        loss = self.loss(step, generator(self.recipe.seed, "batch", step))
        loss.backward()
        check_finite(step, value := loss.item(), self.adam.clip(1.0))
        self.adam.step(lr := self.recipe.lr_at(step))
        self.average.update(step + 1)
        return Step(value, lr)

    def validate(self) -> dict[str, float]:
        return {}

    def averaged(self) -> Any:
        return self.average.of(self.net)


def autoencoder_training(recipe: Recipe, data: Path) -> Training:
    """Of the autoencoder, on pictures made as they are needed."""
    pictures = Garments(data)
    net = seeded(recipe, lambda: make_autoencoder(recipe.network))

    def loss(step: int, gen: torch.Generator) -> Tensor:
        chosen = batch_indices(recipe.scenes, recipe.batch, recipe.seed, step)
        x = fast(to_unit(pictures.pictures(chosen.tolist())))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = net.encode(x).latent_dist
            eps = torch.randn(found.mean.shape, generator=gen)
            out = net.decode(fast(found.mean + found.std * eps)).sample.float()
        error = out - x
        return error.abs().mean() + error.square().mean() + recipe.kl * kl(found)

    inputs = {"pictures": pictures.digest()}
    return Training("the autoencoder's training", recipe, net, inputs, loss)


def decoder_training(recipe: Recipe, data: Path, net: Any, latents: Path) -> Training:
    """Of the decoder, from latents that stay as they are, as diffusion makes them: with errors."""
    pictures, tensors = Garments(data), load_tensors(latents)
    factor = latent_factor(latents)
    part = Decoder(net).requires_grad_(True).train()

    def loss(step: int, gen: torch.Generator) -> Tensor:
        chosen = batch_indices(recipe.scenes, recipe.batch, recipe.seed, step, name="decoder")
        x = to_unit(pictures.pictures(chosen.tolist()))
        z = tensors["latents"][chosen].float() / factor
        z = z + recipe.noise / factor * torch.randn(z.shape, generator=gen)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            error = part(fast(z)).float() - x
        return error.abs().mean() + error.square().mean()

    inputs = {"pictures": pictures.digest(), "latents": file_hash(latents)}
    return Training("the decoder's training", recipe, part, inputs, loss)


def latent_factor(path: Path) -> float:
    """By which the latents in a file are multiplied. Raises: ValueError, OSError."""
    return float(read_metadata(path)["scaling_factor"])


def kl(found: Any) -> Tensor:
    """From the unit Gaussian, mean over the latents."""
    mean, log_var = found.mean.float(), found.logvar.float()
    return (mean.square() + log_var.exp() - 1 - log_var).mean() / 2


def unet_training(recipe: Recipe, latents: Path) -> Training:
    """Of the U-Net and the text encoder, on encoded pictures."""
    tokenizer = make_tokenizer()
    tensors = load_tensors(latents)
    if len(tensors["latents"]) < recipe.scenes:
        raise ValueError(
            f"{latents} has {len(tensors['latents'])} scenes, got scenes={recipe.scenes}; "
            "run `latents` again"
        )
    empty = tokens_of(tokenizer, [""])
    alpha = torch.tensor(abar(), dtype=torch.float64)
    scale, noise = (
        part.float()[:, None, None, None] for part in (alpha.sqrt(), (1 - alpha).sqrt())
    )
    net = seeded(recipe, lambda: Conditioned(recipe.network, tokenizer))

    def loss(step: int, gen: torch.Generator) -> Tensor:
        chosen = batch_indices(recipe.scenes, recipe.batch, recipe.seed, step)
        x_0, tokens = tensors["latents"][chosen].float(), tensors["tokens"][chosen].long()
        dropped = torch.rand(recipe.batch, generator=gen) < recipe.dropout
        tokens = torch.where(dropped[:, None], empty, tokens)
        u = (torch.arange(recipe.batch) + torch.rand(recipe.batch, generator=gen)) / recipe.batch
        t = (u * TIMES).long().clamp(max=TIMES - 1)
        eps = torch.randn(x_0.shape, generator=gen)
        x_t = fast(scale[t] * x_0 + noise[t] * eps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(x_t, t, tokens)
        return F.mse_loss(out.float(), eps)

    inputs = {"latents": file_hash(latents)}
    return Training("the U-Net's training", recipe, net, inputs, loss)


def abar() -> list[float]:
    """Stable Diffusion's table of signal: the product of 1 - beta, beta linear in its root."""
    betas = torch.linspace(BETA_FIRST**0.5, BETA_LAST**0.5, TIMES, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).tolist()


def seeded(recipe: Recipe, make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return make().train()


def train(task: Training, out: Path, checkpoint_every: int) -> None:
    """To the end of the recipe, from a checkpoint in `out` where there is one.

    Raises:
        ValueError: for a checkpoint of another run.
        OSError: where `out` cannot be written.
        FloatingPointError: where the loss is not finite.
    """
    recipe = task.recipe
    plan = Schedule(recipe.total_steps, recipe.batch, checkpoint_every, None)
    folder = Folder(out)
    folder.check()
    folder.resume(task.run, recipe.total_steps)
    total = 0.0

    def show(progress: Progress) -> None:
        nonlocal total
        total += progress.loss
        if plan.saves(progress.step):
            speed = f"{progress.per_second:.0f} pictures/s"
            mean = total / checkpoint_every
            print(f"{progress.step}/{progress.total_steps} loss {mean:.4f}, {speed}", flush=True)
            total = 0.0

    loop.train(task, folder, plan, show)


@torch.no_grad()
def write_latents(net: Any, data: Path, scenes: int, out: Path) -> float:
    """Write the encoded pictures and tokens of the first scenes; returns the latents' factor, by
    which they have a standard deviation of 1."""
    pictures, tokenizer, rows = Garments(data), make_tokenizer(), []
    for part in torch.arange(scenes).split(500):
        x = fast(to_unit(pictures.pictures(part.tolist())))
        rows.append(net.encode(x).latent_dist.mean)
    latents = torch.cat(rows)
    factor = round(1 / latents.double().std().item(), 4)
    tokens = tokens_of(tokenizer, [caption("train", i)[0] for i in range(scenes)])
    data_of = {"latents": (latents * factor).half().contiguous(), "tokens": tokens.short()}
    write_whole(out, safetensors.torch.save(data_of, {"scaling_factor": str(factor)}))
    return factor


def export(out: Path, to: Path) -> None:
    """Write the averaged weights of a run as they are. Raises: ValueError, OSError."""
    heads = {part: read_about(out / part / CHECKPOINT) for part in TRAINED}
    networks = with_averages(
        Conditioned(UNET_RECIPE.network, make_tokenizer()), out / "unet" / CHECKPOINT
    )
    autoencoder = averaged_autoencoder(out / "autoencoder", AUTOENCODER)
    with_averages(Decoder(autoencoder), out / "decoder" / CHECKPOINT)
    about = {
        "recipe": heads,
        "command": "python -m recipes.garments PART --data DATA --out RUN, with the parts in turn",
        "fewstep": VERSION,
        "torch": torch.__version__,
        "data": "scenes of fewstep.data.garments, from Fashion-MNIST (Xiao, Rasul and Vollgraf "
        "2017, arXiv:1708.07747)",
        "licence": "weights Apache-2.0; data MIT, Copyright (c) 2017 Zalando SE",
    }
    write_pipeline(networks, autoencoder, latent_factor(out / LATENTS), to, about)


def read_about(checkpoint: Path) -> dict[str, Any]:
    """The settings of a run and how far it came. Raises: ValueError, OSError."""
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint} is missing; run that part first")
    head = json.loads(read_metadata(checkpoint)["fewstep"])
    steps = head["state"]["step"]
    return {**head["settings"], "steps": steps, "pictures": steps * head["settings"]["batch"]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train garments, a small Stable Diffusion.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's files")
    parser.add_argument("--out", required=True, type=Path, help="folder of the run")
    parser.add_argument("--to", type=Path, help="export: folder to write the pipeline to")
    parser.add_argument("--pictures", type=int, help="length of the run")
    parser.add_argument("--scenes", type=int, help="training scenes, from the first")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--checkpoint-every", type=int, default=100, help="in steps")
    options = parser.parse_args(argv)
    given = {n: getattr(options, n) for n in ("pictures", "scenes", "batch", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        run(options, given)
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        return stopped.code
    return 0


def run(options: argparse.Namespace, given: dict[str, int]) -> None:
    """One part of the recipe. Raises: ValueError, OSError, FloatingPointError."""
    out: Path = options.out
    first, second = replace(AUTOENCODER_RECIPE, **given), replace(UNET_RECIPE, **given)
    if options.part in ("autoencoder", "latents", "decoder") and options.data is None:
        raise ValueError("--data is missing: the folder of Fashion-MNIST's four idx files")
    if options.part == "autoencoder":
        task = autoencoder_training(first, options.data)
        train(task, out / "autoencoder", options.checkpoint_every)
    elif options.part == "latents":
        net = averaged_autoencoder(out / "autoencoder", first.network)
        write_latents(net, options.data, second.scenes, out / LATENTS)
    elif options.part == "decoder":
        third = replace(DECODER_RECIPE, **given)
        net = averaged_autoencoder(out / "autoencoder", third.network)
        task = decoder_training(third, options.data, net, out / LATENTS)
        train(task, out / "decoder", options.checkpoint_every)
    elif options.part == "unet":
        task = unet_training(second, out / LATENTS)
        train(task, out / "unet", options.checkpoint_every)
    else:
        if options.to is None:
            raise ValueError("--to is missing: the folder to write the pipeline to")
        open_folder(options.to)
        export(out, options.to)


if __name__ == "__main__":
    sys.exit(main())
