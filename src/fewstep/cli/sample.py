"""fewstep sample, plan, models."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fewstep.cli.app import app
from fewstep.cli.options import (
    DeviceOption,
    DtypeOption,
    EndOption,
    FinalOption,
    FirstOption,
    GridOption,
    JsonOption,
    ModelArgument,
    NfeOption,
    SeedsOption,
    SolverOption,
    parse_grid,
    parse_seeds,
    progress_bar,
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
    end: EndOption = None,
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
            end=end,
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
    end: EndOption = None,
    list_all: Annotated[bool, typer.Option("--list", help="List every solver.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show every coefficient of a solver as a table; --list names all solvers."""
    from fewstep import show
    from fewstep.grid import check_grid, make_grid
    from fewstep.solver import end_at, get, intervals_for

    console = Console()
    if list_all or solver is None:
        console.print(show.solver_table())
        return
    found, first, stop = get(solver), first or "none", end or "sigma_min"
    levels = parse_grid(grid)
    if levels is None or isinstance(levels, str):
        points = 1 + intervals_for(found, nfe, first, final, stop)
        sigmas = make_grid("karras" if levels is None else levels, points, sigma_max, sigma_min)
        sigmas = end_at(sigmas, stop)
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
