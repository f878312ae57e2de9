"""fewstep train: networks and solvers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import train_app
from fewstep.cli.options import (
    DeviceOption,
    parse_widths,
    resumable,
)


@train_app.command("network")
def train_network_command(
    data: Annotated[Path, typer.Option(help="Folder of the four idx files (raw, .gz or .xz).")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and the model.")],
    pictures: Annotated[int, typer.Option(help="Length of the run in pictures.")] = 1_500_000,
    batch: Annotated[int, typer.Option(help="Pictures per step.")] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    label_dropout: Annotated[
        float, typer.Option(help="Share of pictures shown without class.")
    ] = 0.2,
    widths: Annotated[str, typer.Option(help="Channels at each resolution, top down.")] = "64,128",
    seed: Annotated[int, typer.Option(help="Decides weights, data order and noise.")] = 0,
    classes: Annotated[str | None, typer.Option(help="Class names, with commas between.")] = None,
    name: Annotated[str, typer.Option(help="The model's name in its card.")] = "network",
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 100,
    validate_every: Annotated[int, typer.Option(help="Steps between validations.", min=1)] = 1000,
    device: DeviceOption = "cpu",
    dtype: Annotated[str, typer.Option(help="Arithmetic: bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Train a class-conditional U-Net with EDM preconditioning on idx pictures.

    Resumes, exactly, from the checkpoint in the output folder; ends with a model folder that every
    command takes.
    """
    from fewstep.data.idx import load_idx_folder
    from fewstep.networks.unet import UNetConfig
    from fewstep.records import check_slug
    from fewstep.report import terminal as show
    from fewstep.train.network import Recipe, check_names, export_network, train_network

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
    check_slug("name", name)
    with resumable(out), show.TrainingBar(recipe.total_steps) as bar:
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
    print(f"{out}: a model folder, weights {card.weights_sha256[:16]}; try: fewstep sample {out}")
