"""fewstep train network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fewstep.cli.app import train_app
from fewstep.cli.options import LEARNING, MACHINE, command, option
from fewstep.cli.parsing import parse_widths
from fewstep.cli.work import resumable
from fewstep.text import clean


@command(train_app, "network")
def train_network_command(
    *,
    data: Annotated[Path, option("Folder of the four idx files (raw, .gz or .xz).")],
    out: Annotated[Path, option("Folder for the checkpoint and the model.")],
    name: Annotated[str, option("The model's name in its card.")] = "network",
    classes: Annotated[str | None, option("Class names, with commas between.")] = None,
    checkpoint_every: Annotated[int, option("Steps between checkpoints.")] = 100,
    validate_every: Annotated[int, option("Steps between validations.")] = 1000,
    pictures: Annotated[int, option("Length of the run in pictures.", group=LEARNING)] = 1_500_000,
    batch: Annotated[int, option("Pictures per step.", group=LEARNING)] = 128,
    lr: Annotated[float, option("Learning rate of Adam.", group=LEARNING)] = 1e-3,
    label_dropout: Annotated[
        float, option("Share of pictures shown without class.", group=LEARNING)
    ] = 0.2,
    widths: Annotated[
        str, option("Channels at each resolution, top down.", group=LEARNING)
    ] = "64,128",
    seed: Annotated[int, option("Decides weights, data order and noise.", group=LEARNING)] = 0,
    device: Annotated[str, option("A torch device: cpu, cuda, cuda:1.", group=MACHINE)] = "cpu",
    dtype: Annotated[str, option("Arithmetic: bfloat16 or float32.", group=MACHINE)] = "bfloat16",
) -> None:
    """Train a class-conditional U-Net with EDM preconditioning on idx pictures.

    Resumes, exactly, from the checkpoint in the output folder. Ends with a model folder that every
    command takes.
    """
    from fewstep.data.idx import load_idx_folder
    from fewstep.networks.unet import UNetConfig
    from fewstep.records import check_slug
    from fewstep.report.terminal import TrainingBar
    from fewstep.train.network import Recipe, check_names, export_network, train_network

    for what, value in (("checkpoint_every", checkpoint_every), ("validate_every", validate_every)):
        if value < 1:
            raise ValueError(f"{what} must be at least 1, got {value}")
    check_slug("name", name)
    images, labels = load_idx_folder(data)
    test_images, test_labels = load_idx_folder(data, "test")
    names = tuple(classes.split(",")) if classes else ()
    count = int(labels.max()) + 1
    if names:
        check_names(names, count)
    recipe = Recipe(
        pictures=pictures,
        batch=batch,
        lr=lr,
        label_dropout=label_dropout,
        dtype=dtype,
        seed=seed,
        network=UNetConfig(widths=parse_widths(widths), classes=count),
    )
    with resumable(out), TrainingBar(recipe.total_steps) as bar:
        net = train_network(
            images,
            labels,
            (test_images[:2000], test_labels[:2000]),
            out,
            recipe,
            device=device,
            checkpoint_every=checkpoint_every,
            validate_every=validate_every,
            report=bar.report,
            resumed=bar.resumed,
        )
    card = export_network(net, recipe, images, labels, out, name=name, classes=names)
    weights = card.weights_sha256[:16]
    print(clean(f"{out}: a model folder, weights {weights}; try: fewstep sample {out}"))
