"""fewstep evaluate."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from fewstep.cli.app import app
from fewstep.cli.options import MACHINE, Take, command, option
from fewstep.cli.work import AsJson, command_line, resumable
from fewstep.evaluate.settings import Measuring
from fewstep.text import styled


@command(
    app,
    "evaluate",
    Take(Measuring, without=("batch", "device")),
    Take(Measuring, MACHINE, only=("batch", "device")),
)
def evaluate_command(
    images: Annotated[
        Path | None,
        Parameter(help="Pictures: a folder, a .zip, or an .npz with arr_0 or images."),
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
        option("File that an interrupted run goes on from. Default: beside --out."),
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
    how = Measuring(**{name: value for name, value in given.items() if value is not None})

    from fewstep.evaluate.job import open_job
    from fewstep.files import alone, open_folder, write_json
    from fewstep.report.evaluation import evaluation_notes, evaluation_table
    from fewstep.report.terminal import Progress

    for path in (out, save_statistics, state):
        if path is not None:
            open_folder(path.parent)
    job = open_job(images, how, captions, features=save_statistics is not None)
    own = state is None and out is not None
    state = out.with_name(f"{out.name}.state.npz") if own and out is not None else state
    beside = state.with_name(f"reference.{state.name}") if state is not None else None
    with Progress(as_json) as bar, ExitStack() as held:
        if state is not None:
            held.enter_context(resumable(state))
            held.enter_context(alone(state))
        result = job.run(reference, state=state, beside=beside, command=command_line(), report=bar)
    if save_statistics is not None:
        result.save_statistics(save_statistics)
    if out is not None:
        write_json(out, result.record)
    if own:  # a state that the user did not name goes when the result is there
        for path in (state, beside):
            if path is not None:
                path.unlink(missing_ok=True)
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


def _explain(name: str, as_json: bool) -> None:
    from fewstep.evaluate.protocols import get_protocol, protocols
    from fewstep.report.evaluation import protocol_list, protocol_table

    if name == "list":
        Console().print(protocol_list([get_protocol(one) for one in protocols()]))
    elif as_json:
        print(json.dumps(get_protocol(name).to_dict()))
    else:
        Console().print(protocol_table(get_protocol(name)), highlight=False)
