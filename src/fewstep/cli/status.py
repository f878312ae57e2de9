"""fewstep status."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from fewstep.cli.app import app
from fewstep.cli.options import command, flag
from fewstep.cli.work import AsJson


@command(app, "status")
def status_command(
    place: Annotated[str, Parameter(help="A folder or URL of shards, or of several jobs.")],
    /,
    *,
    check: Annotated[
        bool, flag("Read every shard and compare its hash, not its size alone.", name="--check")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say which shards are there, which are missing, the rate and the time left.

    It works from any machine that sees the folder, while the shards are being made.
    """
    from fewstep.report.scale import status_table
    from fewstep.scale.phases import read_phase
    from fewstep.scale.status import status_of
    from fewstep.scale.stores import open_store

    found, phase = status_of(place, check=check), read_phase(open_store(place))
    if as_json:
        jobs = [one.to_dict() for one in found]
        print(json.dumps({"phase": asdict(phase) if phase else None, "jobs": jobs}))
        return
    Console().print(status_table(found, phase), highlight=False)
