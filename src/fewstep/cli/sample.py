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
    BudgetOption,
    DeviceOption,
    DtypeOption,
    EndOption,
    FinalOption,
    FirstOption,
    GridOption,
    JsonOption,
    ModelArgument,
    SeedsOption,
    SolverOption,
    parse_grid,
    parse_seeds,
    progress_bar,
    refuse_beside,
    resumable,
)


@app.command("sample")
def sample_command(
    model: ModelArgument = "fashion-mnist",
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("samples"),
    solver: SolverOption = "auto",
    nfe: BudgetOption = None,
    seeds: SeedsOption = "0-15",
    label: Annotated[
        str | None,
        typer.Option(
            help="Class name or index. Several, with commas, are dealt out by position: the first "
            "to the first seed, and round again."
        ),
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
    plan: Annotated[
        Path | None,
        typer.Option(help="A plan, as `fewstep plan --json` prints it, instead of a solver."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures at a time.", min=1)] = 64,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    compile: Annotated[
        bool,
        typer.Option("--compile", metavar="", help="torch.compile the network: for many pictures."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Sample pictures: one PNG per seed, and a contact sheet.

    Pictures that are there already, made with the same settings, are kept and skipped; with other
    settings, nothing is touched and the command says so.
    """
    from fewstep import show
    from fewstep.folder import sample_to_folder
    from fewstep.models import load
    from fewstep.plan import Plan

    chosen = parse_seeds(seeds)
    names = [name.strip() for name in label.split(",")] if label is not None else None
    levels = parse_grid(grid)
    if plan is not None:
        others = {"--nfe": nfe, "--grid": grid, "--first": first, "--final": final, "--end": end}
        others |= {"--solver": solver if solver != "auto" else None}
        refuse_beside("a plan has its own solver, budget and grid", others)
    elif levels is not None and not isinstance(levels, str):
        refuse_beside(
            "the sigmas decide what is spent, and where it ends", {"--nfe": nfe, "--end": end}
        )
    loaded = load(model, device=device, dtype=dtype, compile=compile)
    begun = time.perf_counter()
    with resumable(out), progress_bar(as_json) as bar:
        task = bar.add_task("sampling", total=len(chosen))
        result = sample_to_folder(
            loaded,
            out,
            seeds=chosen,
            labels=[names[i % len(names)] for i in range(len(chosen))] if names else None,
            solver=solver if plan is None else Plan.read(plan),
            nfe=nfe,
            grid=levels,
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
    made, calls = len(chosen) - result.skipped, result.network_calls
    print(show.sampling_line(made, result.skipped, result.settings, label, calls, seconds))
    print(f"{result.sheet}")


@app.command("plan")
def plan_command(
    solver: Annotated[
        str | None,
        typer.Argument(
            help="A solver's name, a learned solver's folder, or auto where there is a --model."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Take the range, and what auto stands for, from this model.")
    ] = None,
    nfe: BudgetOption = None,
    grid: GridOption = None,
    sigma_max: Annotated[
        float | None, typer.Option(help="The first noise level; the model's, or 80.")
    ] = None,
    sigma_min: Annotated[
        float | None, typer.Option(help="The last noise level; the model's, or 0.002.")
    ] = None,
    first: FirstOption = None,
    final: FinalOption = False,
    end: EndOption = None,
    list_all: Annotated[
        bool, typer.Option("--list", metavar="", help="List every solver.")
    ] = False,
    sigmas: Annotated[
        bool,
        typer.Option(
            "--sigmas",
            metavar="",
            help="Print only the levels at which the network is evaluated, and the end.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show every coefficient of a solver as a table; --list names all solvers."""
    from fewstep import show
    from fewstep.plan import levels as levels_of
    from fewstep.sampling import plan_for

    console = Console()
    if list_all or solver is None:
        if as_json:
            print(json.dumps(show.solver_list(), indent=2))
        else:
            console.print(show.solver_table())
        return
    levels = parse_grid(grid)
    if levels is not None and not isinstance(levels, str):
        others = {"--nfe": nfe, "--sigma-max": sigma_max, "--sigma-min": sigma_min, "--end": end}
        refuse_beside("the sigmas decide what is spent, and both ends", others)
    loaded = None
    if model is not None:
        from fewstep.models import load

        loaded = load(model)
    plan = plan_for(
        solver,
        nfe,
        loaded,
        grid=levels,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        first=first,
        final=final,
        end=end,
    )
    if sigmas:
        numbers = [repr(sigma) for sigma in levels_of(plan.ops)]
        print(f"[{', '.join(numbers)}]" if as_json else ",".join(numbers))
        return
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
