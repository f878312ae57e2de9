"""A solver as a stream of coefficients: two operations, and the plan that a static solver drains
into.

Every solver here updates the state by a linear combination of one anchor state and past outputs of
the network:

    Eval      evaluate at the current state, push the output (eps or D) on the history
    Combine   x = a * anchor + sum_j b_j * history_j + noise * xi       history newest first

so a solver never touches an image; `fewstep.loop` is the one place that does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard

import numpy as np
from torch import Tensor

from fewstep.arguments import place

__all__ = [
    "Combine",
    "Eval",
    "Level",
    "Op",
    "Ops",
    "Plan",
    "Prediction",
    "Program",
    "SOURCES",
    "Seen",
    "Source",
    "flatten",
    "freeze",
    "gain",
    "in_numbers",
    "levels",
    "nfe",
    "stages",
]

Level = float | Tensor
Prediction = Literal["eps", "x0"]
Source = Literal["net", "zero", "mean", "path"]
SOURCES = ("net", "zero", "mean", "path")
DEEPEST = 10_000  # outputs that a plan may keep


class Eval(NamedTuple):
    """Evaluate at the current state, which is at noise level sigma, and push the output on the
    history.

    sigma: float or [b]
    cond: the level that the network is told, where it differs; of "path" the level that it leads to
    source: "net", or one of the analytic stand-ins that cost nothing ("zero": eps = x / sqrt(1 +
        sigma^2), "mean": D = the mean of the network's D at sigma_max, "path": in place of D the
        state at cond on the path of Gaussian data from x to the last D, by `denoiser.covariance`)
    features: whether the reply should carry the network's features
    """

    sigma: Level
    cond: Level | None = None
    source: Source = "net"
    features: bool = False


class Combine(NamedTuple):
    """x = a * anchor + sum_j b_j * history_j + noise * xi, at noise level sigma.

    b: newest first, floats or [b] tensors
    noise: standard deviation of fresh noise, a float or [b]
    interval: None for an independent draw, or the two noise levels whose unit-variance Brownian
        increment is meant
    accept: whether the new state becomes the anchor (False: a trial stage)
    """

    b: tuple[Level, ...]
    sigma: Level
    a: Level = 1.0
    noise: Level = 0.0
    interval: tuple[float, float] | None = None
    accept: bool = True


class Seen(NamedTuple):
    """The reply to an Eval: the state, the network's D there, and its features where asked for."""

    x: Tensor
    denoised: Tensor
    features: Tensor | None


Op = Eval | Combine
Ops = Generator[Op, Seen | None, None]


@dataclass(frozen=True)
class Program:
    """What the loop runs: operations that can be started, and the facts that go with them.

    A solver on a grid makes one; so does everything else that has a method `program()`, such as a
    plan or a learned solver, and whatever has one can stand where a solver is asked for.

    start: gives a fresh generator of the operations
    prediction, depth: what the history holds, "eps" or "x0", and how many outputs are kept
    sigmas: the grid, from the start's noise level on
    evaluations: how many network evaluations it spends
    adapts: whether it looks at the replies (and may keep them: no buffer is reused then)
    name: for the record
    learned_on: for what was trained: the hash of the network's weights, "" where they are not known
    draws: whether it draws noise on the way
    checksums: of these weights as they were in memory, by dtype, where they are known
    quantile: of |D|, by which each D is thresholded, see `fewstep.denoiser.Thresholded`; None: by
        none
    """

    start: Callable[[], Ops]
    prediction: Prediction
    depth: int
    sigmas: tuple[float, ...]
    evaluations: int
    adapts: bool = False
    name: str = "custom"
    learned_on: str | None = None
    draws: bool = False
    checksums: Mapping[str, str] = field(default_factory=dict)
    quantile: float | None = None

    def program(self) -> Program:
        """Itself."""
        return self


@dataclass(frozen=True)
class Plan:
    """A static solver on one grid: a header and the operations, all numbers.

    prediction: what the history holds, "eps" or "x0"
    depth: how many outputs are kept
    solver, grid: names, for the record
    """

    prediction: Prediction
    depth: int
    solver: str
    grid: str
    sigmas: tuple[float, ...]
    ops: tuple[Op, ...]

    def __post_init__(self) -> None:
        if self.prediction not in ("eps", "x0"):
            raise ValueError(f"prediction must be eps or x0, got {self.prediction!r}")
        if type(self.depth) is not int or not 1 <= self.depth <= DEEPEST:
            raise ValueError(f"depth must be an integer from 1 to {DEEPEST}, got {self.depth!r}")
        for name in ("solver", "grid"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be text, got {getattr(self, name)!r}")
        for sigma in self.sigmas:
            if not _finite(sigma) or sigma < 0:
                raise ValueError(f"sigmas must be finite numbers >= 0, got {sigma!r}")
        for current, following in pairwise(self.sigmas):
            if not current > following:
                raise ValueError(f"sigmas must strictly decrease, got {current}, {following}")
        for op in self.ops:
            _check_op(op, self.depth)

    def start(self) -> Ops:
        """The operations, as a generator that the loop can drive."""
        for op in self.ops:
            yield op

    def program(self) -> Program:
        """For the loop."""
        draws = any(isinstance(op, Combine) and op.noise != 0 for op in self.ops)
        return Program(
            self.start,
            self.prediction,
            self.depth,
            self.sigmas,
            nfe(self),
            name=self.solver,
            draws=draws,
        )

    def to_json(self) -> str:
        """One JSON object: the header, and each operation without its defaults."""
        ops = [{"op": type(op).__name__.lower(), **_changed(op)} for op in self.ops]
        return json.dumps({**asdict(self), "ops": ops}, indent=1)

    @classmethod
    def read(cls, path: Path | str) -> Plan:
        """The plan in a file.

        Raises:
            OSError: there is none, ValueError that names the file where it holds no plan.
        """
        from fewstep.records import LARGEST

        try:
            with open(place("path", path), "rb") as file:
                return cls.from_json(file.read(LARGEST + 1))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Inverse of `to_json`, exact to the bit.

        Raises:
            ValueError: the text is not a plan.
        """
        from fewstep.records import parse, shown

        try:
            fields = parse(text)
            if not isinstance(fields, dict):
                raise ValueError(f"it must be a table, got {shown(fields)}")
            for name in ("ops", "sigmas"):
                if not isinstance(fields.get(name), list):
                    raise ValueError(f"{name} must be a list, got {shown(fields.get(name))}")
            ops = tuple(_read_op(op) for op in fields.pop("ops"))
            return cls(**{**fields, "sigmas": tuple(fields["sigmas"]), "ops": ops})
        except (KeyError, TypeError, ValueError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"this is not a plan of fewstep: {what}") from None


def _check_op(op: Op, depth: int) -> None:
    if not isinstance(op, Eval | Combine):
        raise ValueError(f"an operation must be an Eval or a Combine, got {op!r:.80}")
    numbers = [op.sigma, *([op.cond] if isinstance(op, Eval) and op.cond is not None else [])]
    for name in ("accept",) if isinstance(op, Combine) else ("features",):
        if not isinstance(getattr(op, name), bool):
            raise ValueError(f"{name} must be true or false, got {getattr(op, name)!r}")
    if isinstance(op, Combine):
        if not isinstance(op.b, tuple | list):
            raise ValueError(f"b must be one weight for each output, like (1.0,), got {op.b!r:.80}")
        if op.interval is not None and len(op.interval) != 2:
            raise ValueError(f"interval must be two noise levels, got {op.interval}")
        numbers += [op.a, op.noise, *op.b, *(op.interval or ())]
        if len(op.b) > depth:
            raise ValueError(f"a Combine reaches {len(op.b)} outputs back, depth is {depth}")
    elif op.source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {op.source!r}")
    elif op.source == "path" and (op.cond is None or not op.sigma):
        raise ValueError(f"a path leads from a level above 0 to cond, got {op}")
    for number in numbers:
        if not isinstance(number, Tensor) and not _finite(number):
            raise ValueError(f"a plan's numbers must be finite, got {number!r} in {op}")


def _finite(number: object) -> TypeGuard[float]:
    """Whether this is a plain number that fits a float."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond the largest float
        return False


def _changed(op: Op) -> dict[str, Any]:
    defaults = type(op)._field_defaults
    # by repr, since 0.0 == -0.0 and 1 == 1.0
    changed = {k: v for k, v in op._asdict().items() if repr(v) != repr(defaults.get(k, ...))}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()}


def _read_op(fields: Any) -> Op:
    kinds = {"eval": Eval, "combine": Combine}
    if not isinstance(fields, dict) or fields.get("op") not in tuple(kinds):
        raise ValueError(f"an operation must be {' or '.join(kinds)}, got {fields!r:.80}")
    kind = kinds[fields.pop("op")]
    for name in ("b", "interval"):
        if fields.get(name) is not None:
            if not isinstance(fields[name], list):
                raise ValueError(f"{name} must be a list, got {fields[name]!r:.80}")
            fields[name] = tuple(fields[name])
    return kind(**fields)


def freeze(
    ops: Iterable[Op],
    *,
    prediction: Prediction,
    depth: int,
    solver: str = "custom",
    grid: str = "custom",
    sigmas: Sequence[float] = (),
) -> Plan:
    """Drain a static solver's generator into a plan.

    Args:
        ops: the operations, in order
        prediction, depth: what the history holds, "eps" or "x0", and how many outputs are kept
        solver, grid, sigmas: for the record

    Raises:
        ValueError: it needs replies from the network (a solver that adapts has no plan).
    """
    try:
        drained = tuple(ops)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{solver} adapts to the network, so it has no plan ({error})") from error
    return Plan(prediction, depth, solver, grid, tuple(sigmas), drained)


def nfe(plan: Plan) -> int:
    """Number of network evaluations that the plan spends."""
    return sum(isinstance(op, Eval) and op.source == "net" for op in _plan(plan).ops)


def _plan(plan: Plan) -> Plan:
    if not isinstance(plan, Plan):
        raise ValueError(f"plan must be a Plan, got {plan!r:.80}; freeze makes one of operations")
    return plan


def in_numbers(op: Op) -> Op:
    """The same with Python floats: the mean over samples, where they differ between these."""
    if isinstance(op, Eval):
        cond = None if op.cond is None else _number(op.cond)
        return op._replace(sigma=_number(op.sigma), cond=cond)
    b = tuple(_number(weight) for weight in op.b)
    return op._replace(b=b, sigma=_number(op.sigma), a=_number(op.a), noise=_number(op.noise))


def _number(value: Level) -> float:
    return value.detach().mean().item() if isinstance(value, Tensor) else value


def levels(ops: Sequence[Op]) -> tuple[float, ...]:
    """Where the operations evaluate, and last where they end: each level once, in that order."""
    seen = [float(op.sigma) for op in ops if isinstance(op, Eval)]
    return tuple(dict.fromkeys((*seen, float(ops[-1].sigma))))


def flatten(plan: Plan) -> np.ndarray:
    """The plan's end as one row of weights over [x_T, D_0, D_1, ...], float64 [1 + evals].

    One column per Eval, the analytic ones included (the "mean" source has its weight there; that of
    "zero" is 0, since it depends on x alone). Two deterministic solvers are equal when their rows
    are. Noise is left out.
    """
    return stages(plan)[-1]


def stages(plan: Plan) -> np.ndarray:
    """The states of all evaluations, and last the end, as rows of such weights, [evals + 1, 1 +
    evals]."""
    evals = sum(isinstance(op, Eval) for op in _plan(plan).ops)
    unit = np.eye(1 + evals)
    anchor = x = unit[0]
    history: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    for op in plan.ops:
        if isinstance(op, Eval):
            rows.append(x)
            sigma = float(op.sigma)
            own = unit[len(rows)]
            eps = x / math.sqrt(1 + sigma**2) if op.source == "zero" else (x - own) / sigma
            output = eps if plan.prediction == "eps" else x - sigma * eps
            history = [output, *history[: plan.depth - 1]]
        else:
            terms = (float(b) * h for b, h in zip(op.b, history, strict=False))
            x = sum(terms, float(op.a) * anchor)
            anchor = x if op.accept else anchor
    return np.stack([*rows, x])


def gain(plan: Plan) -> float:
    """The largest sum of the weights' sizes of the D's in any state; 1 where all are means of D's.

    An error of the network is multiplied by at most this. In Heun's method from t to s the output
    at s has the weight (t - s) / (2 s).
    """
    return float(np.abs(stages(plan)[:, 1:]).sum(1).max())
