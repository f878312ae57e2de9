"""A method whose numbers are a plan that was learned elsewhere: it samples, but is not trained.

The folder keeps the plan itself, so that what runs is what was read, to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fewstep.learned.method import Lesson, Loss, Method, Recipe
from fewstep.plan import Plan, Program
from fewstep.records import shown

__all__ = ["READ_ONLY", "Fixed", "FixedKind"]


@dataclass(frozen=True, eq=False)
class Fixed:
    """A plan under the name of the method that it comes from.

    sigmas: the grid between whose points it was learned; its evaluations may stand elsewhere
    facts: what the file said of it, JSON-ready
    """

    kind: str
    sigmas: tuple[float, ...]
    afs: str
    fixed: Plan
    facts: dict[str, Any]
    base: str | None = None

    def program(self) -> Program:
        return self.fixed.program()

    def plan(self) -> Plan:
        return self.fixed

    def parameters(self) -> dict[str, Tensor]:
        return {}

    def settings(self) -> dict[str, Any]:
        return {"plan": json.loads(self.fixed.to_json()), "facts": self.facts}

    def options(self) -> dict[str, Any]:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def losses(self, lesson: Lesson) -> Iterator[Loss]:
        raise ValueError(f"{self.kind} was learned elsewhere and is not trained here; take tuned")


@dataclass(frozen=True)
class FixedKind:
    """One of the methods by name."""

    name: str

    def recipe(
        self, base: str | None, nfe: int, afs: str | None, end: str | None, own_time: bool
    ) -> Recipe:
        raise ValueError(f"{self.name} is read from files, and not trained here; take tuned")

    @property
    def fresh(self) -> Callable[..., Method]:
        raise ValueError(f"{self.name} is read from files, and not trained here; take tuned")

    def read(
        self,
        base: str | None,
        sigmas: tuple[float, ...],
        afs: str,
        settings: dict[str, Any],
        tensors: dict[str, Tensor],
    ) -> Method:
        plan = Plan.from_json(json.dumps(settings["plan"]))
        facts = settings["facts"]
        if not isinstance(facts, dict):
            raise ValueError(f"facts must be a table, got {shown(facts)}")
        if base is not None:
            raise ValueError(f"{self.name} has no base, got {shown(base)}")
        return Fixed(self.name, sigmas, afs, plan, facts)


READ_ONLY = {name: FixedKind(name) for name in ("dyweight", "epd", "adasde")}
