"""fewstep plan."""

from __future__ import annotations

import json
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from fewstep.cli.app import app
from fewstep.cli.options import SOLVER, Take, command, flag, option
from fewstep.cli.parsing import refuse_beside
from fewstep.cli.work import AsJson
from fewstep.sampling.settings import Settings


@command(app, "plan", Take(Settings, SOLVER, only=("nfe", "grid", "afs", "final", "end")))
def plan_command(
    solver: Annotated[
        str | None,
        Parameter(
            help="A solver's name, a learned solver's folder, or auto where there is a --model."
        ),
    ] = None,
    /,
    *,
    model: Annotated[
        str | None, option("Take the range, and what auto stands for, from this model.")
    ] = None,
    sigma_max: Annotated[
        float | None, option("The first noise level; the model's, or 80.", group=SOLVER)
    ] = None,
    sigma_min: Annotated[
        float | None, option("The last noise level; the model's, or 0.002.", group=SOLVER)
    ] = None,
    list_all: Annotated[bool, flag("List every solver.", "--list")] = False,
    sigmas: Annotated[
        bool, flag("Print only the levels at which the network is evaluated, and the end.")
    ] = False,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Show every coefficient of a solver as a table; --list names all solvers."""
    from fewstep.plan import levels as levels_of
    from fewstep.report import terminal as show
    from fewstep.sampling.choose import plan_for

    console = Console()
    if list_all or solver is None:
        if as_json:
            print(json.dumps(show.solver_list(), indent=2))
        else:
            console.print(show.solver_table())
        return
    if given["grid"] is not None and not isinstance(given["grid"], str):
        others = {"--nfe": given["nfe"], "--sigma-max": sigma_max, "--sigma-min": sigma_min}
        others["--end"] = given["end"]
        refuse_beside("the sigmas decide what is spent, and both ends", others)
    loaded = None
    if model is not None:
        from fewstep.models import load

        loaded = load(model)
    settings = Settings(solver, **given)
    plan = plan_for(settings, loaded, sigma_min=sigma_min, sigma_max=sigma_max)
    if sigmas:
        numbers = [repr(sigma) for sigma in levels_of(plan.ops)]
        print(f"[{', '.join(numbers)}]" if as_json else ",".join(numbers))
        return
    if as_json:
        print(plan.to_json())
        return
    console.print(show.plan_table(plan))
    console.print(show.weights_line(plan))
