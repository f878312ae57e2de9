"""How a solver is run, as one frozen object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fewstep.arguments import either, levels, number, text, whole

__all__ = ["Filled", "Settings"]


@dataclass(frozen=True)
class Settings:
    """How a solver is run: itself, the budget, the grid, the first and the last step.

    What is None is filled in by the model's card, once the model is known. The command shows
    these lines as its help.

    Attributes:
        solver: auto (the best known), a name, NAME:option=value, or a folder of a learned solver.
        nfe: Network evaluations per picture. Default: 5, or a learned solver's own.
        grid: karras, log-snr, time-uniform, discrete, trailing, or sigmas: 80,9,1,0.002. Default:
            the model's (trailing for pipelines), else karras.
        afs: Analytic first step, at no evaluation: none, zero or mean. Default: the card's, else
            none.
        final: Spend the last evaluation at the grid's end and return its D.
        end: Where a named grid ends: sigma_min, or zero (a last step of order 1, free). Default:
            the model's (zero for pipelines), else sigma_min.
        head_start: Carry the noise analytically to this sigma before the first step.
    """

    solver: Any = "auto"
    nfe: int | None = None
    grid: str | tuple[float, ...] | None = None
    afs: str | None = None
    final: bool = False
    end: str | None = None
    head_start: float | None = None

    def __post_init__(self) -> None:
        if self.nfe is not None:
            object.__setattr__(self, "nfe", whole("nfe", self.nfe))
        for name in ("afs", "end"):
            if getattr(self, name) is not None:
                text(name, getattr(self, name))
        either("final", self.final)
        if self.head_start is not None:
            object.__setattr__(self, "head_start", number("head_start", self.head_start))
            if not self.head_start > 0:
                raise ValueError(f"head_start must be positive, got {self.head_start}")
        if self.grid is not None and not isinstance(self.grid, str):
            object.__setattr__(self, "grid", levels("grid", self.grid))
        elif self.grid is not None:
            text("grid", self.grid)


@dataclass(frozen=True)
class Filled(Settings):
    """Settings with nothing left open. The solver is a name, a Solver, or the Program of what has
    its own grid, beside which grid is None."""

    solver: Any = "dpmpp-2m"
    nfe: int = 5
    afs: str = "none"
    end: str = "sigma_min"

    def record(self) -> dict[str, Any]:
        """For provenance, JSON-ready. Where the solver has its own grid, its first step and its end
        are its own too: null."""
        name = getattr(self.solver, "name", self.solver)
        grid = list(self.grid) if isinstance(self.grid, tuple) else self.grid
        own = grid is None
        return {
            "solver": name,
            "nfe": self.nfe,
            "grid": grid,
            "afs": None if own else self.afs,
            "final": self.final,
            "end": None if own else self.end,
        }
