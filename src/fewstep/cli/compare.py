"""fewstep compare."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fewstep.cli.app import app
from fewstep.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    parse_seeds,
    resumable,
)

SOLVERS = "ddim,heun,dpm-solver-2,dpmpp-2m,unipc-2,deis-2,ipndm-2,ipndm-3,auto"


def words(text: str, what: str) -> tuple[str, ...]:
    """Parts between commas, each once. Errors: ValueError where there is none."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise ValueError(f"{what} must name at least one, got {text!r}")
    return found


def parse_budgets(text: str) -> tuple[int, ...]:
    """Budgets from "3,5,7" or "3-8". Errors: ValueError that shows the form."""
    try:
        return tuple(parse_seeds(text))
    except ValueError:
        raise ValueError(f"--nfe is written like 3,5,7 or 3-8, got {text!r}") from None


@app.command("compare")
def compare_command(
    model: ModelArgument = "fashion-mnist",
    solvers: Annotated[
        str,
        typer.Option(
            help="Names, folders of learned solvers, students of the model; commas between."
        ),
    ] = SOLVERS,
    nfe: Annotated[str, typer.Option(help="Budgets: 3,5,7 or 3-8.")] = "3,5,7",
    seeds: Annotated[str, typer.Option(help="Test seeds: 0-4999.")] = "0-499",
    out: Annotated[Path, typer.Option(help="Folder for the report and what it rests on.")] = Path(
        "comparison"
    ),
    features: Annotated[
        str | None,
        typer.Option(
            help="Feature networks, with commas; none: errors only. The model's own if left out."
        ),
    ] = None,
    choose_by: Annotated[
        str | None,
        typer.Option(help="What settings are chosen by: error, or a feature network's name."),
    ] = None,
    screen: Annotated[
        int,
        typer.Option(
            help="Validation seeds that choose each setting; 0: the usual settings.", min=0
        ),
    ] = 1000,
    grids: Annotated[
        str | None, typer.Option(help="Grids that are tried; all that the model has if left out.")
    ] = None,
    afs: Annotated[str, typer.Option(help="Analytic first steps that are tried.")] = (
        "none,zero,mean"
    ),
    ends: Annotated[str, typer.Option(help="Ends that are tried.")] = "sigma_min,zero",
    population: Annotated[
        int, typer.Option(help="Reference solves that make the target distribution.", min=10)
    ] = 10_000,
    reference_nfe: Annotated[
        int, typer.Option(help="Evaluations of a reference solve.", min=8, max=1000)
    ] = 40,
    label: Annotated[str | None, typer.Option(help="Class name or index, for all.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text, for models that take one.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    batch: Annotated[int, typer.Option(help="Pictures at a time.", min=1)] = 50,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder of the reference solves; $FEWSTEP_CACHE if left out."),
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    compile: Annotated[
        bool, typer.Option("--compile", help="torch.compile the network: for many pictures.")
    ] = False,
    beside: Annotated[
        Path | None,
        typer.Option(help="An earlier comparison.json of the same protocol whose rows are kept."),
    ] = None,
    plots: Annotated[
        bool, typer.Option("--plots/--no-plots", help="Figures in the report.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Samplers side by side: errors, distances, time; a table, curves and pictures in one report.

    An interrupted comparison goes on where it stopped.

    What was sampled in the same folder before is not sampled again; --beside keeps its rows.
    """
    from fewstep.evaluate.compare import (
        Comparison,
        Design,
        Workbench,
        check_protocol,
        check_solvers,
        compare,
        load_students,
        merge,
        protocol,
        read_comparison,
    )
    from fewstep.evaluate.features import own_features, resolve_features
    from fewstep.evaluate.references import Fine, References
    from fewstep.files import check_writable
    from fewstep.models import load
    from fewstep.report.comparison import write_comparison
    from fewstep.report.terminal import Progress, comparison_table

    budgets, test_seeds = parse_budgets(nfe), tuple(parse_seeds(seeds))
    earlier = read_comparison(beside) if beside else None
    loaded = load(model, device=device, dtype=dtype, compile=compile)
    exact = load(model, device=device, compile=compile) if dtype != "float32" else loaded
    names = own_features(loaded.card.name) if features is None else words(features, "features")
    judges = [resolve_features(name, device=device) for name in names if name != "none"]
    design = Design(
        solvers=words(solvers, "solvers"),
        budgets=budgets,
        seeds=test_seeds,
        label=label,
        guidance=guidance,
        prompt=prompt,
        grids=words(grids, "grids") if grids is not None else (),
        afs=words(afs, "afs"),
        ends=words(ends, "ends"),
        screen=screen,
        choose_by=choose_by or (judges[0].label if judges else "error"),
        population=population,
    )
    students = load_students(loaded, design.solvers, device=device, dtype=dtype, compile=compile)
    check_solvers(loaded, design, students)
    check_writable(out)
    references = References(exact, Fine(nfe=reference_nfe), label, guidance, cache, batch, prompt)
    command = shlex.join(["fewstep", *sys.argv[1:]])
    with resumable(out), Progress(as_json) as report:
        bench = Workbench(loaded, references, out, batch, report, students)
        if earlier is not None:  # now, and not after hours of work
            check_protocol(protocol(bench, design, judges), earlier)
        if forecast := bench.forecast(design, judges):
            report.say(forecast)
        result = compare(bench, design, judges, command=command)
        if earlier is not None:
            result = Comparison(merge(result.record, earlier), result.strips)
        files = write_comparison(result, out, plots)
    if as_json:
        print(json.dumps(result.record))
        return
    Console().print(comparison_table(result.record))
    for path in files:
        print(path)
