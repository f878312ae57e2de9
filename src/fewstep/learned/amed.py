"""AMED-Solver and AMED-Plugin: a predictor of r, c and a for each step, trained step by step.

The loss of a step is the squared distance of its end to the teacher's state there, and the
predictor takes one step of Adam for each. A student that needs no history restarts every interval
from the teacher's state; one with history goes on from its own, detached. So a gradient reaches
through one call of the network, the one at s.

Source: Zhou et al. 2023, arXiv:2312.00094. docs/learned.md says where this departs from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewstep.learned.grid_search import SEARCH
from fewstep.learned.method import Lesson, Loss, Method, Recipe, Setup
from fewstep.learned.ops import base_of, check_slope
from fewstep.learned.predictor import Predictor, Values, read_features
from fewstep.learned.teacher import Recalled
from fewstep.loop import State, run
from fewstep.plan import Plan, Program, Seen, freeze
from fewstep.schedule import PURE_NOISE
from fewstep.solver import AFS

__all__ = ["AMED", "PLUGIN", "Amed", "AmedKind"]


@dataclass(frozen=True, eq=False)
class Amed:
    """One trained grid of AMED-Solver (base None) or of AMED-Plugin on a base solver."""

    kind: str
    base: str | None
    sigmas: tuple[float, ...]
    afs: str
    predictor: Predictor

    def __post_init__(self) -> None:
        if self.afs not in AFS:
            raise ValueError(f"afs must be one of {', '.join(AFS)}, got {self.afs!r}")
        if not self.sigmas[-1] > 0:
            raise ValueError(ENDS_ABOVE)
        base_of(self.base)

    def values(self, i: int, seen: Seen | None) -> Values:
        """r, c and a of interval i. After an analytic first step the features count as zeros."""
        assert seen is not None  # the loop replies to every Eval
        count = self.predictor.features
        asked = count and not (i == 0 and self.afs != "none")
        features = read_features(seen, count) if asked else None
        return self.predictor(features, self.sigmas[i], self.sigmas[i + 1], seen.x.device)

    def program(self) -> Program:
        return self._program(self.values, detach=False)

    def _program(self, values: Any, detach: bool) -> Program:
        base, reads = base_of(self.base), self.predictor.features > 0
        return Program(
            partial(base.ops, self.sigmas, values, self.afs, reads, detach),
            base.prediction,
            base.depth,
            self.sigmas,
            2 * (len(self.sigmas) - 1) - (self.afs != "none"),
            adapts=True,
            name=self.kind if self.base is None else f"{self.kind} on {self.base}",
            quantile=base.quantile,
        )

    def plan(self) -> Plan:
        if self.predictor.features:
            raise ValueError(
                f"this {self.kind} reads the network's features, so its numbers differ between "
                "samples and there is no plan; name the model for their means (--model), or train "
                "one with features=False (--no-features)"
            )
        base, rows = base_of(self.base), self.rows()
        return freeze(
            base.ops(self.sigmas, lambda i, seen: rows[i], self.afs, False),
            prediction=base.prediction,
            depth=base.depth,
            solver=self.program().name,
            grid="learned",
            sigmas=self.sigmas,
        )

    @torch.no_grad()
    def rows(self) -> list[Values]:
        """The values of each interval where the features are zeros, as floats."""
        predicted = (
            self.predictor(None, cur, nxt, torch.device("cpu"))
            for cur, nxt in zip(self.sigmas, self.sigmas[1:], strict=False)
        )
        return [Values(*(float(value) for value in row)) for row in predicted]

    def parameters(self) -> dict[str, Tensor]:
        return self.predictor.weights

    def settings(self) -> dict[str, Any]:
        embedding = self.predictor.embedding
        special = {} if embedding == "log" else {"embedding": embedding}
        return {name: getattr(self.predictor, name) for name in SETTINGS} | special

    def options(self) -> dict[str, Any]:
        return self.settings()

    def tensors(self) -> dict[str, Tensor]:
        return self.predictor.weights

    def losses(self, lesson: Lesson) -> Iterator[Loss]:
        base, latest = base_of(self.base), []

        def noted(i: int, seen: Seen | None) -> Values:
            latest.append(self.values(i, seen))
            return latest[-1]

        denoiser = Recalled(lesson.denoiser, lesson.path.seen)
        going = run(self._program(noted, detach=True), denoiser, lesson.x_T)
        sent = None
        for target in lesson.path.states[1:]:
            state = going.send(sent)
            for _ in range(base.states - 1):
                state = going.send(None)
            value = (state.x - target).square().flatten(1).sum(1).mean()
            yield Loss(value, _means(latest))
            sent = replace(state, x=target, history=()) if base.restarts else _detached(state)
        going.close()


SETTINGS = ("features", "scale_dir", "scale_time")
ENDS_ABOVE = (
    "the grid of amed and amed-plugin must end above 0, for s lies between its ends in log sigma; "
    "tuned can end at 0"
)


@dataclass(frozen=True)
class AmedKind:
    """One of the two methods by name, with the recipe of its paper for 32 x 32 pictures.

    plugin: whether it improves on a base solver, `base` unless the caller names one
    grid: where the network has no time of its own; "discrete", as in the paper, where it has
    """

    name: str
    plugin: bool
    base: str | None
    grid: str

    def recipe(
        self, base: str | None, nfe: int, afs: str | None, end: str | None, own_time: bool
    ) -> Recipe:
        if end not in (None, "sigma_min"):
            raise ValueError(ENDS_ABOVE)
        if base is not None and not self.plugin:
            raise ValueError(f"{self.name} has no base, got {base!r}; amed-plugin has one")
        if afs is None:
            afs = "zero" if nfe % 2 else "none"
        if afs not in AFS:
            raise ValueError(f"afs must be one of {', '.join(AFS)}, got {afs!r}")
        twice = nfe + (afs != "none")
        if nfe < 1 or twice % 2:
            spends = "an odd" if afs != "none" else "an even"
            other = "'none'" if afs != "none" else "'zero' or 'mean'"
            raise ValueError(
                f"{self.name} with afs={afs!r} spends {spends} number of evaluations, got "
                f"nfe={nfe}; take another, or afs={other}"
            )
        chosen = base or self.base
        base_of(chosen)
        grid = "discrete" if own_time else self.grid
        return Recipe(chosen, twice // 2, afs, grid, "sigma_min", TEACHER, INNER, LR)

    def fresh(
        self,
        setup: Setup,
        *,
        scale_dir: float = 0.01,
        scale_time: float = 0.0,
        features: bool | None = None,
    ) -> Method:
        """Untrained.

        Args:
            scale_dir, scale_time: see `Predictor`
            features: whether to read the network's; None: where there are any

        Raises:
            ValueError: they are asked of a network that has none, and for a start so noisy that c,
                a factor of the whole step there, could not be learned; for a base whose rule loses
                gradients.
        """
        if setup.sigmas[0] > PURE_NOISE and base_of(setup.base).prediction == "eps":
            raise ValueError(
                f"{self.name}{f' on {setup.base}' if setup.base else ''} cannot start at sigma "
                f"{setup.sigmas[0]:g}, which stands for pure noise (a flow, or zero terminal SNR): "
                "take amed-plugin on dpmpp-2m, or tuned"
            )
        if features and not setup.features:
            raise ValueError(
                "features=True needs a denoiser with_features(x, sigma) -> (D, features), and this "
                "one has none; leave features out"
            )
        count = 0 if features is False else setup.features
        check_slope(setup.base)
        predictor = Predictor.fresh(count, scale_dir, scale_time, setup.seed, setup.device)
        return Amed(self.name, setup.base, setup.sigmas, setup.afs, predictor)

    def read(
        self,
        base: str | None,
        sigmas: tuple[float, ...],
        afs: str,
        settings: dict[str, Any],
        tensors: dict[str, Tensor],
    ) -> Method:
        if (base is not None) != self.plugin:
            raise ValueError(f"base must {'' if self.plugin else 'not '}be given, got {base!r}")
        return Amed(self.name, base, sigmas, afs, Predictor(**settings, weights=tensors))


# The authors' teachers are Heun with one inner point and the base itself with two. Third-order DEIS
# with two takes 9 evaluations at a budget of 5 where Heun takes 12, and is nearer to the solution.
TEACHER, INNER = "deis-3", 2
# The authors' rate is 5e-3, and their grids are time-uniform and karras; studies/strangers.py
# compares them on networks on which these were not chosen.
LR = 2e-2

AMED = AmedKind("amed", plugin=False, base=None, grid=SEARCH)
PLUGIN = AmedKind("amed-plugin", plugin=True, base="ipndm-4", grid=SEARCH)


def _detached(state: State) -> State:
    return replace(state, x=state.x.detach(), history=tuple(h.detach() for h in state.history))


def _means(rows: list[Values]) -> dict[str, float]:
    """Batch means of what was learned, by name and interval, without what is fixed at 1."""
    return {
        f"{name}{i + 1}": value.detach().mean().item()
        for i, row in enumerate(rows)
        for name, value in zip(Values._fields, row, strict=True)
        if isinstance(value, Tensor)
    }
