"""fewstep compare."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter
from rich.console import Console

from fewstep.cli.app import app
from fewstep.cli.options import (
    CHOICE,
    MACHINE,
    SOLVER,
    SPREAD,
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
from fewstep.scale.settings import Scaling
from fewstep.text import styled

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
PUBLISHED = Group("Published protocols", sort_key=7)
SCALING = Take(Scaling, SPREAD)
BATCH = 50
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
        helps={"batch": "Pictures at a time. Default: 50; of --protocol 64, fewer of large ones."},
    ),
    SCALING,
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
    preset: Annotated[
        str | None,
        option(
            "Of a network file of a paper: its published settings. lcm: adapters among the solvers "
            "are an LCM-LoRA.",
            MACHINE,
        ),
    ] = None,
    cache: Annotated[
        Path | None, option("Folder of the reference solves. Default: $FEWSTEP_CACHE.")
    ] = None,
    beside: Annotated[
        Path | None,
        option("An earlier comparison.json of the same protocol whose rows are kept."),
    ] = None,
    published: Annotated[
        str | None,
        Parameter("--protocol"),
        option("A published protocol, as coco-30k: its pictures, seeds and numbers.", PUBLISHED),
    ] = None,
    captions: Annotated[
        Path | None, option("Its captions: csv, tsv, json or jsonl.", PUBLISHED)
    ] = None,
    reference: Annotated[
        Path | None,
        option("What its pictures are compared with, as `fewstep evaluate` takes it.", PUBLISHED),
    ] = None,
    clip: Annotated[str | None, option("CLIP model, for the CLIP score too.", PUBLISHED)] = None,
    keep: Annotated[
        str | None, option("Of its pictures: tar, png or none. Default: none.", PUBLISHED)
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
    from fewstep.evaluate.compare import read_comparison
    from fewstep.evaluate.compare.setup import Setup
    from fewstep.files import alone, open_folder
    from fewstep.report.comparison import write_comparison
    from fewstep.report.terminal import Progress, comparison_table
    from fewstep.scale.compare import compare_by
    from fewstep.scale.executors import open_executor

    spread = Scaling(**SCALING.take(given))
    own = {"--captions": captions, "--reference": reference, "--clip": clip, "--keep": keep}
    if published is not None:
        more = {"captions": captions, "reference": reference, "clip": clip, "keep": keep or "none"}
        other = {"--cache": cache, "--beside": beside, "--prompts": prompts, "--preset": preset}
        refuse_beside("a protocol has settings of its own", other)
        seen = {"features": features, "trust": words(trust, "trust") if trust else ()}
        _published(model, str(out), published, spread, {**more, **seen}, given, as_json)
        return
    refuse_beside("these go with --protocol", own)
    about = {name: given[name] for name in ("label", "guidance", "prompt")}
    if prompts is not None:
        refuse_beside("--prompts has the texts", {"--prompt": given["prompt"]})
        about["prompt"] = read_captions(prompts).texts
    choose_by, how = given["choose_by"], ReferenceSolve(**SOLVE.take(given))
    setup = Setup(
        model,
        {name: given[name] for name in ("device", "dtype", "compile")},
        Design(**ASKED.take(given), **CHOSEN.take(given), **about),
        choose_by,
        out,
        words(features, "features") if features is not None else None,
        words(trust, "trust") if trust else (),
        how,
        cache,
        given["batch"] or BATCH,
        preset,
    )
    earlier = read_comparison(beside) if beside else None
    with Progress(as_json) as bar, open_executor(spread) as executor:
        opened = setup.open(report=bar)
        with resumable(out):
            open_folder(out)
            # the others take part in the work of the one that leads, and write elsewhere
            with alone(out) if executor.leads else nullcontext():
                result = compare_by(
                    executor,
                    setup,
                    opened,
                    earlier,
                    command=command_line(),
                    note=bar.say,
                    report=bar,
                )
                if result is None:
                    return
                files = write_comparison(result, out, plots)
    if as_json:
        print(json.dumps(result.record))
        return
    Console().print(comparison_table(result.record))
    for path in files:
        print(path)


def _published(
    model: str,
    out: str,
    name: str,
    spread: Scaling,
    how: dict[str, Any],
    given: dict[str, Any],
    as_json: bool,
) -> None:
    """Compare by a published protocol.

    Args:
        how: captions, reference, clip and the like, as fields of `Published`
        given: the options that are shared with other comparisons
    """
    from fewstep.report.scale import protocol_numbers
    from fewstep.report.terminal import Progress
    from fewstep.scale.executors import open_executor
    from fewstep.scale.protocol import Published, compare_published, write_record
    from fewstep.scale.shards import Source

    refuse_beside("the captions are the prompts", {"--prompt": given["prompt"]})
    asked = ASKED.take(given)
    source = Source(model, given["device"], given["dtype"], given["compile"])
    about = {name: given[name] for name in ("guidance", "label", "batch")}
    what = Published(source, name, asked["solvers"], asked["budgets"], out, **about, **how)
    with Progress(as_json) as bar, open_executor(spread) as executor:
        with resumable(Path(out)):
            record = compare_published(what, executor, command=command_line(), report=bar)
        if record is None:
            return
        files = write_record(record, out)
    if as_json:
        print(json.dumps(record))
        return
    Console().print(protocol_numbers(record), highlight=False)
    for why in record["left_out"].values():
        Console().print(styled(f"left out: {why}"))
    for path in files:
        print(path)
