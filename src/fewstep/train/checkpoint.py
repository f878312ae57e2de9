"""Checkpoints: a safetensors file with all that a run changes and all that tells it from others.

Everything is checked before a tensor is copied: that the file is whole and of the same kind of
training, that its settings and inputs are those of the run, and names, shapes and dtypes. Headers
are sorted, so that equal states are equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fewstep.files import write_whole
from fewstep.records import parse
from fewstep.tensors import load_tensors, read_metadata
from fewstep.train.run import Identity, Run

__all__ = ["CHECKPOINT", "Head", "check_length", "read_head", "restore", "save"]

CHECKPOINT = "checkpoint.safetensors"
NAMED = 3  # differences in a message
AGAIN = "remove it to start again"
OTHER = "give the same, or another folder"
LOOK = "look."  # before the names of an identity's looks


@dataclass(frozen=True)
class Head:
    """What a checkpoint says of its run, read and checked.

    state: the counters, "step" among them
    """

    kind: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    follows: dict[str, Any]
    state: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        step = self.state.get("step")
        tables = (self.settings, self.inputs, self.follows, self.state)
        if not isinstance(self.kind, str) or not all(isinstance(one, dict) for one in tables):
            raise ValueError("its header has other types")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"its step is {step!r}")


def save(path: Path, run: Run) -> None:
    """Write the state of a run, whole. Raises: OSError that names the file."""
    one = run.identity
    head = Head(one.kind, plain(one.settings), dict(one.inputs), plain(one.follows), run.state)
    tensors = {name: value.detach().contiguous() for name, value in _all(run).items()}
    metadata = {"fewstep": json.dumps(asdict(head))}
    write_whole(path, safetensors.torch.save(tensors, metadata))


def read_head(path: Path, identity: Identity) -> Head:
    """The head of a checkpoint of this very run.

    Raises:
        ValueError: that names the file, where it cannot be read or is of another run. What follows
            from the settings counts where the identity has it.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; remove it, or give another folder")
    text = read_metadata(path, AGAIN).get("fewstep")
    try:
        head = None if text is None else Head(**parse(text, "its header"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {AGAIN}") from None
    if head is None or head.kind != identity.kind:
        raise ValueError(f"{path} is not a checkpoint of {identity.kind}; give another folder")
    _check_same(path, head, identity)
    return head


def restore(path: Path, run: Run, longest: int) -> None:
    """Take up the state in `path`.

    Args:
        longest: the step at which the run ends.

    Raises:
        ValueError: that names the file, where it is no checkpoint of this run; nothing has changed.
    """
    head = read_head(path, run.identity)
    check_length(path, head, longest)
    if head.state.keys() != run.state.keys():
        raise ValueError(f"{path} cannot be read (its counters are others); {AGAIN}")
    wanted = _all(run)
    found = load_tensors(path, AGAIN)
    if fault := next(_faults(wanted, found), None):
        raise ValueError(f"{path} cannot be read ({fault}); {AGAIN}")
    for name, look in run.identity.looks.items():
        if not _alike(found[LOOK + name], look):
            raise ValueError(f"{path} is of a run on another {name}; {OTHER}")
    with torch.no_grad():
        for name, tensor in run.tensors.items():
            tensor.copy_(found[name])
    run.state.update(head.state)


def check_length(path: Path, head: Head, longest: int) -> None:
    """Raise ValueError where a checkpoint is past the step at which a run ends."""
    if (step := head.state["step"]) > longest:
        raise ValueError(
            f"{path} is at step {step}, past the {longest} asked for; ask for as many or more, "
            "or give another folder"
        )


def plain(value: Any) -> Any:
    """As it is after a way through JSON."""
    return json.loads(json.dumps(value))


def _all(run: Run) -> dict[str, Tensor]:
    looks = {LOOK + name: look for name, look in run.identity.looks.items()}
    return dict(sorted({**run.tensors, **looks}.items()))


def _faults(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterator[str]:
    for name in {**wanted, **found}:
        if name not in found:
            yield f"{name} is missing"
        elif name not in wanted:
            yield f"{name!r:.60} is no tensor of this run"
        else:
            for what, theirs, ours in (
                ("shape", list(found[name].shape), list(wanted[name].shape)),
                ("dtype", found[name].dtype, wanted[name].dtype),
            ):
                if theirs != ours:
                    yield f"{name} has {what} {theirs}, not {ours}"


def _check_same(path: Path, head: Head, identity: Identity) -> None:
    theirs, ours = _flat(head.settings), _flat(plain(identity.settings))
    if other := [key for key in {**ours, **theirs} if theirs.get(key) != ours.get(key)]:
        told = [f"{_last(k)}={theirs.get(k)} (now {ours.get(k)})" for k in other[:NAMED]]
        raise ValueError(f"{path} is of a run with {', '.join(told):.300}; {OTHER}")
    for name, digest in identity.inputs.items():
        if head.inputs.get(name) != digest:
            raise ValueError(f"{path} is of a run on other {name}; {OTHER}")
    for name, value in plain(identity.follows).items():
        if head.follows.get(name) != value:
            raise ValueError(f"{path} is of a run with other {name}; {OTHER}")


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """The entries of nested dictionaries, each under its path."""
    out = {}
    for name, value in values.items():
        inner = isinstance(value, dict) and value
        out |= _flat(value, f"{before}{name}.") if inner else {before + name: value}
    return out


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _alike(look: Tensor, other: Tensor, rounding: float = 0.02) -> bool:
    """The same but for the arithmetic of another machine."""
    other = other.to(look)
    return bool((look - other).norm() <= rounding * other.norm())
