"""fewstep distill: a network that samples in 1 to 8 evaluations, from one that needs more."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import app
from fewstep.cli.options import DeviceOption, ModelArgument, resumable

distill_app = typer.Typer(help="Distil networks into few-step ones.", no_args_is_help=True)
app.add_typer(distill_app, name="distill")


@distill_app.command("splam")
def distill_splam_command(
    model: ModelArgument,
    data: Annotated[
        Path, typer.Option(help="Folder of idx files; or a folder, .zip, .npz or .npy of pictures.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and the student.")],
    method: Annotated[
        str, typer.Option(help="splam, or lcm: consistency distillation, gamma = 1 throughout.")
    ] = "splam",
    points: Annotated[
        int | None, typer.Option(help="Levels of the training grid. \\[default: 10]", min=2)
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            help="Its kind: time-uniform, karras, log-snr, and by the network's own t discrete, "
            "trailing. \\[default: time-uniform]"
        ),
    ] = None,
    teacher: Annotated[
        str, typer.Option(help="A solver's name, a plan's JSON file, or a learned solver's folder.")
    ] = "unipc-2",
    substeps: Annotated[
        int | None,
        typer.Option(help="Steps of the teacher on one sub-path. \\[default: 2]", min=1),
    ] = None,
    guidance: Annotated[
        str | None,
        typer.Option(help="The teacher's guidance scale; LOW,HIGH draws it and tells the student."),
    ] = None,
    gamma_one: Annotated[
        float | None,
        typer.Option(help="Share of draws with gamma = 1, as at inference. \\[default: 0.5]"),
    ] = None,
    tell: Annotated[
        str | None,
        typer.Option(
            help="What tells the student its place on the line: gamma, or the level there. "
            "\\[default: level]"
        ),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="What that level is, linear or variance. \\[default: linear; variance with gamma]"
        ),
    ] = None,
    loss: Annotated[str, typer.Option(help="huber or l2.")] = "huber",
    pictures: Annotated[int, typer.Option(help="Length of the run in pictures.")] = 500_000,
    batch: Annotated[int, typer.Option(help="Pictures per step, over all processes.")] = 128,
    accumulate: Annotated[
        int, typer.Option(help="Parts that a process takes its share of a batch in.", min=1)
    ] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 3e-4,
    warmup: Annotated[
        float, typer.Option(help="First share of the run, over which it rises.")
    ] = 0.05,
    cooldown: Annotated[
        float, typer.Option(help="Last share of the run, over which it falls to 0.")
    ] = 0.3,
    label_dropout: Annotated[
        float | None,
        typer.Option(help="Share of pictures shown without class. \\[default: 0.5]"),
    ] = None,
    target_decay: Annotated[
        float, typer.Option(help="Decay of the average that gives the target.")
    ] = 0.95,
    clip: Annotated[float, typer.Option(help="Largest norm of a gradient.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Decides data order and noise.")] = 0,
    name: Annotated[str | None, typer.Option(help="The student's name in its card.")] = None,
    sampler: Annotated[
        str, typer.Option(help="For its card: consistency (fresh noise) or consistency-ode.")
    ] = "consistency",
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 100,
    validate_every: Annotated[int, typer.Option(help="Steps between validations.", min=1)] = 500,
    validation_seeds: Annotated[
        int, typer.Option(help="Pictures compared with the teacher's; 0 for none.", min=0)
    ] = 250,
    device: DeviceOption = "cpu",
    dtype: Annotated[str, typer.Option(help="Arithmetic: bfloat16 or float32.")] = "bfloat16",
    compile: Annotated[
        bool, typer.Option("--compile", help="torch.compile the passes: for long runs.")
    ] = False,
) -> None:
    """Distil by sub-path linear approximation (SPLAM), on pictures.

    Resumes, exactly, from the checkpoint in the output folder; ends with a model folder that every
    command takes. `torchrun --nproc-per-node 2 -m fewstep distill splam ...` shares the work among
    processes.
    """
    from fewstep.distillation import Recipe, distill
    from fewstep.models import load
    from fewstep.report import terminal as show

    recipe = Recipe(
        method=method,
        points=points,
        grid=grid,
        teacher=teacher,
        substeps=substeps,
        guidance=parse_guidance(guidance),
        gamma_one=gamma_one,
        tell=tell,
        rule=rule,
        loss=loss,
        pictures=pictures,
        batch=batch,
        accumulate=accumulate,
        lr=lr,
        warmup=warmup,
        cooldown=cooldown,
        label_dropout=label_dropout,
        target_decay=target_decay,
        clip=clip,
        dtype=dtype,
        compile=compile,
        seed=seed,
    )
    if device == "cuda":  # under torchrun each process has a device of its own
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    loaded = load(model, device=device)
    leads = os.environ.get("RANK", "0") == "0"
    with resumable(out), show.TrainingBar(recipe.total_steps, quiet=not leads) as bar:
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
            **vars(recipe),
        )
    budgets = ", ".join(student.card.auto)
    if leads:
        print(f"{out}: a model folder for {budgets} evaluations; try: fewstep sample {out} --nfe 2")


def parse_guidance(text: str | None) -> float | tuple[float, float] | None:
    """A scale from "4", or the ends of a range from "2,8"."""
    if text is None:
        return None
    try:
        parts = [float(part) for part in text.split(",")]
    except ValueError:
        parts = []
    if len(parts) not in (1, 2):
        raise ValueError(f"guidance is one scale or two, like 4 or 2,8, got {text!r}")
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])
