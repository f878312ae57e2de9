"""fewstep distill: a network that samples in 1 to 8 evaluations, from one that needs more."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from fewstep.cli.app import distill_app
from fewstep.cli.options import LEARNING, MACHINE, Machine, ModelArgument, Take, command, option
from fewstep.cli.work import resumable
from fewstep.distillation.recipe import Recipe
from fewstep.text import clean

MACHINE_FIELDS = ("dtype", "compile")


@command(
    distill_app,
    "splam",
    Take(Recipe, LEARNING, without=MACHINE_FIELDS),
    Take(Recipe, MACHINE, only=MACHINE_FIELDS),
    Take(Machine, MACHINE, only=("device",)),
)
def distill_splam_command(
    model: ModelArgument,
    /,
    *,
    data: Annotated[
        Path, option("Folder of idx files; or a folder, .zip, .npz or .npy of pictures.")
    ],
    out: Annotated[Path, option("Folder for the checkpoint and the student.")],
    name: Annotated[str | None, option("The student's name in its card.")] = None,
    sampler: Annotated[
        str, option("For its card: consistency (fresh noise) or consistency-ode.")
    ] = "consistency",
    checkpoint_every: Annotated[int, option("Steps between checkpoints.")] = 100,
    validate_every: Annotated[int, option("Steps between validations.")] = 500,
    validation_seeds: Annotated[
        int, option("Pictures compared with the teacher's; 0 for none.")
    ] = 250,
    **settings: Any,
) -> None:
    """Distil by sub-path linear approximation (SPLAM), on pictures.

    Resumes, exactly, from the checkpoint in the output folder. Ends with a model folder that every
    command takes. `torchrun --nproc-per-node 2 -m fewstep distill splam ...` shares the work among
    processes.
    """
    device = settings.pop("device")
    recipe = Recipe(**settings)

    from fewstep.distillation import distill
    from fewstep.models import load
    from fewstep.report.terminal import TrainingBar

    if device == "cuda":  # under torchrun each process has a device of its own
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    loaded = load(model, device=device)
    leads = os.environ.get("RANK", "0") == "0"
    with resumable(out), TrainingBar(recipe.total_steps, quiet=not leads) as bar:
        student = distill(
            loaded,
            data,
            out=out,
            name=name,
            sampler=sampler,
            checkpoint_every=checkpoint_every,
            validate_every=validate_every,
            validation_seeds=validation_seeds,
            report=bar.report,
            resumed=bar.resumed,
            **settings,
        )
    budgets = ", ".join(student.card.auto)
    if leads:
        told = f"{out}: a model folder for {budgets} evaluations; "
        print(clean(f"{told}try: fewstep sample {out} --nfe 2"))
