"""fewstep compare."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from fewstep.cli.app import app
from fewstep.cli.options import (
    CHOICE,
    MACHINE,
    SOLVER,
    TEXT,
    Condition,
    Machine,
    ModelArgument,
    Take,
    command,
    flag,
    option,
)
from fewstep.cli.parsing import refuse_beside, words
from fewstep.cli.work import AsJson, command_line, resumable
from fewstep.evaluate.compare.design import Design
from fewstep.reference import ReferenceSolve

SOLVERS = "ddim,heun,dpm-solver-2,dpmpp-2m,unipc-2,deis-2,ipndm-2,ipndm-3,auto"
ASKED = Take(
    Design,
    SOLVER,
    only=("solvers", "budgets", "seeds"),
    defaults={"solvers": SOLVERS, "budgets": "3,5,7", "seeds": "0-499"},
    names={"budgets": "nfe"},
)
CHOSEN = Take(
    Design,
    CHOICE,
    only=("grids", "afs", "ends", "screen", "choose_by", "population"),
    defaults={"choose_by": None},
    helps={
        "choose_by": "What settings are chosen by: error, or a feature network's name. Default: "
        "the first feature network."
    },
)
LABEL = "Class name or index. Several, with commas, take turns by seed; all: each seed draws one."
SOLVE = Take(ReferenceSolve, CHOICE, only=("nfe",), names={"nfe": "reference_nfe"})


@command(
    app,
    "compare",
    ASKED,
    CHOSEN,
    SOLVE,
    Take(Condition, TEXT, helps={"label": LABEL}),
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
    out: Annotated[Path, option("Folder for the report and what it rests on.")] = Path(
        "comparison"
    ),
    features: Annotated[
        str | None,
        option(
            "Feature networks, with commas, as `fewstep evaluate` takes them; none: errors only. "
            "Default: the model's own."
        ),
    ] = None,
    trust: Annotated[
        str | None,
        option("SHA-256 of TorchScript files of --features that may run their code, with commas."),
    ] = None,
    prompts: Annotated[
        Path | None,
        option("Texts of this file, csv, tsv, json or jsonl, which take turns by seed."),
    ] = None,
    cache: Annotated[
        Path | None, option("Folder of the reference solves. Default: $FEWSTEP_CACHE.")
    ] = None,
    beside: Annotated[
        Path | None,
        option("An earlier comparison.json of the same protocol whose rows are kept."),
    ] = None,
    plots: Annotated[bool, flag("Leave the curves out of the report.", off="--no-plots")] = True,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Samplers side by side: errors, distances, time; a table, curves and pictures in one report.

    An interrupted comparison goes on where it stopped.

    What was sampled in the same folder before is not sampled again; --beside keeps its rows.
    """
    from fewstep.data.captions import read_captions
    from fewstep.evaluate.compare import Workbench, check_solvers, load_students, read_comparison
    from fewstep.evaluate.compare.run import compare_beside
    from fewstep.evaluate.features import own_features, resolve_features
    from fewstep.evaluate.references import References
    from fewstep.files import open_folder
    from fewstep.models import load
    from fewstep.report.comparison import write_comparison
    from fewstep.report.terminal import Progress, comparison_table

    about = {name: given[name] for name in ("label", "guidance", "prompt")}
    if prompts is not None:
        refuse_beside("--prompts has the texts", {"--prompt": given["prompt"]})
        about["prompt"] = read_captions(prompts).texts
    choose_by, how = given["choose_by"], ReferenceSolve(**SOLVE.take(given))
    design = Design(**ASKED.take(given), **CHOSEN.take(given), **about)
    batch, machine = given["batch"], {name: given[name] for name in ("device", "dtype", "compile")}
    earlier = read_comparison(beside) if beside else None
    loaded = load(model, **machine)
    exact = loaded
    if machine["dtype"] != "float32":
        exact = load(model, **{**machine, "dtype": "float32"})
    named = own_features(loaded.card.name) if features is None else words(features, "features")
    trusted = words(trust, "trust") if trust else ()
    size = loaded.card.picture or (32, 32, 3)
    judges = [
        resolve_features(one, machine["device"], size, trusted) for one in named if one != "none"
    ]
    if judges and choose_by is None:
        design = replace(design, choose_by=judges[0].label)
    students = load_students(loaded, design.solvers, model, **machine)
    check_solvers(loaded, design, students)
    references = References(exact, how, folder=cache, batch=batch, **about)
    with resumable(out), Progress(as_json) as bar:
        open_folder(out)
        bench = Workbench(loaded, references, out, batch, bar, students)
        result = compare_beside(
            bench, design, judges, earlier, command=command_line(), note=bar.say
        )
        files = write_comparison(result, out, plots)
    if as_json:
        print(json.dumps(result.record))
        return
    Console().print(comparison_table(result.record))
    for path in files:
        print(path)
