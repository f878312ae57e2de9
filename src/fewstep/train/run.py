"""The state of a training: what it changes, and what tells it from others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Identity", "Run"]


@dataclass(frozen=True, eq=False)
class Identity:
    """What decides the result of a run, to the bit, on one kind of machine.

    kind: of training, in words: "a network's training"
    settings: what was chosen, JSON-ready; dictionaries may be nested. Without the length where a
        run can be taken further.
    inputs: hashes of what was given, by what they are called in a message: "pictures or labels"
    looks: the same for what has no hash: tensors by which it is known again, but for rounding
    follows: what follows from the others, checked where it is known
    """

    kind: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    looks: Mapping[str, Tensor] = field(default_factory=dict)
    follows: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Run:
    """All that training changes, so that a checkpoint of it is exact.

    tensors: by name; the very tensors, which are changed in place
    state: the numbers, JSON-ready; "step" counts the steps that are done
    """

    identity: Identity
    tensors: Mapping[str, Tensor]
    state: dict[str, Any] = field(default_factory=lambda: {"step": 0})

    @property
    def step(self) -> int:
        return self.state["step"]
