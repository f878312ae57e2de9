"""The command line. Every command parses, calls the library, and shows; nothing is computed
here."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["app", "main"]

app = typer.Typer(
    help="Sample pretrained diffusion models in 1 to 10 network evaluations.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train_app = typer.Typer(help="Train networks.", no_args_is_help=True)
app.add_typer(train_app, name="train")

MOST_SEEDS = 1_000_000

ModelArgument = Annotated[str, typer.Argument(help="A built-in model's name, or a model folder.")]
SolverOption = Annotated[
    str, typer.Option(help="auto (the best known), a name, or NAME:option=value.")
]
NfeOption = Annotated[int, typer.Option(help="Network evaluations per picture.", min=1, max=10_000)]
GridOption = Annotated[
    str | None,
    typer.Option(help="karras, log-snr, time-uniform, discrete, trailing, or sigmas: 80,9,1,0.002"),
]
FirstOption = Annotated[
    str | None, typer.Option(help="Analytic first step, at no evaluation: none, zero or mean.")
]
FinalOption = Annotated[bool, typer.Option(help="Add a last denoising step; costs one evaluation.")]
SeedsOption = Annotated[str, typer.Option(help="Seeds, one per picture: 0-63 or 1,5,7-9.")]
DeviceOption = Annotated[str, typer.Option(help="A torch device: cpu, cuda, cuda:1.")]
DtypeOption = Annotated[
    str, typer.Option(help="The network's arithmetic: float32, bfloat16, float16.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def parse_seeds(text: str) -> list[int]:
    """Seeds from "0-63" or "1,5,7-9", in that order, each once. Errors: ValueError that shows the
    form."""
    seeds: dict[int, None] = {}
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise ValueError(f"seeds are written like 0-63 or 1,5,7-9, got {text!r}")
        first, last = int(low), int(high or low)
        if last < first or last >= 2**63:
            raise ValueError(f"seeds must rise and stay below 2^63, got {part.strip()!r}")
        if last - first >= MOST_SEEDS or len(seeds) >= MOST_SEEDS:
            raise ValueError(f"at most {MOST_SEEDS} seeds at a time, got {text!r}")
        seeds.update(dict.fromkeys(range(first, last + 1)))
    return list(seeds)


def parse_grid(text: str | None) -> str | list[float] | None:
    """A grid's name as it is, or sigmas from "80,9,1"."""
    if text is None or not text[:1].isdigit():
        return text
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"a grid is a name or sigmas like 80,9,1,0.002, got {text!r}") from None


def parse_widths(text: str) -> tuple[int, ...]:
    """Channel counts from "64,128"."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"widths are written like 64,128, got {text!r}") from None


def progress_bar(quiet: bool) -> Progress:
    """A bar on standard error, so that standard output stays clean."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet or not sys.stderr.isatty(),
    )


@app.command("sample")
def sample_command(
    model: ModelArgument = "fashion-mnist",
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("samples"),
    solver: SolverOption = "auto",
    nfe: NfeOption = 5,
    seeds: SeedsOption = "0-15",
    label: Annotated[
        str | None, typer.Option(help="Class name or index; a comma list goes round the seeds.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance scale; needs --label.")
    ] = None,
    grid: GridOption = None,
    first: FirstOption = None,
    final: FinalOption = False,
    head_start: Annotated[
        float | None,
        typer.Option(help="Carry the noise analytically to this sigma before the first step."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures at a time.", min=1)] = 64,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    compile: Annotated[
        bool, typer.Option("--compile", help="torch.compile the network: for many pictures.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Sample pictures: one PNG per seed, and a contact sheet.

    Pictures that are there already, made with the same settings, are kept and skipped; with other
    settings, nothing is touched and the command says so.
    """
    from fewstep.folder import sample_to_folder
    from fewstep.models import load

    chosen = parse_seeds(seeds)
    names = label.split(",") if label is not None else None
    loaded = load(model, device=device, dtype=dtype, compile=compile)
    begun = time.perf_counter()
    with progress_bar(as_json) as bar:
        task = bar.add_task("sampling", total=len(chosen))
        result = sample_to_folder(
            loaded,
            out,
            seeds=chosen,
            labels=[names[i % len(names)] for i in range(len(chosen))] if names else None,
            solver=solver,
            nfe=nfe,
            grid=parse_grid(grid),
            first=first,
            final=final,
            guidance=guidance,
            head_start=head_start,
            batch=batch,
            report=lambda done: bar.update(task, completed=done),
        )
    seconds = time.perf_counter() - begun
    if as_json:
        print(json.dumps({**result.to_dict(), "seconds": round(seconds, 3)}))
        return
    how = result.settings
    kept = f", {result.skipped} were there already" if result.skipped else ""
    made = len(chosen) - result.skipped
    print(
        f"{made} pictures{kept}: {how['solver']} on the {how['grid']} grid, first={how['first']}, "
        f"{how['nfe']} evaluations each ({result.network_calls} network calls), {seconds:.2f} s"
    )
    print(f"{result.sheet}")


@app.command("plan")
def plan_command(
    solver: Annotated[str | None, typer.Argument(help="A solver's name.")] = None,
    nfe: NfeOption = 5,
    grid: GridOption = None,
    sigma_max: Annotated[float, typer.Option(help="The first noise level.")] = 80.0,
    sigma_min: Annotated[float, typer.Option(help="The last noise level.")] = 0.002,
    first: FirstOption = None,
    final: FinalOption = False,
    list_all: Annotated[bool, typer.Option("--list", help="List every solver.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show every coefficient of a solver as a table; --list names all solvers."""
    from fewstep import show
    from fewstep.grid import check_grid, make_grid
    from fewstep.solver import get, intervals_for

    console = Console()
    if list_all or solver is None:
        console.print(show.solver_table())
        return
    found, first = get(solver), first or "none"
    levels = parse_grid(grid)
    if levels is None or isinstance(levels, str):
        points = 1 + intervals_for(found, nfe, first, final)
        sigmas = make_grid(levels or "karras", points, sigma_max, sigma_min)
    else:
        sigmas = check_grid(levels)
    plan = found.plan(sigmas, first, final, grid=levels if isinstance(levels, str) else "custom")
    if as_json:
        print(plan.to_json())
        return
    console.print(show.plan_table(plan))
    console.print(show.weights_line(plan))


@app.command("models")
def models_command(
    name: Annotated[str | None, typer.Argument(help="Show one model's whole card.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the built-in models, or show one card."""
    from fewstep.models import builtin, read_card

    cards = [read_card(one) for one in ([name] if name else builtin())]
    if name or as_json:
        values = [card.to_dict() for card in cards]
        print(json.dumps(values[0] if name else values, indent=2))
        return
    table = Table("model", "what it is", "pictures", "classes", "sigma", box=None)
    for card in cards:
        size, channels = (card.network.get(key, "?") for key in ("size", "channels"))
        pictures = f"{size}x{size}x{channels}"
        span = f"{card.sigma_min:g} to {card.sigma_max:g}"
        table.add_row(card.name, card.summary, pictures, ", ".join(card.classes), span)
    Console().print(table)


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
    from fewstep import show
    from fewstep.models.data import load_idx_folder
    from fewstep.models.training import Recipe, check_names, export_network, train_network
    from fewstep.models.unet import UNetConfig

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
    with show.TrainingBar(recipe.total_steps) as bar:
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
        )
    card = export_network(net, recipe, images, labels, out, name=name, classes=names)
    print(f"{out}: a model folder, weights {card.weights_sha256[:16]}; try: fewstep sample {out}")


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the report.")] = Path(
        "demo"
    ),
    model: Annotated[
        str, typer.Option(help="A built-in model's name, or a model folder.")
    ] = "fashion-mnist",
    nfe: NfeOption = 5,
    seeds: SeedsOption = "0-11",
) -> None:
    """Every solver on the same seeds beside the exact solution: a table, a picture, a report."""
    from fewstep.demo import run_demo
    from fewstep.demo_report import render_table

    chosen = parse_seeds(seeds)
    with progress_bar(False) as bar:
        task = bar.add_task("starting", total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        command = f"fewstep demo --out {out} --model {model} --nfe {nfe} --seeds {seeds}"
        result = run_demo(model, out, nfe=nfe, seeds=chosen, command=command, report=report)
    Console().print(render_table(result))
    for path in result.files:
        print(path)


def main() -> Any:
    """Run the command line; what a user can mend is one line and exit code 2."""
    try:
        app()
    except KeyboardInterrupt:
        print("fewstep: stopped; what was finished is kept", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ArithmeticError) as error:
        if os.environ.get("FEWSTEP_DEBUG"):
            raise
        message = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {error.strerror}"
        print(f"fewstep: {message}", file=sys.stderr)
        sys.exit(2)
