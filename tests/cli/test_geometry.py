"""fewstep geometry."""

from __future__ import annotations

import json

from tests.support.command import command


def test_the_command_writes_what_it_prints(tmp_path):
    given = ("--out", tmp_path, "--seeds", "0-1", "--points", 5, "--no-plots", "--json")
    ran = command("geometry", *given)
    assert ran.exit_code == 0, ran.stderr
    numbers = json.loads(ran.stdout)
    assert numbers["protocol"]["command"].startswith("fewstep geometry --out")
    assert numbers["x"]["cumulative_share"]["1"]["mean"] > 0.99
    assert numbers == json.loads((tmp_path / "geometry.json").read_text())
