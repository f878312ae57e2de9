"""fewstep train solver."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from fewstep.cli.app import train_app
from fewstep.cli.options import (
    AfsOption,
    DeviceOption,
    ModelArgument,
    NfeOption,
    parse_grid,
    refuse_beside,
    resumable,
)

if TYPE_CHECKING:
    from fewstep.denoiser import Denoiser
    from fewstep.learned import Progress as Batch
    from fewstep.models import Model


@train_app.command("solver")
def train_solver_command(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and the solver.")],
    method: Annotated[str, typer.Option(help="tuned, amed, amed-plugin or grid.")] = "tuned",
    base: Annotated[
        str | None,
        typer.Option(
            help="The solver that is improved on. \\[default: ipndm-4 for amed-plugin; else "
            "dpmpp-2m on pipelines, ipndm-3 elsewhere, ipndm-2 up to 3 evaluations]"
        ),
    ] = None,
    nfe: NfeOption = 5,
    trajectories: Annotated[int, typer.Option(help="Length of the run in pictures.")] = 10_000,
    batch: Annotated[int, typer.Option(help="Pictures at a time.")] = 128,
    grid: Annotated[
        str | None,
        typer.Option(
            help="A grid's name, sigmas like 80,9,1,0.002, or search: have it found. "
            "\\[default: search for tuned and grid, time-uniform for amed, karras for amed-plugin; "
            "on pipelines trailing and discrete]"
        ),
    ] = None,
    sigma_min: Annotated[
        float | None, typer.Option(help="The grid's lowest level. \\[default: the network's]")
    ] = None,
    afs: AfsOption = None,
    end: Annotated[
        str | None,
        typer.Option(
            help="Where a named grid ends: sigma_min, or zero, for tuned and grid. "
            "\\[default: zero for these on pipelines, else sigma_min]"
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="A deterministic solver's name. \\[default: deis-3; for tuned deis-4]",
        ),
    ] = None,
    inner: Annotated[
        int | None,
        typer.Option(
            help="Points that it adds inside each interval, for tuned on its whole way. "
            "\\[default: 2; for tuned 30]"
        ),
    ] = None,
    scale_dir: Annotated[
        float | None, typer.Option(help="How far c may be from 1. \\[default: 0.01]")
    ] = None,
    scale_time: Annotated[
        float | None, typer.Option(help="How far a may be from 1. \\[default: 0]")
    ] = None,
    features: Annotated[
        bool | None,
        typer.Option(
            "--features/--no-features",
            help="Read the network's features; without, the solver is a table of numbers. "
            "\\[default: where there are any]",
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(help="Class name or index; a comma list goes round the seeds; all draws one."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A csv, tsv, json or jsonl with a column prompt or caption; each picture draws "
            "one, and every tenth is for validation alone."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="One text for all pictures instead.")] = None,
    negative: Annotated[
        str | None, typer.Option(help="Text that guidance leads away from.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance scale; needs a condition.")
    ] = None,
    loss: Annotated[
        str,
        typer.Option(help="Where tuned and grid compare ends: pixels, fashion-a or fashion-b."),
    ] = "pixels",
    parts: Annotated[
        str | None, typer.Option(help="What of tuned learns. \\[default: times,told,weights]")
    ] = None,
    squared: Annotated[
        bool | None,
        typer.Option("--squared", help="tuned's loss is the squared distance, not the distance."),
    ] = None,
    shift: Annotated[
        float | None,
        typer.Option(
            help="tuned: weight of the shift that all ends share. "
            "\\[default: 2 in features, else 0]",
            min=0,
        ),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of Adam. \\[default: 0.005; for tuned 0.02]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides first weights and noise.", min=0)] = 0,
    validation_seeds: Annotated[
        int, typer.Option(help="Pictures compared with fine solves.", min=1)
    ] = 64,
    checkpoint_every: Annotated[int, typer.Option(help="Batches between checkpoints.", min=1)] = 5,
    validate_every: Annotated[int, typer.Option(help="Batches between validations.", min=1)] = 10,
    device: DeviceOption = "cpu",
    dtype: Annotated[
        str, typer.Option(help="The network's arithmetic: bfloat16, float32, float16.")
    ] = "bfloat16",
    checkpointed: Annotated[
        bool,
        typer.Option(
            "--checkpointed/--not-checkpointed",
            help="tuned's gradients in the memory of one call, for half more of its time.",
        ),
    ] = True,
    compile: Annotated[
        bool, typer.Option("--compile", help="torch.compile the network: for long runs.")
    ] = False,
) -> None:
    """Train a solver for one model and one budget; no data are needed.

    Resumes, exactly, from the checkpoint in the output folder; ends with a folder that every
    command takes as --solver.
    """
    from fewstep.cache import cache_folder
    from fewstep.data.captions import read_captions
    from fewstep.learned import prompted, train
    from fewstep.loop import starts_at
    from fewstep.models import load

    if prompts is not None:
        refuse_beside("the prompts are in the file", {"--prompt": prompt})
    if prompt is None and prompts is None:
        refuse_beside(
            "there is no --prompts or --prompt to lead away from", {"--negative": negative}
        )
    else:
        refuse_beside("models that take text have no classes", {"--label": label})
    captions = None if prompts is None else read_captions(prompts)
    loaded = load(model, device=device, dtype=dtype, compile=compile)
    options = {"scale_dir": scale_dir, "scale_time": scale_time, "features": features}
    options |= {"squared": squared, "shift": shift}
    options["parts"] = None if parts is None else tuple(part.strip() for part in parts.split(","))
    network = None
    if loss != "pixels":
        from fewstep.networks.features import Clamped, load_feature_network

        network = Clamped(load_feature_network(loss, device))
    about = {
        "name": loaded.card.name,
        "weights": loaded.card.weights_sha256,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "label": label,
        "prompt": prompt,
        "guidance": guidance,
    }
    if captions is not None:
        about["prompts"] = captions.digest
    texts = captions.texts if captions else () if prompt is None else (prompt,)
    if texts:
        conditions = prompted(loaded, texts, negative=negative, guidance=guidance)
    else:
        conditions = _labelled(loaded, label, guidance)
    if negative is not None:
        about["negative"] = negative
    levels = parse_grid(grid)
    if method in ("tuned", "grid") and afs is None:
        top = not isinstance(levels, list) or starts_at(levels[0], loaded.card.sigma_max)
        known = getattr(conditions([0]), "far_mean", None) is not None
        afs = "mean" if known and top else "none"
    with resumable(out), SolverBar() as bar:
        solver = train(
            conditions([0]),
            loaded.shape,
            method=method,
            base=base,
            nfe=nfe,
            trajectories=trajectories,
            batch=batch,
            grid=levels,
            sigma_min=sigma_min,
            afs=afs,
            end=end,
            teacher=teacher,
            inner=inner,
            lr=lr,
            seed=seed,
            conditions=conditions,
            prior=loaded.prior,
            device=loaded.prior([0]).device,
            model=about,
            loss_features=network,
            cache=cache_folder() if about["weights"] else None,
            validation=validation_seeds,
            checkpoint_every=checkpoint_every,
            validate_every=validate_every,
            checkpointed=checkpointed,
            out=out,
            report=bar.report,
            note=bar.note,
            **{name: value for name, value in options.items() if value is not None},
        )
    found = solver.validation
    searched = solver.training["grid"] == "search"
    before = "untrained, on the best named grid" if searched else "untrained"
    named = out if len(out.parts) > 1 else f"./{out}"  # a bare name may be a solver's
    print(
        f"{out}: {solver.program().name}, {solver.nfe} evaluations, error {found['error']:.4f} to "
        f"fine solves of {validation_seeds} validation seeds ({before}: "
        f"{found['error_untrained']:.4f}); try: fewstep sample {model} --solver {named}"
        + (f" --prompt {shlex.quote(texts[0])}" if texts else "")
        + (f" --guidance {guidance:g}" if texts and guidance is not None else "")
    )


def _labelled(
    model: Model, label: str | None, guidance: float | None
) -> Callable[[Sequence[int]], Denoiser]:
    """From seeds to the denoiser bound to their labels."""
    from fewstep.noise import key

    if label is None:
        denoiser = model.denoiser(None, None, guidance)
        return lambda seeds: denoiser
    names = [one.strip() for one in label.split(",")]
    if label == "all":
        count = len(model.card.classes)

        def chosen(seed: int) -> Any:
            return key(seed, "label") % count
    else:

        def chosen(seed: int) -> Any:
            return names[seed % len(names)]

    return lambda seeds: model.denoiser([chosen(seed) for seed in seeds], None, guidance)


class SolverBar:
    """A progress bar with the loss and the learned numbers; a line per validation. Lines only
    without a terminal."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[told]}", table_column=Column(ratio=1, no_wrap=True)),
            console=self.console,
            disable=not sys.stderr.isatty(),
            expand=True,
        )
        self.task = self.bar.add_task("training", total=None, told="")

    def __enter__(self) -> SolverBar:
        self.bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bar.stop()

    def report(self, batch: Batch) -> None:
        """Show one batch."""
        learned = "  ".join(f"{name} {value:.3f}" for name, value in batch.learned.items())
        loss = f"loss {batch.loss:.3g}  {learned}"
        done, total = batch.step, batch.total_steps
        self.bar.update(self.task, total=total, completed=done, description="training", told=loss)
        if batch.validation:
            found = "  ".join(f"{name} {value:.4f}" for name, value in batch.validation.items())
            text = f"batch {done}/{total}  {batch.seconds_left:.0f} s left  {found}  {loss}"
            self.console.print(text, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Say what begins now."""
        self.bar.update(self.task, description=text)
        if self.bar.disable:
            self.console.print(text, highlight=False, soft_wrap=True)
