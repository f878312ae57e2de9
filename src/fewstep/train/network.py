"""Training the built-in kind of network: EDM's denoising loss over the whole range of noise.

Half of each batch draws its noise level log-normally, as EDM does, and half log-uniformly over
[sigma_min, sigma_max], both stratified within the batch; few-step sampling lives on the high-noise
end, which the log-normal alone hardly visits. The learning rate is flat after a warm-up and falls
linearly to zero over the last part of the run; the average of the weights has a window that grows
with the run (power-function EMA).

Every random draw is a function of (seed, step), so a run that is killed and resumed from its last
checkpoint takes exactly the path of one that was not. A run can also be taken further with more
pictures: it is then on the path of the longer run only if it stopped before its own cool-down,
since the learning rate depends on the length (after one, it goes up again).

Sources: Karras et al. 2022 (EDM), arXiv:2206.00364; Karras et al. 2024 (EDM2, the EMA),
arXiv:2312.02696.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.idx import to_unit
from fewstep.models.card import CARD_FILE, WEIGHTS_FILE, Card
from fewstep.models.formats.native import save_folder
from fewstep.models.statistics import data_statistics, far_means
from fewstep.networks.device import check_device
from fewstep.networks.preconditioning import denoise
from fewstep.networks.unet import UNet
from fewstep.noise import generator
from fewstep.provenance import VERSION
from fewstep.train.average import Average
from fewstep.train.loop import Folder, Progress, Schedule, Step, train
from fewstep.train.optimiser import Adam, check_finite
from fewstep.train.order import batch_indices
from fewstep.train.recipe import Recipe
from fewstep.train.run import Identity, Run

__all__ = ["Training", "check_names", "export_network", "train_network"]

P_MEAN, P_STD = -1.2, 1.2  # the log-normal of EDM, its table 1
RESULTS = (CARD_FILE, WEIGHTS_FILE)


def noise_levels(recipe: Recipe, gen: torch.Generator) -> Tensor:
    """sigma [batch]: the first half log-normal, the second log-uniform, each stratified."""
    half = recipe.batch // 2
    u = (torch.arange(half) + torch.rand(2, half, generator=gen, dtype=torch.float64)) / half
    log_normal = P_MEAN + P_STD * math.sqrt(2) * torch.erfinv(
        (2 * u[0] - 1).clamp(-1 + 1e-9, 1 - 1e-9)
    )
    low, high = math.log(recipe.sigma_min), math.log(recipe.sigma_max)
    log_uniform = low + (high - low) * u[1]
    return torch.cat((log_normal.clamp(low, high), log_uniform)).exp().float()


def weighted_errors(
    net: UNet, x_0: Tensor, sigma: Tensor, label: Tensor, eps: Tensor, recipe: Recipe
) -> Tensor:
    """EDM's loss per picture: (sigma^2 + sd^2) / (sigma sd)^2 times the mean squared error, [b]."""
    x = x_0 + sigma[:, None, None, None] * eps
    dtype = getattr(torch, recipe.dtype)
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
        error = denoise(net, x, sigma, label, recipe.sigma_data) - x_0
    weight = (sigma.square() + recipe.sigma_data**2) / (sigma * recipe.sigma_data).square()
    return weight * error.square().mean(dim=(1, 2, 3))


class Training:
    """Of a network: EDM's loss on pictures, Adam, and the average of the weights."""

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        images: Tensor,
        labels: Tensor,
        held_out: tuple[Tensor, Tensor],
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.net = UNet(recipe.network).to(device)
        self.recipe, self.device = recipe, device
        self.images, self.labels, self.held_out = images, labels, held_out
        weights = dict(self.net.named_parameters())
        self.adam, self.average = Adam(weights), Average(weights)
        settings = {k: v for k, v in asdict(recipe).items() if k != "pictures"}
        inputs = {"pictures or labels": data_hash(images, labels)}
        tensors = {f"weights.{name}": w.detach() for name, w in weights.items()}
        tensors |= self.average.tensors() | self.adam.tensors()
        self.run = Run(Identity("a network's training", settings, inputs), tensors)

    def update(self, step: int) -> Step:
        """One step of Adam; the loss is EDM's, over the log-normal half of the batch."""
        recipe, gen = self.recipe, generator(self.recipe.seed, "batch", step)
        chosen = batch_indices(len(self.images), recipe.batch, recipe.seed, step)
        sigma = noise_levels(recipe, gen)
        dropped = torch.rand(recipe.batch, generator=gen) < recipe.label_dropout
        label = torch.where(dropped, recipe.network.classes, self.labels[chosen])
        x_0 = to_unit(self.images[chosen])
        eps = torch.randn(x_0.shape, generator=gen)
        x_0, sigma, label, eps = (t.to(self.device) for t in (x_0, sigma, label, eps))
        losses = weighted_errors(self.net, x_0, sigma, label, eps, recipe)
        losses.mean().backward()
        loss = losses[: recipe.batch // 2].mean().item()
        check_finite(step, loss, self.adam.clip(1.0))
        self.adam.step(lr := recipe.lr_at(step))
        self.average.update(step + 1)
        return Step(loss, lr)

    def validate(self) -> dict[str, float]:
        """Of the averaged weights."""
        return validate(self.averaged(), *self.held_out, self.recipe)

    def averaged(self) -> UNet:
        """A copy of the network with the averaged weights."""
        return self.average.of(self.net)


@torch.no_grad()
def validate(net: UNet, images: Tensor, labels: Tensor, recipe: Recipe) -> dict[str, float]:
    """EDM's loss on held-out pictures, same noise every time, with and without class.

    Also far_error: root mean square of D(sigma_max z; sigma_max) minus the data mean, averaged over
    z, without class; a network at fault there ruins every few-step sampler.
    """
    device, gen = next(net.parameters()).device, generator("validation")
    count = len(images) - len(images) % 2
    law = replace(recipe, batch=2 * count)
    sigma = noise_levels(law, gen)[:count]
    sigma = sigma[torch.randperm(count, generator=gen)]
    sums, none = [0.0, 0.0], torch.full((count,), recipe.network.classes)
    far = torch.zeros(images.shape[1:], device=device)
    for part in torch.arange(count).split(250):
        x_0, eps = to_unit(images[part]), torch.randn(len(part), *images.shape[1:], generator=gen)
        x_0, eps, level = x_0.to(device), eps.to(device), sigma[part].to(device)
        for i, label in enumerate((labels, none)):
            errors = weighted_errors(net, x_0, level, label[part].to(device), eps, recipe)
            sums[i] += errors.sum().item() / count
        top = torch.full_like(level, recipe.sigma_max)
        far += denoise(net, eps * recipe.sigma_max, top, none[part].to(device)).sum(0) / count
    mean = to_unit(images).mean(0).to(device)
    return {
        "loss": sums[0],
        "loss_without_class": sums[1],
        "far_error": (far - mean).square().mean().sqrt().item(),
    }


def train_network(
    images: Tensor,
    labels: Tensor,
    held_out: tuple[Tensor, Tensor],
    out: Path | str,
    recipe: Recipe,
    *,
    device: str | torch.device = "cpu",
    checkpoint_every: int = 100,
    validate_every: int = 1000,
    report: Callable[[Progress], None] = lambda progress: None,
    resumed: Callable[[int], None] = lambda step: None,
) -> UNet:
    """Train to the end of the recipe, resuming from a checkpoint in `out` where there is one.

    Resuming takes exactly the path of an undisturbed run of the same `pictures`. More pictures than
    the checkpoint's run had, even one that was finished, are allowed: see the module's docstring.
    On Ctrl-C and SIGTERM the step is finished and a checkpoint saved before `Stopped` is raised.

    Args:
        images: uint8 [n, c, h, w]
        labels: int64 [n]
        held_out: the same, for validation
        checkpoint_every, validate_every: in steps
        report: called after every step
        resumed: called once, with the step, where there was a checkpoint

    Returns:
        The network with averaged weights, float32. `out` receives checkpoint.safetensors and
        log.jsonl (one line per validation).

    Raises:
        ValueError: before the first step, for data that do not go with the recipe, a device that is
            not available, a checkpoint of another recipe or other data, or an `out` that holds
            another model.
        OSError: before the first step, `out` cannot be written.
        FloatingPointError: the loss is not finite. The last checkpoint stays.
    """
    plan = Schedule(recipe.total_steps, recipe.batch, checkpoint_every, validate_every)
    place = check_device(device)
    check_data(images, labels, held_out, recipe)
    with Folder(Path(out), RESULTS) as folder:
        folder.check()
        task = Training(recipe, place, images, labels, held_out)
        if folder.resume(task.run, recipe.total_steps):
            resumed(task.run.step)
        train(task, folder, plan, report)
    return task.averaged()


def export_network(
    net: UNet,
    recipe: Recipe,
    images: Tensor,
    labels: Tensor,
    out: Path | str,
    *,
    name: str,
    classes: Sequence[str] = (),
    summary: str = "",
    about: dict[str, Any] | None = None,
) -> Card:
    """Write a model folder from a trained network: float16 weights, statistics of the data, the
    card.

    Args:
        images, labels: the training data, for its statistics
        classes: names, indices where left out
        about: more facts for the card, which says the recipe and the version of fewstep in any case

    Raises:
        ValueError: for names that do not go with the recipe, or where `out` holds another model.
    """
    out, count = Path(out), recipe.network.classes
    names = check_names(tuple(classes) or tuple(map(str, range(count))), count)
    with Folder(out, RESULTS) as folder:
        folder.check()
    stats = data_statistics(images, labels, count)
    rounded = copy.deepcopy(net).half().float()  # what will be loaded
    config = rounded.config
    stats["far_mean"] = far_means(
        partial(denoise, rounded, sigma_data=recipe.sigma_data),
        rounded.image_shape,
        config.classes,
        recipe.sigma_max,
        device=next(rounded.parameters()).device,
    )
    card = Card(
        name=name,
        network=asdict(recipe.network),
        summary=summary,
        classes=names,
        sigma_min=recipe.sigma_min,
        sigma_max=recipe.sigma_max,
        sigma_data=recipe.sigma_data,
        about={"fewstep": VERSION, "recipe": asdict(recipe), **(about or {})},
    )
    return save_folder(out, card, net, stats)


def check_names(names: Sequence[str], classes: int) -> tuple[str, ...]:
    """The names of classes.

    Raises:
        ValueError: there are too few or too many, or one is empty or given twice.
    """
    if len(names) != classes:
        raise ValueError(f"classes must name {classes} classes, got {len(names)}")
    if not all(names) or len(set(names)) != len(names):
        raise ValueError(f"classes must have a name each, no two the same, got {','.join(names)!r}")
    return tuple(names)


def check_data(
    images: Tensor, labels: Tensor, held_out: tuple[Tensor, Tensor], recipe: Recipe
) -> None:
    """Raise ValueError where pictures or labels do not go with the recipe, or with each other."""
    config = recipe.network
    shape = (config.channels, config.size, config.size)
    for what, pictures, theirs in (("training", images, labels), ("held-out", *held_out)):
        if pictures.dtype != torch.uint8 or tuple(pictures.shape[1:]) != shape:
            raise ValueError(
                f"{what} pictures must be uint8 of shape {shape}, "
                f"got {pictures.dtype}, {tuple(pictures.shape[1:])}"
            )
        if len(pictures) < 2 or theirs.shape != (len(pictures),):
            raise ValueError(
                f"there must be at least 2 {what} pictures with a label each, "
                f"got {len(pictures)} and labels of shape {tuple(theirs.shape)}"
            )
        low, high = int(theirs.min()), int(theirs.max())
        if low < 0 or high >= max(1, config.classes):
            raise ValueError(
                f"{what} labels must lie below the {config.classes} classes, got {low} to {high}"
            )
    if recipe.batch > len(images):
        raise ValueError(f"batch must be at most the {len(images)} pictures, got {recipe.batch}")
    for label, count in enumerate(torch.bincount(labels, minlength=config.classes).tolist()):
        if count < 2:
            raise ValueError(f"every class needs at least 2 pictures, class {label} has {count}")


def data_hash(images: Tensor, labels: Tensor) -> str:
    """SHA-256 of the shapes and the values of pictures and labels, in hexadecimal."""
    digest = hashlib.sha256()
    for values in (images.to(torch.uint8), labels.to(torch.int64)):
        digest.update(repr(tuple(values.shape)).encode())
        digest.update(values.contiguous().cpu().numpy().data)
    return digest.hexdigest()
