"""What a comparison needs, by names, so that any process can open it alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fewstep.evaluate.compare.bench import Judge, Workbench
from fewstep.evaluate.compare.design import Design
from fewstep.evaluate.compare.run import LCM, load_students
from fewstep.evaluate.compare.screening import check_solvers
from fewstep.evaluate.features import own_features, resolve_features
from fewstep.evaluate.references import References
from fewstep.models import load
from fewstep.reference import ReferenceSolve

__all__ = ["Opened", "Setup"]


@dataclass(frozen=True, eq=False)
class Opened:
    """Models loaded, feature networks opened. design: with how it chooses filled in."""

    workbench: Workbench
    design: Design
    judges: list[Judge]


@dataclass(frozen=True)
class Setup:
    """A comparison by names.

    model, machine: how it is loaded: device, dtype, compile
    design: what is compared; choose_by: None: the first feature network
    features: names, None: the model's own; trust: see `resolve_features`
    how, cache: of the reference solves
    out: the folder
    preset: the published settings of a network file; lcm is of the adapters among the solvers
    """

    model: str
    machine: dict[str, Any]
    design: Design
    choose_by: str | None
    out: Path
    features: tuple[str, ...] | None = None
    trust: tuple[str, ...] = ()
    how: ReferenceSolve = field(default_factory=ReferenceSolve)
    cache: Path | None = None
    batch: int = 50
    preset: str | None = None

    def open(
        self,
        device: str | None = None,
        report: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> Opened:
        """Load and check everything; nothing is written.

        Args:
            device: in place of the machine's

        Raises:
            ValueError: something is not there, or does not go together.
        """
        machine = {**self.machine, "device": device or self.machine["device"]}
        own: dict[str, Any] = {} if self.preset in (None, LCM) else {"preset": self.preset}
        loaded = load(self.model, **machine, **own)
        exact = loaded
        if machine["dtype"] != "float32":
            exact = load(self.model, **{**machine, **own, "dtype": "float32"})
        named = own_features(loaded.card.name) if self.features is None else self.features
        size = loaded.card.picture or (32, 32, 3)
        judges: list[Judge] = [
            resolve_features(one, machine["device"], size, self.trust)
            for one in named
            if one != "none"
        ]
        design = self.design
        if judges and self.choose_by is None:
            design = replace(design, choose_by=judges[0].label)
        about = {name: getattr(design, name) for name in ("label", "guidance", "prompt")}
        told = self.preset, about["guidance"]
        students = load_students(loaded, design.solvers, self.model, *told, **machine)
        check_solvers(loaded, design, students)
        references = References(exact, self.how, folder=self.cache, batch=self.batch, **about)
        bench = Workbench(loaded, references, self.out, self.batch, report, students)
        return Opened(bench, design, judges)
