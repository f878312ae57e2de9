"""What tells one run of a solver's training from another, and whether a folder has this one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewstep.files import check_writable
from fewstep.learned.solver import SOLVER_FILE
from fewstep.records import parse
from fewstep.tensors import read_metadata

__all__ = ["CHECKPOINT", "check_folder", "check_same", "facts_in", "plain"]

CHECKPOINT = "checkpoint.safetensors"
FOLLOWING = ("sigmas", "settings", "teacher_nfe")  # tables that differ because something else does


def facts_in(path: Path) -> dict[str, Any]:
    """Of the run that a checkpoint is of. Errors: ValueError where it cannot be read."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; remove it, or give another folder")
    try:
        metadata = read_metadata(path)
        if "run" in metadata and "state" in metadata:
            return parse(metadata["run"])
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it to start again") from None
    raise ValueError(f"{path} is not a checkpoint of a solver's training; give another folder")


def check_same(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Errors: ValueError that names the first few facts in which two runs differ. What follows from
    the others counts where ours are known."""
    theirs, ours = _flat(theirs), _flat(ours)
    keys = [key for key in {**ours, **theirs} if key in ours or key not in FOLLOWING]
    if other := [key for key in keys if theirs.get(key) != ours.get(key)]:
        told = [
            f"{key.rpartition('.')[2]}={theirs.get(key)} (now {ours.get(key)})"
            for key in other
            if key not in FOLLOWING
        ]
        how = ", ".join(told[:3]) or "other sigmas or settings"
        raise ValueError(f"{path} is of a run with {how}; give another folder")


def check_folder(folder: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """All facts of the run that has its checkpoint there, or None.

    Errors: ValueError where it differs in some of these facts, or the folder holds another solver;
    OSError where nothing can be written there.
    """
    check_writable(folder)
    if (folder / CHECKPOINT).exists():
        theirs = facts_in(folder / CHECKPOINT)
        check_same(folder / CHECKPOINT, theirs, facts)
        return theirs
    if (folder / SOLVER_FILE).exists():
        raise ValueError(
            f"{folder} has a {SOLVER_FILE} but no {CHECKPOINT}, so it is another solver; "
            "give another folder"
        )
    return None


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    """What tells one run from another, those of its options and its model beside the others."""
    out = {}
    for name, value in plain(facts).items():
        inner = value if name in ("options", "model") else None
        out |= {name: value} if inner is None else {f"{name}.{k}": v for k, v in inner.items()}
    return out


def plain(value: Any) -> Any:
    """As it is after a way through JSON."""
    return json.loads(json.dumps(value))
