"""What the trainer and the files know of a method: its role, as three protocols and their data.

A `Kind` is a method by name: it knows its defaults and makes a `Method`, fresh or from a file. A
`Method` holds what is learned on one grid: its parameters, the operations that they make, and its
loss. The trainer moves parameters down losses and knows no more; files keep settings and tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.learned.teacher import Path
from fewstep.plan import Plan, Program
from fewstep.solver import AFS, get, intervals_for

__all__ = ["Kind", "Lesson", "Loss", "Method", "Recipe", "Setup", "start_recipe"]


@dataclass(frozen=True)
class Recipe:
    """A method's choices where the caller made none.

    base: the solver that is improved on, or None
    intervals: how many of them spend the budget
    afs: the analytic first step
    grid: by name; "search" has it found
    end: where a named grid ends: "sigma_min", or "zero"
    teacher, inner: its solver, and how many points it adds inside each interval
    whole: the teacher has a grid of its own, with `inner` points between the two ends, and only its
        end is looked at
    decay: the learning rate falls to 0 along half a cosine, after WARM_UP updates
    """

    base: str | None
    intervals: int
    afs: str
    grid: str
    end: str
    teacher: str
    inner: int
    lr: float
    whole: bool = False
    decay: bool = False


def start_recipe(
    name: str,
    base: str | None,
    nfe: int,
    afs: str | None,
    end: str | None,
    own_time: bool,
    grid: str | None = None,
) -> Recipe:
    """Of a method that starts from a plan of the base solver, by default the best that is known at
    so few evaluations, and looks at the teacher's end.

    Raises:
        ValueError: for a base without a plan, and a budget that it cannot spend.
    """
    usual, named, best = "ipndm-3" if nfe > 3 else "ipndm-2", "time-uniform", "sigma_min"
    if own_time:  # where guidance is usual, under which ipndm starts far off
        usual, named, best = "dpmpp-2m", "trailing", "zero"
    base, afs, end = base or usual, afs or "none", end or best
    solver = get(base)
    if afs not in AFS:
        raise ValueError(f"afs must be one of {', '.join(AFS)}, got {afs!r}")
    if solver.stochastic or solver.adapts:
        raise ValueError(f"{name} starts from a deterministic solver with a plan, not {base}")
    if solver.name == "consistency-pca":
        raise ValueError(f"{name} has one weight for all directions; take consistency-kappa")
    intervals = intervals_for(solver, nfe, afs, end=end)
    return Recipe(base, intervals, afs, grid or named, end, "deis-4", 30, 2e-2, True, True)


@dataclass(frozen=True)
class Setup:
    """What a fresh method starts from.

    features: how many numbers a feature map of the denoiser has; 0: the denoiser offers none
    in_features: whether the loss is taken in the features of another network, not in pixels
    """

    base: str | None
    sigmas: tuple[float, ...]
    afs: str
    features: int
    seed: int
    device: torch.device
    in_features: bool = False


@dataclass(frozen=True)
class Lesson:
    """One batch.

    denoiser: with the batch's conditions bound, and its parameters out of reach of gradients
    x_T: the start, [b, ...]
    path: the teacher's states from there, at the student's levels or at the end alone
    loss_features: a network for a loss at the end of the path, or None for pixels
    checkpointed: as `Frozen`'s, for a loss that spans several calls
    """

    denoiser: Denoiser
    x_T: Tensor
    path: Path
    loss_features: Callable[[Tensor], Tensor] | None
    checkpointed: bool = True


class Loss(NamedTuple):
    """A loss to step down, a scalar with a graph, and the learned numbers behind it, to show."""

    value: Tensor
    learned: dict[str, float]


class Method(Protocol):
    """What is learned on one grid."""

    @property
    def kind(self) -> str: ...
    @property
    def base(self) -> str | None: ...
    @property
    def sigmas(self) -> tuple[float, ...]: ...
    @property
    def afs(self) -> str: ...

    def program(self) -> Program:
        """For the loop; differentiable in the parameters."""
        ...

    def plan(self) -> Plan:
        """The same as plain numbers.

        Raises:
            ValueError: they differ between samples.
        """
        ...

    def parameters(self) -> dict[str, Tensor]:
        """What training moves, by name: the very tensors, so that they can be moved in place."""
        ...

    def settings(self) -> dict[str, Any]:
        """All but the tensors, JSON-ready; `Kind.read` takes it back."""
        ...

    def options(self) -> dict[str, Any]:
        """How it trains, as far as the settings do not say: for the record, JSON-ready."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What is kept beside the JSON file; empty where the settings say everything."""
        ...

    def losses(self, lesson: Lesson) -> Iterator[Loss]:
        """The losses of one batch. The parameters move before the next one is asked for."""
        ...


class Kind(Protocol):
    """A method by name."""

    @property
    def name(self) -> str: ...

    def recipe(
        self, base: str | None, nfe: int, afs: str | None, end: str | None, own_time: bool
    ) -> Recipe:
        """Defaults for a budget.

        Args:
            end: where the grid ends, sigmas too; None: where the method likes it best
            own_time: whether the network has a time of its own, in which grids can be uniform (VP,
                flow)

        Raises:
            ValueError: for a budget that cannot be spent exactly, and for an end that the method
                cannot reach.
        """
        ...

    @property
    def fresh(self) -> Callable[..., Method]:
        """fresh(setup, *, option=...): before training. Its keywords are the method's options."""
        ...

    def read(
        self,
        base: str | None,
        sigmas: tuple[float, ...],
        afs: str,
        settings: dict[str, Any],
        tensors: dict[str, Tensor],
    ) -> Method:
        """From a file.

        Raises:
            ValueError: TypeError or KeyError where the parts do not fit.
        """
        ...
