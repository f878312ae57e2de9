"""fewstep demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fewstep.cli.app import app
from fewstep.cli.options import (
    NfeOption,
    SeedsOption,
    parse_seeds,
)


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
    from fewstep.evaluate.demo import run_demo
    from fewstep.files import check_writable
    from fewstep.report.demo import write_demo
    from fewstep.report.terminal import Progress, demo_table

    chosen = parse_seeds(seeds)
    check_writable(out)
    with Progress() as report:
        command = f"fewstep demo --out {out} --model {model} --nfe {nfe} --seeds {seeds}"
        result = run_demo(model, nfe=nfe, seeds=chosen, command=command, report=report)
    result = write_demo(result, out)
    Console().print(demo_table(result))
    for path in result.files:
        print(path)
