"""fewstep evaluate."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from fewstep.cli.app import app
from fewstep.cli.options import MACHINE, SPREAD, Take, command, option
from fewstep.cli.parsing import refuse_beside
from fewstep.cli.work import AsJson, command_line, resumable
from fewstep.evaluate.settings import Measuring
from fewstep.scale.settings import Scaling
from fewstep.text import styled

if TYPE_CHECKING:
    from fewstep.evaluate.gather import Report
    from fewstep.evaluate.measure import Evaluation
    from fewstep.report.terminal import Progress

SCALING = Take(Scaling, SPREAD)


@command(
    app,
    "evaluate",
    Take(Measuring, without=("batch", "device")),
    Take(Measuring, MACHINE, only=("batch", "device")),
    SCALING,
)
def evaluate_command(
    images: Annotated[
        str | None,
        Parameter(help="Pictures: a folder, a .zip, an .npz with arr_0 or images, or shards."),
    ] = None,
    /,
    *,
    reference: Annotated[
        Path | None,
        option(
            "What to compare with: pictures, an .npz with mu and sigma, or what "
            "--save-statistics wrote. Default: the data set that comes with the features."
        ),
    ] = None,
    captions: Annotated[
        Path | None, option("Captions, one per picture: csv, tsv, json, jsonl.")
    ] = None,
    explain: Annotated[
        str | None, option("Print all about a protocol, or list them all: list.")
    ] = None,
    out: Annotated[Path | None, option("File for the result, JSON.")] = None,
    save_statistics: Annotated[
        Path | None,
        option("File for the pictures' statistics, to be a reference: .npz."),
    ] = None,
    state: Annotated[
        Path | None,
        option(
            "File that an interrupted run goes on from; of several workers a folder. Default: "
            "beside --out."
        ),
    ] = None,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Measure pictures against a reference: Frechet distance (FID), KID, precision and recall,
    CLIP score.

    Every number comes with its error bar, its protocol, and a record of all that it depends on.
    """
    if explain is not None:
        _explain(explain, as_json)
        return
    if images is None:
        raise ValueError("name the pictures to measure: a folder, a .zip or an .npz")
    spread = Scaling(**SCALING.take(given))
    how = Measuring(**{name: value for name, value in given.items() if value is not None})

    from fewstep.files import open_folder, write_json
    from fewstep.report.evaluation import evaluation_notes, evaluation_table
    from fewstep.report.terminal import Progress

    for path in (out, save_statistics, state):
        if path is not None:
            open_folder(path.parent)
    wanted = save_statistics is not None
    with Progress(as_json) as bar:
        if spread.shares:
            result = _by_workers(images, how, spread, reference, captions, out, state, bar)
        else:
            result = _here(images, how, reference, captions, out, state, wanted, bar)
    if result is None:
        return
    if save_statistics is not None:
        result.save_statistics(save_statistics)
    if out is not None:
        write_json(out, result.record)
    if as_json:
        print(json.dumps(result.record))
        return
    console = Console()
    console.print(evaluation_table(result.record), highlight=False)
    for line in evaluation_notes(result.record):
        console.print(styled(line), soft_wrap=True)
    for path in (out, save_statistics):
        if path is not None:
            print(path)


def _here(
    images: str,
    how: Measuring,
    reference: Path | None,
    captions: Path | None,
    out: Path | None,
    state: Path | None,
    wanted: bool,
    bar: Report,
) -> Evaluation:
    """Measure in this process; wanted: whether the statistics are saved."""
    from fewstep.evaluate.job import open_job
    from fewstep.files import alone
    from fewstep.scale.evaluate import evaluate_shards, sampled_features

    shards = sampled_features(images)
    if shards is not None:
        refuse_beside(
            "shards have features of their own", {"--captions": captions, "--state": state}
        )
        line = command_line()
        return evaluate_shards(images, shards, how, reference, command=line, report=bar)
    job = open_job(Path(images), how, captions, features=wanted)
    own = state is None and out is not None
    state = out.with_name(f"{out.name}.state.npz") if own and out is not None else state
    beside = state.with_name(f"reference.{state.name}") if state is not None else None
    with ExitStack() as held:
        if state is not None:
            held.enter_context(resumable(state))
            held.enter_context(alone(state))
        result = job.run(reference, state=state, beside=beside, command=command_line(), report=bar)
    if own:  # a state that the user did not name goes when the result is there
        for path in (state, beside):
            if path is not None:
                path.unlink(missing_ok=True)
    return result


def _by_workers(
    images: str,
    how: Measuring,
    spread: Scaling,
    reference: Path | None,
    captions: Path | None,
    out: Path | None,
    state: Path | None,
    bar: Progress,
) -> Evaluation | None:
    """Measure by several workers; None in a process that does not lead."""
    from fewstep.scale.evaluate import evaluate_parts
    from fewstep.scale.executors import open_executor

    if state is None:
        if out is None:
            raise ValueError("several workers share a folder: name it with --state, or give --out")
        state = out.with_name(f"{out.name}.parts")
    with open_executor(spread) as executor, resumable(state):
        return evaluate_parts(
            images,
            how,
            executor,
            str(state),
            reference,
            captions,
            command=command_line(),
            report=bar,
        )


def _explain(name: str, as_json: bool) -> None:
    from fewstep.evaluate.protocols import get_protocol, protocols
    from fewstep.report.evaluation import protocol_list, protocol_table

    if name == "list":
        Console().print(protocol_list([get_protocol(one) for one in protocols()]))
    elif as_json:
        print(json.dumps(get_protocol(name).to_dict()))
    else:
        Console().print(protocol_table(get_protocol(name)), highlight=False)
