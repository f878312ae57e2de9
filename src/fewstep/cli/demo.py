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
    progress_bar,
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
    from fewstep.report.demo import run_demo
    from fewstep.report.demo_page import render_table

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
