"""fewstep demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.console import Console

from fewstep.cli.app import app
from fewstep.cli.options import command, option
from fewstep.cli.parsing import parse_seeds
from fewstep.cli.work import command_line, tidy


@command(app, "demo")
def demo_command(
    *,
    out: Annotated[Path, option("Folder for the picture and the report.")] = Path("demo"),
    model: Annotated[str, option("A built-in model's name, or a model folder.")] = "fashion-mnist",
    nfe: Annotated[int, option("Network evaluations per picture.", least=1)] = 5,
    seeds: Annotated[str, option("Seeds, one per picture: 0-63 or 1,5,7-9.")] = "0-11",
) -> None:
    """Every solver on the same seeds beside the exact solution: a table, a picture, a report."""
    from fewstep.evaluate.demo import run_demo
    from fewstep.files import open_folder
    from fewstep.report.demo import write_demo
    from fewstep.report.terminal import Progress, demo_table

    chosen = parse_seeds(seeds)
    with tidy(out), Progress() as bar:
        open_folder(out)
        result = run_demo(model, nfe=nfe, seeds=chosen, command=command_line(), report=bar)
        result = write_demo(result, out)
    Console().print(demo_table(result))
    for path in result.files:
        print(path)
