"""fewstep train network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from fewstep.cli.app import train_app
from fewstep.cli.options import LEARNING, MACHINE, Machine, Take, command, option
from fewstep.cli.parsing import parse_widths
from fewstep.cli.work import resumable
from fewstep.networks.unet_config import UNetConfig
from fewstep.text import clean
from fewstep.train.recipe import Recipe

RECIPE = Take(Recipe, LEARNING, without=("network", "dtype"))


@command(
    train_app,
    "network",
    RECIPE,
    Take(
        UNetConfig,
        LEARNING,
        only=("widths",),
        helps={"widths": "Channels at each resolution, top down."},
        parsers={"widths": parse_widths},
    ),
    Take(Machine, MACHINE, only=("device",)),
    Take(Recipe, MACHINE, only=("dtype",)),
)
def train_network_command(
    *,
    data: Annotated[Path, option("Folder of the four idx files (raw, .gz or .xz).")],
    out: Annotated[Path, option("Folder for the checkpoint and the model.")],
    name: Annotated[str, option("The model's name in its card.")] = "network",
    classes: Annotated[str | None, option("Class names, with commas between.")] = None,
    checkpoint_every: Annotated[int, option("Steps between checkpoints.", least=1)] = 100,
    validate_every: Annotated[int, option("Steps between validations.", least=1)] = 1000,
    **given: Any,
) -> None:
    """Train a class-conditional U-Net with EDM preconditioning on idx pictures.

    Resumes, exactly, from the checkpoint in the output folder. Ends with a model folder that every
    command takes.
    """
    device = given.pop("device")
    network = UNetConfig(widths=given.pop("widths"))
    recipe = Recipe(**given)  # refused before torch and the data are there

    from fewstep.data.idx import load_idx_folder
    from fewstep.records import check_slug
    from fewstep.report.terminal import TrainingBar
    from fewstep.train.network import check_names, export_network, train_network

    check_slug("name", name)
    images, labels = load_idx_folder(data)
    test_images, test_labels = load_idx_folder(data, "test")
    names, count = tuple(classes.split(",")) if classes else (), int(labels.max()) + 1
    if names:
        check_names(names, count)
    recipe = replace(recipe, network=replace(network, classes=count))
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
