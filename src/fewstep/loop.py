"""The loop: the one place that touches pixels while sampling.

It drives any solver's operations over any denoiser D(x, sigma): evaluates, turns D into eps where
the solver's history holds eps (with the x of that very evaluation), and forms the linear
combinations. It reads no value off a tensor, so it never waits for the device, and it leaves grad
mode to the caller.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.grid import check_grid, make_grid
from fewstep.noise import brownian, normal
from fewstep.plan import Combine, Eval, Level, Ops, Plan, Prediction, Seen
from fewstep.solver import Solver, get, intervals_for

__all__ = ["Denoiser", "State", "iterate", "solve"]

Denoiser = Callable[[Tensor, Tensor], Tensor]
Row = tuple[Level, ...]
DEFAULT_RANGE = (0.002, 80.0)  # EDM's
DEFAULT_GRID = "karras"


@dataclass(frozen=True, slots=True)
class State:
    """Where sampling stands after an accepted step.

    x: [b, ...] in EDM units
    history: past outputs, newest first, eps or D as the solver has it
    denoised: the network's last D
    sigma: the level of x, float or [b]
    nfe: evaluations spent
    """

    x: Tensor
    history: tuple[Tensor, ...]
    denoised: Tensor | None
    sigma: float | Tensor
    nfe: int


@dataclass(frozen=True, slots=True)
class Program:
    """What the loop runs: operations, and the facts that their header declares."""

    ops: Ops
    prediction: Prediction
    depth: int


def program_for(
    solver: str | Solver | Plan,
    nfe: int,
    grid: str | Sequence[float] | None,
    sigma_range: tuple[float, float],
    schedule: Any,
    first: str,
    final: bool,
) -> tuple[Program, tuple[float, ...]]:
    """Resolve names and budgets. sigma_range: (sigma_min, sigma_max). Returns the program and its
    sigmas."""
    if isinstance(solver, Plan):
        if grid is not None or first != "none" or final:
            raise ValueError("a plan has its own grid and ends: leave out grid, first and final")
        return Program(solver.program(), solver.prediction, solver.depth), solver.sigmas
    if isinstance(solver, str):
        solver = get(solver)
    if grid is None or isinstance(grid, str):
        points = 1 + intervals_for(solver, nfe, first, final)
        low, high = sigma_range
        sigmas = make_grid(grid or DEFAULT_GRID, points, high, low, schedule)
    else:
        sigmas = check_grid(grid)
    if solver.adapts:
        ops = solver.program(sigmas, first, final)
    else:
        ops = solver.plan(sigmas, first, final).program()
    return Program(ops, solver.prediction, solver.depth), sigmas


def solve(
    denoiser: Denoiser,
    x_T: Tensor,
    solver: str | Solver | Plan = "dpmpp-2m",
    nfe: int = 5,
    *,
    grid: str | Sequence[float] | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    seeds: Sequence[int] | None = None,
    first: str = "none",
    final: bool = False,
) -> Tensor:
    """Solve the probability-flow ODE (or the SDE) from x_T with exactly `nfe` evaluations of the
    denoiser.

    denoiser: any callable D(x [b, ...], sigma [b]) -> [b, ...], the expected clean picture
    x_T: the start, [b, ...]: noise of standard deviation sigma_max, or a picture plus such noise,
        to start in the middle
    solver: a name, with options if need be ("ddim-eta:eta=0.5"), a Solver or a Plan
    grid: "karras" (the default), "log-snr", "time-uniform", "discrete" or "trailing"; or strictly
        decreasing sigmas, from which nfe then follows
    sigma_min, sigma_max: the denoiser's own where left out, else 0.002 and 80
    seeds: one integer per picture, needed by stochastic solvers
    first: analytic first step, at no evaluation: "none", "zero" as published, or "mean", which
        needs `denoiser.far_mean`
    final: spend the last evaluation at the grid's end and return its D

    Returns x at the grid's end (at sigma_min, or at 0 with `final`), [b, ...], float32, or float64
    where x_T is. Runs in the caller's grad mode.
    Errors: ValueError for unknown names, impossible budgets, stochastic solvers without seeds, and
    a denoiser that returns another shape.
    """
    reuse = not torch.is_grad_enabled()
    x = x_T
    for state in _iterate(
        denoiser, x_T, solver, nfe, grid, sigma_min, sigma_max, seeds, first, final, reuse
    ):
        x = state.x
    return x


def iterate(
    denoiser: Denoiser,
    x_T: Tensor,
    solver: str | Solver | Plan = "dpmpp-2m",
    nfe: int = 5,
    *,
    grid: str | Sequence[float] | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    seeds: Sequence[int] | None = None,
    first: str = "none",
    final: bool = False,
) -> Generator[State, State | None, None]:
    """`solve`, one accepted state at a time.

    Yields a `State` after each accepted step and goes on from the State that is sent back, or from
    its own. That serves previews, progress, projections (in-painting), restarts and detaching;
    close the generator to cancel. Arguments and errors as in `solve`. The tensors of a yielded
    State are never written to again.
    """
    return _iterate(
        denoiser, x_T, solver, nfe, grid, sigma_min, sigma_max, seeds, first, final, False
    )


def _iterate(
    denoiser, x_T, solver, nfe, grid, sigma_min, sigma_max, seeds, first, final, reuse
) -> Generator[State, State | None, None]:
    low = _end(denoiser, "sigma_min", sigma_min, DEFAULT_RANGE[0])
    high = _end(denoiser, "sigma_max", sigma_max, DEFAULT_RANGE[1])
    schedule = getattr(denoiser, "schedule", None)
    program, _ = program_for(solver, nfe, grid, (low, high), schedule, first, final)
    if seeds is not None and len(seeds) != len(x_T):
        raise ValueError(f"seeds must have one entry per picture, got {len(seeds)} for {len(x_T)}")
    return _run(program, denoiser, x_T, seeds, reuse)


def _end(denoiser: Denoiser, name: str, given: float | None, default: float) -> float:
    """An end of the range: the caller's, else the denoiser's own, else the default."""
    own = getattr(denoiser, name, None)
    return given if given is not None else default if own is None else own


def _run(
    program: Program, denoiser: Denoiser, x_T: Tensor, seeds: Sequence[int] | None, reuse: bool
) -> Generator[State, State | None, None]:
    """Drive the operations. reuse: write into buffers of earlier steps; only for callers that keep
    no State."""
    as_eps = program.prediction == "eps"
    anchor = x = x_T if x_T.dtype == torch.float64 else x_T.float()
    history: deque[Tensor] = deque(maxlen=program.depth)
    denoised = spare = reply = None
    evals = draws = 0
    # Since the anchor was set: the D's, oldest first; x and the outputs (newest first) as weights
    # over [anchor, D_0, D_1, ...]; x has none where it came from older outputs or took up noise.
    fresh: list[Tensor] = []
    place: Row | None = (1.0,)
    rows: list[Row] = []
    ops = program.ops
    while True:
        try:
            op = ops.send(reply)
        except StopIteration:
            return
        if isinstance(op, Eval):
            denoised, features = _evaluate(denoiser, x, op, reuse)
            evals += op.source == "net"
            if as_eps:
                old = history[-1] if reuse and len(history) == program.depth else None
                output = _to_eps(x, denoised, op.sigma, old)
                if place is None:
                    rows = []
                else:
                    fresh = [*fresh, denoised]
                    rows = [_eps_row(place, len(fresh), op.sigma), *rows[: program.depth - 1]]
            else:
                output = denoised
            history.appendleft(output)
            reply = Seen(x, denoised, features)
            continue
        reply = None
        if 0 < len(op.b) <= len(rows):
            place = _in_d_form(op, rows, len(fresh))
            x = _combine(anchor, fresh, place[0], place[1:], spare)
        else:
            place = None
            x = _combine(anchor, history, op.a, op.b, spare)
        if op.noise:
            place = None
            x = x + op.noise * _noise(seeds, op, draws, x)
            draws += 1
        if not op.accept:
            spare = x if reuse else None
            continue
        spare = anchor if reuse and anchor is not x_T else None
        anchor, fresh, place, rows = x, [], (1.0,), []
        sent = yield State(x, tuple(history), denoised, op.sigma, evals)
        if sent is not None:
            anchor = x = sent.x
            history = deque(sent.history[: program.depth], maxlen=program.depth)


def _evaluate(denoiser: Denoiser, x: Tensor, op: Eval, reuse: bool) -> tuple[Tensor, Tensor | None]:
    features = None
    if op.source == "net":
        told = op.sigma if op.cond is None else op.cond
        if isinstance(told, Tensor):
            sigma = told.to(x).expand(x.shape[0])
        else:
            sigma = torch.full((x.shape[0],), told, dtype=x.dtype, device=x.device)
        if op.features and hasattr(denoiser, "with_features"):
            denoised, features = denoiser.with_features(x, sigma)  # type: ignore[attr-defined]
        else:
            denoised = denoiser(x, sigma)
        if denoised.shape != x.shape:
            raise ValueError(
                f"the denoiser returned {tuple(denoised.shape)} for x of {tuple(x.shape)}; "
                "D must have the shape of x"
            )
    elif op.source == "zero":
        # eps = x / sqrt(1 + sigma^2) presumes data of mean 0 and variance 1
        sigma = float(op.sigma)
        denoised = x * (1 - sigma / math.sqrt(1 + sigma**2))
    else:
        mean = getattr(denoiser, "far_mean", None)
        if mean is None:
            raise ValueError(
                "first='mean' needs denoiser.far_mean, the mean of D at sigma_max; "
                "set it, or use first='zero'"
            )
        denoised = mean.to(x).expand_as(x)
    denoised = denoised.to(x.dtype)
    if denoised is x or (reuse and denoised.data_ptr() == x.data_ptr()):
        denoised = denoised.clone()  # x's memory may be written to again
    return denoised, features


def _to_eps(x: Tensor, denoised: Tensor, sigma: float | Tensor, out: Tensor | None) -> Tensor:
    if isinstance(sigma, Tensor):
        return (x - denoised) / _column(sigma, x)
    return torch.sub(x, denoised, out=out).mul_(1 / sigma)


def _eps_row(place: Row, count: int, sigma: Level) -> Row:
    """Weights of eps = (x - D) / sigma over [anchor, *D's], from x's; D is the last of `count`."""
    padded = (*place, *[0.0] * (count - len(place)))
    return (*(weight / sigma for weight in padded), -1 / sigma)


def _in_d_form(op: Combine, rows: Sequence[Row], count: int) -> Row:
    """Weights of the same step over [anchor, *D's], where all its outputs came after the anchor.

    a x + b (x - D) / sigma = (a + b / sigma) x - (b / sigma) D: no cancellation where sigma is
    huge, as at the start of a flow model.
    """
    total: list[Level] = [op.a, *[0.0] * count]
    for b, row in zip(op.b, rows, strict=False):
        for k, weight in enumerate(row):
            total[k] = total[k] + b * weight
    return tuple(total)


def _combine(
    anchor: Tensor, history: Sequence[Tensor], a: Level, b: Row, out: Tensor | None
) -> Tensor:
    if len(b) > len(history):
        raise ValueError(
            f"a step uses {len(b)} outputs, but only {len(history)} are in the history"
        )
    floats = [weight for weight in b if not isinstance(weight, Tensor)]
    if isinstance(a, Tensor) or len(floats) < len(b):
        x = _column(a, anchor) * anchor
        for weight, output in zip(b, history, strict=False):
            x = x + _column(weight, anchor) * output
        return x
    if not b:
        return torch.mul(anchor, a, out=out)
    if a == 1:
        x = torch.add(anchor, history[0], alpha=floats[0], out=out)
    else:
        x = torch.mul(anchor, a, out=out).add_(history[0], alpha=floats[0])
    for weight, output in zip(floats[1:], list(history)[1:], strict=False):
        if weight:
            x.add_(output, alpha=weight)
    return x


def _column(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A per-sample number shaped to multiply x."""
    return value.to(x).reshape(-1, *[1] * (x.ndim - 1)) if isinstance(value, Tensor) else value


def _noise(seeds: Sequence[int] | None, op: Combine, index: int, x: Tensor) -> Tensor:
    if seeds is None:
        raise ValueError("a stochastic solver needs seeds, one per picture")
    shape = x.shape[1:]
    if op.interval is None:
        return normal(seeds, shape, "step", index, x.dtype).to(x.device)
    return brownian(seeds, shape, op.interval, x.dtype).to(x.device)
