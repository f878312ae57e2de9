"""`tuned`: a table of numbers, trained at the end of the chain.

Every static solver is a table: the state of its k-th evaluation, and its end, are

    x_k = alpha_k x_T + (1 - alpha_k) sum_{j<k} n_kj D_j          sum_j n_kj = 1

with alpha_k = sigma_k / sigma_T (but after the analytic first step "zero", whose D is a multiple of
x_T), and the network at x_k is told the level tau_k, which is sigma_k.
Here the table starts as that of a training-free solver, and three kinds of number in it learn:

    times      alpha_k = alpha0_k exp(p_k),  sigma_k = sigma0_k exp(p_k)
    told       tau_k = sigma_k exp(r_k)
    weights    n_kj = n0_kj + sum_i q_ki B_ij      B_i: i-th backward difference of the D's

D's of neighbouring evaluations are nearly equal, so weights in their differences train far better
than weights on themselves; and since an analytic first step is a D that costs nothing, it keeps a
weight of its own in all later steps. All states are linear in x_T and the D's, so a table over the
whole history loses nothing against any rule with learned steps, weights or scales.

The loss is the distance at the end of the chain to a fine solve, in pixels or in a feature
network's space: not its square, for where trajectories part, a few samples end far off whatever the
table, and would decide it. In features the distance of the batch's means is added, SHIFT times: a
shift that all pictures share is little to each of them, but counts in full in a Frechet distance.
It is seen above the scatter of the batch, 1 / sqrt(b) of the distance, so b must not be small.
What is learned is the same for every sample, so the result is a plan.

Sources: learning a solver's coefficients and levels from a teacher's end is S4S-Alt's (Frankel et
al. 2025, arXiv:2502.17423), learning what the network is told AMED's (Zhou et al. 2023,
arXiv:2312.00094); the table over the whole history and its differences are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.learned.method import (
    Lesson,
    Loss,
    Method,
    Recipe,
    Setup,
    start_recipe,
)
from fewstep.learned.teacher import Frozen
from fewstep.loop import finish
from fewstep.plan import (
    SOURCES,
    Combine,
    Eval,
    Ops,
    Plan,
    Program,
    Source,
    in_numbers,
    levels,
    stages,
)
from fewstep.schedule import PURE_NOISE
from fewstep.solver import get

__all__ = ["PARTS", "SHIFT", "TUNED", "Tuned", "TunedKind"]

PARTS = ("times", "told", "weights")
SHIFT = 2.0  # in features; in pixels the means agree without it


@dataclass(frozen=True, eq=False)
class Tuned:
    """One table.

    base, sigmas, afs: of the solver that it started from
    sources: of its evaluations
    alphas, levels: of each evaluation's state and of the end, [k + 1]
    weights: n, [k + 1, k], strictly lower triangular
    learned: p [k + 1], r [k] and q [k + 1, k], of the parts that learn
    squared: whether the loss is the squared distance
    shift: weight of the distance of the batch's means
    """

    base: str
    sigmas: tuple[float, ...]
    afs: str
    sources: tuple[Source, ...]
    alphas: Tensor
    levels: Tensor
    weights: Tensor
    learned: dict[str, Tensor]
    squared: bool = False
    shift: float = 0.0

    kind: str = "tuned"

    @classmethod
    def start(
        cls,
        base: str,
        sigmas: tuple[float, ...],
        afs: str,
        parts: Sequence[str] = PARTS,
        squared: bool = False,
        shift: float = 0.0,
    ) -> Tuned:
        """The base solver's own table, to learn from there."""
        plan = get(base).plan(sigmas, afs)
        table = torch.tensor(stages(plan))  # [k + 1, 1 + k]
        alphas, weights = table[:, 0], table[:, 1:]
        rest = torch.where(alphas < 1, 1 - alphas, 1.0)
        k = weights.shape[1]
        fresh = {
            "times": torch.zeros(k + 1, dtype=torch.float64),
            "told": torch.zeros(k, dtype=torch.float64),
            "weights": torch.zeros(k + 1, k, dtype=torch.float64),
        }
        learned = {part: fresh[part] for part in parts}
        sources: tuple[Source, ...] = tuple(op.source for op in plan.ops if isinstance(op, Eval))
        seen = [float(op.sigma) for op in plan.ops if isinstance(op, Eval)]
        levels = torch.tensor([*seen, sigmas[-1]], dtype=torch.float64)
        weights = weights / rest[:, None]
        return cls(base, sigmas, afs, sources, alphas, levels, weights, learned, squared, shift)

    def table(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(alpha [k + 1], sigma [k + 1], told level [k], weights on the D's [k + 1, k]),
        differentiable."""
        k = len(self.sources)
        alphas, levels, weights = self.alphas, self.levels, self.weights
        told = torch.zeros(k, dtype=torch.float64)
        if "times" in self.learned:
            # the start is given, and so is the end; an analytic evaluation has no time of its own
            moves = [k > 0 and source == "net" for k, source in enumerate(self.sources)]
            inner = torch.tensor([*moves, False], dtype=torch.float64)
            moved = torch.exp(inner * self.learned["times"])
            alphas, levels = alphas * moved, levels * moved
        if "told" in self.learned:
            # pure noise has no other level than its own, and pipelines of flows give it as it is
            moves = torch.tensor([float(level < PURE_NOISE) for level in levels[:k]])
            told = moves * self.learned["told"]
        if "weights" in self.learned:
            weights = weights + torch.einsum("ki,kij->kj", self.learned["weights"], differences(k))
        return alphas, levels, levels[:k] * torch.exp(told), (1 - alphas)[:, None] * weights

    def ops(self) -> Ops:
        """From state to state: x_k = rho x_{k-1} + sum_j (w_kj - rho w_{k-1,j}) D_j."""
        alphas, levels, told, weights = self.table()
        for k, source in enumerate(self.sources):
            yield Eval(levels[k], told[k] if source == "net" else None, source)
            rho = alphas[k + 1] / alphas[k]
            row = weights[k + 1, : k + 1] - rho * weights[k, : k + 1]
            yield Combine(tuple(row.flip(0)), levels[k + 1], rho)

    def program(self) -> Program:
        return self.plan().program()

    @torch.no_grad()
    def plan(self) -> Plan:
        ops = tuple(in_numbers(op) for op in self.ops())
        name = f"tuned from {self.base}"
        return Plan("x0", len(self.sources), name, "learned", levels(ops), ops)

    def parameters(self) -> dict[str, Tensor]:
        return self.learned

    def settings(self) -> dict[str, Any]:
        return {
            "sources": list(self.sources),
            "alphas": self.alphas.tolist(),
            "levels": self.levels.tolist(),
            "weights": self.weights.tolist(),
            "learned": {name: value.detach().tolist() for name, value in self.learned.items()},
        }

    def options(self) -> dict[str, Any]:
        return {"parts": list(self.learned), "squared": self.squared, "shift": self.shift}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def losses(self, lesson: Lesson) -> Iterator[Loss]:
        sigmas, count = self.sigmas, sum(source == "net" for source in self.sources)
        program = Program(self.ops, "x0", len(self.sources), sigmas, count, adapts=True)
        denoiser = Frozen(lesson.denoiser, lesson.checkpointed)
        x, target = finish(program, denoiser, lesson.x_T), lesson.path.states[-1]
        if lesson.loss_features is not None:
            with torch.no_grad():
                target = lesson.loss_features(target)
            x = lesson.loss_features(x)
        gap = (x - target).flatten(1)
        distance = rms(gap)
        value = (distance.square() if self.squared else distance).mean()
        if self.shift:
            value = value + self.shift * rms(gap.mean(0))
        yield Loss(lesson.x_T[0].numel() * value, self._shown())

    @torch.no_grad()
    def _shown(self) -> dict[str, float]:
        levels = self.table()[1][1:-1]
        return {f"sigma{k + 1}": float(level) for k, level in enumerate(levels)}


@dataclass(frozen=True)
class TunedKind:
    """The method by name."""

    name: str = "tuned"

    def recipe(
        self, base: str | None, nfe: int, afs: str | None, end: str | None, own_time: bool
    ) -> Recipe:
        grid = None if own_time else "search"
        return start_recipe(self.name, base, nfe, afs, end, own_time, grid)

    def fresh(
        self,
        setup: Setup,
        *,
        parts: Sequence[str] = PARTS,
        squared: bool = False,
        shift: float | None = None,
    ) -> Method:
        """A table that starts as its base.

        Args:
            parts: what learns, of times, told and weights
            squared: the loss is the squared distance, which a few samples decide
            shift: weight of the distance of the batch's means; SHIFT in features and 0 in pixels
                unless given

        Raises:
            ValueError: for parts that are not these, and a shift below 0.
        """
        if not parts or len(set(parts)) < len(parts) or not set(parts) <= set(PARTS):
            got = ", ".join(parts) or "none"
            raise ValueError(f"parts must be some of {', '.join(PARTS)}, each once, got {got}")
        if shift is None:
            shift = SHIFT if setup.in_features else 0.0
        if not 0 <= shift < math.inf:
            raise ValueError(f"shift must be finite and at least 0, got {shift}")
        assert setup.base is not None  # the recipe names one
        return Tuned.start(setup.base, setup.sigmas, setup.afs, parts, squared, shift)

    def read(
        self,
        base: str | None,
        sigmas: tuple[float, ...],
        afs: str,
        settings: dict[str, Any],
        tensors: dict[str, Tensor],
    ) -> Method:
        values = {
            name: torch.tensor(settings[name], dtype=torch.float64)
            for name in ("alphas", "levels", "weights")
        }
        learned = {
            name: torch.tensor(value, dtype=torch.float64)
            for name, value in settings["learned"].items()
        }
        k = len(settings["sources"])
        shapes = {"alphas": (k + 1,), "levels": (k + 1,), "weights": (k + 1, k)}
        shapes |= {"times": (k + 1,), "told": (k,)}
        for name, value in (*values.items(), *learned.items()):
            wanted = shapes.get(name)
            if tuple(value.shape) != wanted or not torch.isfinite(value).all():
                raise ValueError(f"{name} must be finite numbers of shape {wanted}")
        sources = tuple(settings["sources"])
        if unknown := [source for source in sources if source not in SOURCES]:
            raise ValueError(f"sources must be some of {', '.join(SOURCES)}, got {unknown[0]!r}")
        alphas, levels, weights = values.values()
        return Tuned(str(base), sigmas, afs, sources, alphas, levels, weights, learned)


TUNED = TunedKind()


def rms(gap: Tensor) -> Tensor:
    """Root mean square over the last dimension."""
    return torch.linalg.vector_norm(gap, dim=-1) / gap.shape[-1] ** 0.5


def differences(k: int) -> Tensor:
    """B [k + 1, i, j]: for the state after `row` D's, the i-th backward difference of them as
    weights on D_j."""
    out = torch.zeros(k + 1, k, k, dtype=torch.float64)
    for row in range(1, k + 1):
        for i in range(row):
            for m in range(i + 1):
                out[row, i, row - 1 - m] = (-1) ** m * math.comb(i, m)
    return out
