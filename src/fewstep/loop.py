"""The loop: the one place that touches pixels while sampling.

It drives any solver's operations over any denoiser D(x, sigma): evaluates, turns D into eps where
the solver's history holds eps (with the x of that very evaluation), and forms the linear
combinations. It reads no value off a tensor, so it never waits for the device, and it leaves grad
mode to the caller.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser, per_sample
from fewstep.grid import check_grid, make_grid
from fewstep.noise import brownian, normal
from fewstep.plan import Combine, Eval, Level, Program, Seen
from fewstep.solver import Solver, end_at, get, intervals_for

__all__ = ["Denoiser", "State", "iterate", "solve"]

Row = tuple[Level, ...]
DEFAULT_RANGE = (0.002, 80.0)  # EDM's
DEFAULT_GRID = "karras"
DEFAULT_NFE = 5


@dataclass(frozen=True, slots=True)
class State:
    """Where sampling stands after an accepted step.

    x: [b, ...] in EDM units
    history: past outputs, newest first, eps or D as the solver has it
    denoised: the last D, of the network or of its analytic stand-in
    sigma: the level of x, float or [b]
    nfe: evaluations spent
    """

    x: Tensor
    history: tuple[Tensor, ...]
    denoised: Tensor | None
    sigma: float | Tensor
    nfe: int


class Runnable(Protocol):
    """What can stand for a solver besides a name and a Solver: a Plan, a learned solver, ..."""

    def program(self) -> Program: ...


def find(solver: str | Path, nfe: int | None = None) -> Solver | Runnable:
    """A solver by name, or a learned one by its folder, or by a folder that has one for each budget
    under its number. Errors: ValueError where there is none."""
    if "/" not in str(solver) and not is_folder(solver):
        try:
            return get(str(solver))
        except ValueError:
            if not Path(solver).is_dir():
                raise
    from fewstep.learned.solver import LearnedSolver  # it imports the loop

    return LearnedSolver.load(Path(solver), DEFAULT_NFE if nfe is None else nfe)


def is_folder(solver: str | Path) -> bool:
    """Whether it is a folder of learned solvers."""
    patterns = ("solver.json", "[0-9]*/solver.json")
    return any(any(Path(solver).glob(pattern)) for pattern in patterns)


def resolve(
    solver: str | Solver | Runnable,
    nfe: int | None,
    grid: str | Sequence[float] | None,
    afs: str,
    final: bool,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    denoiser: Denoiser | None = None,
    end: str = "sigma_min",
) -> Program:
    """What the loop will run. sigma_min, sigma_max, end: as in `solve`, where the grid is a
    name."""
    if isinstance(solver, str | Path):
        solver = find(solver, nfe)
    elif not isinstance(solver, Solver) and not hasattr(solver, "program"):
        raise ValueError(
            "solver must be a name, a Solver, a Plan, or have a method program(), "
            f"got {solver!r:.80}"
        )
    if not isinstance(solver, Solver):
        taken = {
            "grid": grid is not None,
            "afs": afs != "none",
            "final": final,
            "end": end != "sigma_min",
            "sigma_min": sigma_min is not None,
            "sigma_max": sigma_max is not None,
        }
        if extra := [name for name, is_given in taken.items() if is_given]:
            raise ValueError(
                "a plan, or a learned solver, has its own grid, first step and end: leave out "
                + ", ".join(extra)
            )
        program = solver.program()
        if program.learned_on is not None and nfe not in (None, program.evaluations):
            raise ValueError(
                f"{program.name} was trained for nfe={program.evaluations}, got nfe={nfe}; "
                "leave nfe out, or train one for that budget"
            )
        return program
    given = sigma_min is not None or sigma_max is not None
    if grid is not None and not isinstance(grid, str):
        if given or end != "sigma_min":
            raise ValueError("sigmas have their own ends: leave out end, sigma_min and sigma_max")
        return solver.on(check_grid(grid), afs, final)
    budget = DEFAULT_NFE if nfe is None else nfe
    points = 1 + intervals_for(solver, budget, afs, final, end)
    low = _end(denoiser, "sigma_min", sigma_min, DEFAULT_RANGE[0])
    high = _end(denoiser, "sigma_max", sigma_max, DEFAULT_RANGE[1])
    schedule = getattr(denoiser, "schedule", None)
    name = DEFAULT_GRID if grid is None else grid
    return solver.on(end_at(make_grid(name, points, high, low, schedule), end), afs, final)


def solve(
    denoiser: Denoiser,
    x_T: Tensor,
    solver: str | Solver | Runnable = "dpmpp-2m",
    nfe: int | None = None,
    *,
    grid: str | Sequence[float] | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    seeds: Sequence[int] | None = None,
    afs: str = "none",
    final: bool = False,
    end: str = "sigma_min",
) -> Tensor:
    """Solve the probability-flow ODE (or the SDE) from x_T with exactly `nfe` evaluations of the
    denoiser.

    denoiser: any callable D(x [b, ...], sigma [b]) -> [b, ...], the expected clean picture
    x_T: the start, [b, ...]: noise of standard deviation sigma_max, or a picture plus such noise,
        to start in the middle
    solver: a name, with options if need be ("ddim-eta:eta=0.5"), a Solver, a Plan, or anything else
        with a method `program()`, or the folder of a learned solver, or one that has such a folder
        for each budget (runs/tuned with 3, 5, 7 in it)
    nfe: the budget, 5 unless given, or a learned solver's own; what is passed here is not looked
        at beside sigmas or a plan, from which it follows
    grid: "karras" (the default), "log-snr", "time-uniform", "discrete" or "trailing"; or strictly
        decreasing sigmas
    sigma_min, sigma_max: the denoiser's own where left out, else 0.002 and 80
    seeds: one integer per picture, needed by stochastic solvers
    afs: analytic first step, at no evaluation: "none", "zero" as published, or "mean", which
        needs `denoiser.far_mean` and a start at the denoiser's sigma_max
    final: spend the last evaluation at the grid's end and return its D
    end: where a named grid ends: "sigma_min", or "zero", its last point moved to 0, which costs
        nothing: there solvers that work on D take a step of order 1, as public implementations do

    Returns x at the grid's end (at sigma_min, or at 0 with `final` or `end`), [b, ...], float32, or
    float64 where x_T is. Runs in the caller's grad mode.
    Errors: ValueError for unknown names, impossible budgets, stochastic solvers without seeds, and
    a denoiser that returns another shape, or no tensor. What is not finite stays the caller's.
    """
    reuse = not torch.is_grad_enabled()
    x = x_T
    for state in _iterate(
        denoiser, x_T, solver, nfe, grid, sigma_min, sigma_max, seeds, afs, final, end, reuse
    ):
        x = state.x
    return x


def iterate(
    denoiser: Denoiser,
    x_T: Tensor,
    solver: str | Solver | Runnable = "dpmpp-2m",
    nfe: int | None = None,
    *,
    grid: str | Sequence[float] | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    seeds: Sequence[int] | None = None,
    afs: str = "none",
    final: bool = False,
    end: str = "sigma_min",
) -> Generator[State, State | None, None]:
    """`solve`, one accepted state at a time.

    Yields a `State` after each accepted step and goes on from the State that is sent back, or from
    its own. That serves previews, progress, projections (in-painting), restarts and detaching;
    close the generator to cancel. Arguments and errors as in `solve`. The tensors of a yielded
    State are never written to again.
    """
    return _iterate(
        denoiser, x_T, solver, nfe, grid, sigma_min, sigma_max, seeds, afs, final, end, False
    )


def _iterate(
    denoiser, x_T, solver, nfe, grid, sigma_min, sigma_max, seeds, afs, final, end, reuse
) -> Generator[State, State | None, None]:
    program = resolve(solver, nfe, grid, afs, final, sigma_min, sigma_max, denoiser, end)
    if seeds is not None and len(seeds) != len(x_T):
        raise ValueError(f"seeds must have one entry per picture, got {len(seeds)} for {len(x_T)}")
    return _run(program, denoiser, x_T, seeds, reuse and not program.adapts)


def far_mean(denoiser: Denoiser) -> Tensor:
    """Errors: ValueError where the denoiser does not know it."""
    mean = getattr(denoiser, "far_mean", None)
    if mean is None:
        raise ValueError(
            "afs='mean' needs denoiser.far_mean, the mean of D at sigma_max; "
            "set it, or use afs='zero'"
        )
    return mean


def check_mean_start(sigma: Level, sigma_max: float | None) -> None:
    """far_mean is the mean of D at sigma_max, and stands for no D below it.

    Errors: ValueError for an analytic first step "mean" from below.
    """
    if sigma_max is None or isinstance(sigma, Tensor) or starts_at(sigma, sigma_max):
        return
    if sigma < sigma_max:
        raise ValueError(
            f"afs='mean' holds at sigma_max, {sigma_max:g}, and this starts at {sigma:g}; "
            "take afs='none' or 'zero'"
        )


def starts_at(sigma: float, level: float) -> bool:
    """Whether two levels are one, but for what float32 makes of them."""
    return math.isclose(sigma, level, rel_tol=1e-6)


def _end(denoiser: Denoiser | None, name: str, given: float | None, default: float) -> float:
    """An end of the range: the caller's, else the denoiser's own, else the default."""
    own = getattr(denoiser, name, None)
    return given if given is not None else default if own is None else own


class Ledger:
    """Which combinations of D's, and of the anchor, the state and the eps outputs are.

    a x + b (x - D) / sigma = (a + b / sigma) x - (b / sigma) D, so a step whose outputs all came
    after the anchor can be taken in D-form: no cancellation where sigma is huge, as at the start of
    a flow model, where float32 would lose the picture.

    denoised: the D's since the anchor, oldest first
    state: the state's weights over [anchor, *denoised]; None where it came from older outputs or
        took up noise
    outputs: the same of each eps since then, newest first
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.restart()

    def restart(self) -> None:
        """The state has become the anchor."""
        self.denoised: list[Tensor] = []
        self.state: Row | None = (1.0,)
        self.outputs: list[Row] = []

    def evaluated(self, denoised: Tensor, sigma: Level) -> None:
        """eps = (x - D) / sigma has joined the history."""
        if self.state is None:
            self.outputs = []
            return
        self.denoised.append(denoised)
        padded = (*self.state, *[0.0] * (len(self.denoised) - len(self.state)))
        row = (*(weight / sigma for weight in padded), -1 / sigma)
        self.outputs = [row, *self.outputs[: self.depth - 1]]

    def combined(self, op: Combine) -> Row | None:
        """A step's weights over [anchor, *denoised], now the state's; None: it has no D-form."""
        self.state = None
        if 0 < len(op.b) <= len(self.outputs):
            total: list[Level] = [op.a, *[0.0] * len(self.denoised)]
            for b, row in zip(op.b, self.outputs, strict=False):
                for k, weight in enumerate(row):
                    total[k] = total[k] + b * weight
            self.state = tuple(total)
        return self.state


def _run(
    program: Program, denoiser: Denoiser, x_T: Tensor, seeds: Sequence[int] | None, reuse: bool
) -> Generator[State, State | None, None]:
    """Drive the operations. reuse: write into buffers of earlier steps; only for callers that keep
    no State and solvers that keep no reply."""
    as_eps = program.prediction == "eps"
    anchor = x = x_T if x_T.dtype == torch.float64 else x_T.float()
    history: deque[Tensor] = deque(maxlen=program.depth)
    ledger = Ledger(program.depth)
    denoised = spare = reply = None
    evals = draws = 0
    ops = program.start()
    while True:
        try:
            op = ops.send(reply)
        except StopIteration:
            return
        if isinstance(op, Eval):
            denoised, features = _evaluate(denoiser, x, op, reuse)
            evals += op.source == "net"
            output = denoised
            if as_eps:
                old = history[-1] if reuse and len(history) == program.depth else None
                output = _to_eps(x, denoised, op.sigma, old)
                ledger.evaluated(denoised, op.sigma)
            history.appendleft(output)
            reply = Seen(x, denoised, features)
            continue
        reply = None
        row = ledger.combined(op) if as_eps else None
        if row is None:
            x = _combine(anchor, history, op.a, op.b, spare)
        else:
            x = _combine(anchor, ledger.denoised, row[0], row[1:], spare)
        if isinstance(op.noise, Tensor) or op.noise:
            ledger.state = None
            x = x + per_sample(op.noise, x) * _noise(seeds, op, draws, x)
            draws += 1
        if not op.accept:
            spare = x if reuse else None
            continue
        spare = anchor if reuse and anchor is not x_T else None
        anchor = x
        ledger.restart()
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
        if not isinstance(denoised, Tensor):
            raise ValueError(
                f"the denoiser returned a {type(denoised).__name__}; it must return D alone, a "
                "tensor (take [0] of a tuple, .sample of an output of diffusers)"
            )
        if denoised.shape != x.shape:
            raise ValueError(
                f"the denoiser returned {tuple(denoised.shape)} for x of {tuple(x.shape)}; "
                "D must have the shape of x"
            )
    elif op.source == "zero":
        # eps = x / root, root = sqrt(1 + sigma^2): D = x - sigma eps = x / (root (root + sigma))
        root = (1 + op.sigma * op.sigma) ** 0.5
        denoised = x * per_sample(1 / (root * (root + op.sigma)), x)
    else:
        mean = far_mean(denoiser)
        check_mean_start(op.sigma, getattr(denoiser, "sigma_max", None))
        denoised = mean.to(x).expand_as(x)
    denoised = denoised.to(x.dtype)
    if denoised.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        denoised = denoised.clone()  # x's memory may be written to again
    return denoised, features


def _to_eps(x: Tensor, denoised: Tensor, sigma: float | Tensor, out: Tensor | None) -> Tensor:
    if isinstance(sigma, Tensor):
        return (x - denoised) / per_sample(sigma, x)
    return torch.sub(x, denoised, out=out).mul_(1 / sigma)


def _combine(
    anchor: Tensor, history: Sequence[Tensor], a: Level, b: Row, out: Tensor | None
) -> Tensor:
    if len(b) > len(history):
        raise ValueError(
            f"a step uses {len(b)} outputs, but only {len(history)} are in the history"
        )
    floats = [weight for weight in b if not isinstance(weight, Tensor)]
    if isinstance(a, Tensor) or len(floats) < len(b):
        x = per_sample(a, anchor) * anchor
        for weight, output in zip(b, history, strict=False):
            x = x + per_sample(weight, anchor) * output
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


def _noise(seeds: Sequence[int] | None, op: Combine, index: int, x: Tensor) -> Tensor:
    if seeds is None:
        raise ValueError("a stochastic solver needs seeds, one per picture")
    shape = x.shape[1:]
    if op.interval is None:
        noise = normal(seeds, shape, "step", index, x.dtype)
    else:
        noise = brownian(seeds, shape, op.interval, x.dtype)
    if x.device.type == "cuda":  # from pinned memory the copy does not wait for the device
        noise = noise.pin_memory()
    return noise.to(x.device, non_blocking=True)
