"""fewstep geometry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from fewstep.cli.app import app
from fewstep.cli.options import (
    MACHINE,
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
from fewstep.cli.parsing import parse_grid, parse_seeds
from fewstep.cli.work import AsJson, command_line, resumable
from fewstep.scale.settings import Scaling

SCALING = Take(Scaling, SPREAD)


@command(
    app,
    "geometry",
    Take(Condition, TEXT),
    Take(
        Machine,
        MACHINE,
        only=("device", "dtype", "batch"),
        helps={"batch": "Trajectories at a time. Default: as memory allows."},
    ),
    SCALING,
)
def geometry_command(
    model: ModelArgument = "fashion-mnist",
    /,
    *,
    out: Annotated[Path, option("Folder for numbers, picture and report.")] = Path("geometry"),
    seeds: Annotated[str, option("Seeds, one per trajectory: 0-63 or 1,5,7-9.")] = "0-63",
    points: Annotated[int, option("Points of a trajectory.", least=4)] = 50,
    solver: Annotated[str, option("Solver of the ODE.")] = "exp-adams-4",
    grid: Annotated[
        str, option("karras, log-snr, time-uniform, ..., or sigmas: 80,9,1,0.002.")
    ] = "karras",
    plots: Annotated[bool, flag("Leave out PNG, SVG and HTML.", off="--no-plots")] = True,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Measure how nearly sampling trajectories lie in a plane, the observation behind AMED.

    Resumes a run that was cut short; seeds may be added to one that was not.
    """
    from fewstep.evaluate.geometry import run_geometry
    from fewstep.files import opened
    from fewstep.report.geometry import write_geometry
    from fewstep.report.terminal import Progress, geometry_table
    from fewstep.scale.executors import open_executor
    from fewstep.scale.geometry import GeometryWork, shared
    from fewstep.scale.shards import Source

    chosen, levels = parse_seeds(seeds), parse_grid(grid) or "karras"
    spread = Scaling(**SCALING.take(given))
    source = Source(model, **{name: given.pop(name) for name in ("device", "dtype")})
    with Progress(as_json) as bar, open_executor(spread) as executor:
        if not executor.leads:
            executor.serve(GeometryWork(source))
            return
        loaded = source.load(executor.here)
        with resumable(out), opened(out):
            result = run_geometry(
                loaded,
                out,
                seeds=chosen,
                points=points,
                solver=solver,
                grid=levels,
                command=command_line(),
                by=shared(executor, source) if spread.shares else None,
                report=bar,
                **given,
            )
            result = write_geometry(result, out) if plots else result
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    Console().print(geometry_table(result))
    for path in result.files:
        print(path)
