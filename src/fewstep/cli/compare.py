"""fewstep compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from fewstep.cli.app import app
from fewstep.cli.options import MACHINE, TEXT, Machine, ModelArgument, Take, command, flag, option
from fewstep.cli.parsing import parse_budgets, parse_seeds, words
from fewstep.cli.work import AsJson, command_line, resumable

SOLVERS = "ddim,heun,dpm-solver-2,dpmpp-2m,unipc-2,deis-2,ipndm-2,ipndm-3,auto"


@command(
    app,
    "compare",
    Take(
        Machine,
        MACHINE,
        only=("device", "dtype", "compile", "batch"),
        defaults={"batch": 50},
        helps={"batch": "Pictures at a time."},
    ),
)
def compare_command(
    model: ModelArgument = "fashion-mnist",
    /,
    *,
    solvers: Annotated[
        str,
        option("Names, folders of learned solvers, students of the model; commas between."),
    ] = SOLVERS,
    nfe: Annotated[str, option("Budgets: 3,5,7 or 3-8.")] = "3,5,7",
    seeds: Annotated[str, option("Test seeds: 0-4999.")] = "0-499",
    out: Annotated[Path, option("Folder for the report and what it rests on.")] = Path(
        "comparison"
    ),
    features: Annotated[
        str | None,
        option("Feature networks, with commas; none: errors only. The model's own if left out."),
    ] = None,
    choose_by: Annotated[
        str | None,
        option("What settings are chosen by: error, or a feature network's name."),
    ] = None,
    screen: Annotated[
        int,
        option("Validation seeds that choose each setting; 0: the usual settings."),
    ] = 1000,
    grids: Annotated[
        str | None, option("Grids that are tried; all that the model has if left out.")
    ] = None,
    afs: Annotated[str, option("Analytic first steps that are tried.")] = ("none,zero,mean"),
    ends: Annotated[str, option("Ends that are tried.")] = "sigma_min,zero",
    population: Annotated[
        int, option("Reference solves that make the target distribution.", least=10)
    ] = 10_000,
    reference_nfe: Annotated[int, option("Evaluations of a reference solve.", least=8)] = 40,
    label: Annotated[str | None, option("Class name or index, for all.", group=TEXT)] = None,
    prompt: Annotated[str | None, option("Text, for models that take one.", group=TEXT)] = None,
    guidance: Annotated[
        float | None, option("Guidance scale; needs a prompt or a label.", group=TEXT)
    ] = None,
    cache: Annotated[
        Path | None,
        option("Folder of the reference solves; $FEWSTEP_CACHE if left out."),
    ] = None,
    beside: Annotated[
        Path | None,
        option("An earlier comparison.json of the same protocol whose rows are kept."),
    ] = None,
    plots: Annotated[bool, flag("Leave the curves out of the report.", off="--no-plots")] = True,
    as_json: AsJson = False,
    **machine: Any,
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

    batch = machine.pop("batch")
    budgets, test_seeds = parse_budgets(nfe), tuple(parse_seeds(seeds))
    earlier = read_comparison(beside) if beside else None
    loaded = load(model, **machine)
    exact = (
        load(model, **{**machine, "dtype": "float32"}) if machine["dtype"] != "float32" else loaded
    )
    names = own_features(loaded.card.name) if features is None else words(features, "features")
    judges = [resolve_features(name, machine["device"]) for name in names if name != "none"]
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
    students = load_students(loaded, design.solvers, **machine)
    check_solvers(loaded, design, students)
    check_writable(out)
    references = References(exact, Fine(nfe=reference_nfe), label, guidance, cache, batch, prompt)
    with resumable(out), Progress(as_json) as bar:
        bench = Workbench(loaded, references, out, batch, bar, students)
        if earlier is not None:  # now, and not after hours of work
            check_protocol(protocol(bench, design, judges), earlier)
        if forecast := bench.forecast(design, judges):
            bar.say(forecast)
        result = compare(bench, design, judges, command=command_line())
        if earlier is not None:
            result = Comparison(merge(result.record, earlier), result.strips)
        files = write_comparison(result, out, plots)
    if as_json:
        print(json.dumps(result.record))
        return
    Console().print(comparison_table(result.record))
    for path in files:
        print(path)
