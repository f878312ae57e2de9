"""fewstep distill: a network that samples in 1 to 8 evaluations, from one that needs more."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from fewstep.cli.app import distill_app
from fewstep.cli.options import (
    LEARNING,
    MACHINE,
    TEXT,
    Machine,
    ModelArgument,
    Take,
    command,
    option,
)
from fewstep.cli.work import resumable
from fewstep.distillation.recipe import Encoding, Recipe
from fewstep.text import clean

MACHINE_FIELDS = ("checkpointing", "dtype", "compile")
NONE = "none"


@command(
    distill_app,
    "splam",
    Take(Recipe, LEARNING, without=MACHINE_FIELDS),
    Take(Recipe, MACHINE, only=MACHINE_FIELDS),
    Take(Encoding, TEXT),
    Take(Machine, MACHINE, only=("device",)),
)
def distill_splam_command(
    model: ModelArgument,
    /,
    *,
    data: Annotated[
        str,
        option(
            "Folder of idx files; or a folder, .zip, .npz or .npy of pictures. Of models that take "
            "text: with captions, or a table of them, .tar or .parquet; none: the teacher's own, "
            "and for trajectories noise alone."
        ),
    ],
    out: Annotated[Path, option("Folder for the checkpoint and the student.")],
    name: Annotated[str | None, option("The student's name in its card.")] = None,
    sampler: Annotated[
        str | None,
        option(
            "For its card: consistency (fresh noise), consistency-ode (of segments), "
            "consistency-kappa or consistency-pca."
        ),
    ] = None,
    checkpoint_every: Annotated[int, option("Steps between checkpoints.")] = 100,
    validate_every: Annotated[int, option("Steps between validations.")] = 500,
    validation_seeds: Annotated[
        int, option("Pictures compared with the teacher's; 0 for none.")
    ] = 250,
    validation_prompts: Annotated[
        Path | None,
        option("File with texts of these pictures. Default: the first captions.", TEXT),
    ] = None,
    features: Annotated[
        Path | None, option("Folder of a feature network, for the distances of validation.")
    ] = None,
    clip_model: Annotated[
        Path | None, option("Folder of a CLIP model, for scores of validation.")
    ] = None,
    lora_format: Annotated[
        str, option("Of adapters: diffusers, or kohya beside it (A1111, Forge, ComfyUI).")
    ] = "diffusers",
    **settings: Any,
) -> None:
    """Distil by sub-path linear approximation (SPLAM), on pictures.

    Resumes, exactly, from the checkpoint in the output folder. Ends with a model folder that every
    command takes, or with a file of adapters for `fewstep sample MODEL --lora`.
    `torchrun --nproc-per-node 2 -m fewstep distill splam ...` shares the work among processes.
    """
    device = settings.pop("device")
    encoding = Encoding(**{one.name: settings.pop(one.name) for one in fields(Encoding)})
    recipe = Recipe(**settings)

    from fewstep.distillation import distill
    from fewstep.models import load
    from fewstep.models.students import a_budget
    from fewstep.report.terminal import TrainingBar

    if device == "cuda":  # under torchrun each process has a device of its own
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    loaded = load(model, device=device)
    leads = os.environ.get("RANK", "0") == "0"
    with resumable(out), TrainingBar(recipe.total_steps, quiet=not leads) as bar:
        student = distill(
            loaded,
            None if data == NONE else Path(data),
            out=out,
            encoding=None if encoding == Encoding() else encoding,
            encoding_report=bar,
            validation_prompts=validation_prompts,
            features=features,
            clip_model=clip_model,
            lora_format=lora_format,
            name=name,
            sampler=sampler,
            checkpoint_every=checkpoint_every,
            validate_every=validate_every,
            validation_seeds=validation_seeds,
            report=bar.report,
            resumed=bar.resumed,
            **settings,
        )
    budgets, some = ", ".join(student.card.auto), a_budget(student.card)
    if leads and recipe.train == "lora":
        told = f"{out}: adapters for {budgets} evaluations; "
        print(clean(f"{told}try: fewstep sample {model} --lora {out} --nfe {some}"))
    elif leads:
        told = f"{out}: a model folder for {budgets} evaluations; "
        print(clean(f"{told}try: fewstep sample {out} --nfe {some}"))
