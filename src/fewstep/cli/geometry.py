"""fewstep geometry."""

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
    SeedsOption,
    parse_grid,
    parse_seeds,
)


@app.command("geometry")
def geometry_command(
    model: ModelArgument = "fashion-mnist",
    out: Annotated[Path, typer.Option(help="Folder for numbers, picture and report.")] = Path(
        "geometry"
    ),
    seeds: SeedsOption = "0-63",
    points: Annotated[int, typer.Option(help="Points of a trajectory.", min=4, max=10_000)] = 50,
    solver: Annotated[str, typer.Option(help="Solver of the ODE.")] = "exp-adams-4",
    grid: Annotated[
        str, typer.Option(help="karras, log-snr, time-uniform, ..., or sigmas: 80,9,1,0.002")
    ] = "karras",
    label: Annotated[str | None, typer.Option(help="Class name or index, for all seeds.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text, for models that take one.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Trajectories at a time; left out, by memory.", min=1)
    ] = None,
    plots: Annotated[
        bool, typer.Option("--plots/--no-plots", help="PNG, SVG and HTML too.")
    ] = True,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """Measure how nearly sampling trajectories lie in a plane, the observation behind AMED.

    Resumes a run that was cut short; seeds may be added to one that was not.
    """
    from fewstep.evaluate.geometry import run_geometry
    from fewstep.models import load
    from fewstep.report.geometry import write_geometry
    from fewstep.report.terminal import Progress, geometry_table

    chosen = parse_seeds(seeds)
    with Progress(as_json) as report:
        result = run_geometry(
            load(model, device=device, dtype=dtype),
            out,
            seeds=chosen,
            points=points,
            solver=solver,
            grid=parse_grid(grid) or "karras",
            label=label,
            prompt=prompt,
            guidance=guidance,
            batch=batch,
            command=shlex.join(["fewstep", *sys.argv[1:]]),
            report=report,
        )
    result = write_geometry(result, out) if plots else result
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    Console().print(geometry_table(result))
    for path in result.files:
        print(path)
