"""The loop: the one place that touches pixels while sampling.

A `Stepper` holds a program at work on one state. It asks for D at a state and a noise level, is
told it, turns D into eps where the solver's history holds eps (with the x of that very
evaluation), and forms the linear combinations. `run` answers it with a denoiser; the scheduler for
diffusers answers it with a pipeline's own calls. Neither reads a value off a tensor, so nothing
waits for the device, and grad mode is the caller's.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.arguments import function
from fewstep.denoiser import Covariance, Denoiser, per_sample, threshold
from fewstep.noise import brownian, normal
from fewstep.plan import Combine, Eval, Level, Program, Seen

__all__ = [
    "State",
    "Stepper",
    "check_known",
    "check_mean_start",
    "covariance",
    "far_mean",
    "finish",
    "run",
    "seeded",
    "stand_in",
    "starts_at",
]

Row = tuple[Level, ...]
Draw = Callable[[Combine, int, Tensor], Tensor]  # (step, number of the draw, x) -> noise like x


@dataclass(frozen=True, slots=True)
class State:
    """Where sampling stands after an accepted step.

    Attributes:
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


class Stepper:
    """A program at work on one state, without a network: it asks for D and is told it.

        stepper = Stepper(program, x_T, seeded(seeds))
        while (op := stepper.ask()) is not None:
            stepper.tell(D(stepper.x, op.sigma))
        x = stepper.x

    `advance` goes the same way and stops at each accepted state too.

    Attributes:
        x: the state, [b, ...], float32, or float64 where x_T is
        nfe: network evaluations told so far
        draw: gives the noise of stochastic steps
        denoised: the last D, of the network or of its analytic stand-in
        at_rest: whether x is an accepted state, and no trial stage
    """

    def __init__(
        self, program: Program, x_T: Tensor, draw: Draw | None = None, reuse: bool = False
    ) -> None:
        """
        Args:
            program: what to run
            x_T: the start, [b, ...]; never written to
            draw: gives the noise of stochastic steps, see `seeded`
            reuse: write into buffers of earlier steps. Only for callers that keep no State and
                programs that keep no reply.
        """
        self.x = self.anchor = x_T if x_T.dtype == torch.float64 else x_T.float()
        self.nfe = 0
        self.at_rest = True
        self.draw, self._program, self._sent = draw, program, 0
        self._start, self._reuse = x_T, reuse and not program.adapts
        self._depth, self._as_eps = program.depth, program.prediction == "eps"
        self._history: deque[Tensor] = deque(maxlen=program.depth)
        self._ledger = Ledger(program.depth)
        self._ops = program.start()
        self.denoised: Tensor | None = None
        self._pending: Eval | None = None
        self._reply: Seen | None = None
        self._spare: Tensor | None = None
        self._draws = 0

    def ask(self) -> Eval | None:
        """The evaluation that comes next, at the state x; None at the end."""
        while isinstance(found := self.advance(), State):
            pass
        return found

    def advance(self) -> Eval | State | None:
        """Go on to the next evaluation or accepted state; None at the end."""
        if self._pending is not None:
            return self._pending
        while True:
            try:
                op = self._ops.send(self._reply)
            except StopIteration:
                return None
            self._reply, self._sent = None, self._sent + 1
            if isinstance(op, Combine):
                if self._combine(op):
                    return State(self.x, tuple(self._history), self.denoised, op.sigma, self.nfe)
                continue
            self._pending = op
            if op.source != "zero":
                return op
            # eps = x / root, root = sqrt(1 + sigma^2), so D = x / (root (root + sigma))
            root = (1 + op.sigma * op.sigma) ** 0.5
            self.tell(self.x * per_sample(1 / (root * (root + op.sigma)), self.x))

    def tell(self, denoised: Tensor, features: Tensor | None = None) -> None:
        """D at the state x, the answer to the evaluation that was asked for.

        Args:
            denoised: D, [b, ...]
            features: of the network, where the evaluation asks for them

        Raises:
            ValueError: nothing was asked for.
        """
        op, x = self._pending, self.x
        if op is None:
            raise ValueError("no evaluation is asked for; call ask first")
        self._pending = None
        self.nfe += op.source == "net"
        denoised = denoised.to(x.dtype)
        if self._program.quantile is not None:
            denoised = threshold(denoised, self._program.quantile)
        if denoised.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            denoised = denoised.clone()  # x's memory may be written to again
        output = denoised
        if op.source != "path":  # which is a state
            self.denoised = denoised
        if self._as_eps:
            full = self._reuse and len(self._history) == self._depth
            output = _to_eps(x, denoised, op.sigma, self._history[-1] if full else None)
            self._ledger.evaluated(denoised, op.sigma)
        self._history.appendleft(output)
        self._reply = Seen(x, denoised, features)

    def put(self, x: Tensor, history: Sequence[Tensor] | None = None) -> None:
        """Go on from another x. At rest it is the anchor of the next step; in a trial stage the
        anchor stays.

        Args:
            x: like the state
            history: past outputs in place of those so far, newest first
        """
        self.x = x
        if self.at_rest:
            self.anchor = x
            self._ledger.restart()
        if history is not None:
            self._history = deque(history[: self._depth], maxlen=self._depth)

    def __deepcopy__(self, memo: dict[int, Any]) -> Stepper:
        """One that goes on by itself, for programs that do not adapt. Tensors are shared, since
        without `reuse` none is written to again."""
        if self._program.adapts or self._reuse:
            raise TypeError("a run that adapts to the network, or reuses memory, has no copy")
        twin = object.__new__(Stepper)
        twin.__dict__.update(self.__dict__)
        twin._history = self._history.copy()
        twin._ledger = copy.copy(self._ledger)
        twin._ledger.denoised = self._ledger.denoised.copy()
        twin._ledger.outputs = self._ledger.outputs.copy()
        twin._replay()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """All but the generator, which is started again; for programs that do not adapt."""
        if self._program.adapts or self._reuse:
            raise TypeError("a run that adapts to the network, or reuses memory, has no copy")
        return {name: value for name, value in self.__dict__.items() if name != "_ops"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._replay()

    def _replay(self) -> None:
        """A new generator, taken to where the run stands."""
        self._ops = self._program.start()
        for _ in range(self._sent):
            next(self._ops)

    def close(self) -> None:
        """End the program."""
        self._ops.close()

    def _combine(self, op: Combine) -> bool:
        """Take one step; returns whether it is accepted."""
        row = self._ledger.combined(op) if self._as_eps else None
        if row is None:
            x = _sum(self.anchor, self._history, op.a, op.b, self._spare)
        else:
            x = _sum(self.anchor, self._ledger.denoised, row[0], row[1:], self._spare)
        if isinstance(op.noise, Tensor) or op.noise:
            if self.draw is None:
                raise ValueError("a stochastic solver needs seeds, one per picture")
            self._ledger.state = None
            x = x + per_sample(op.noise, x) * self.draw(op, self._draws, x)
            self._draws += 1
        self.x, self.at_rest = x, op.accept
        if not op.accept:
            self._spare = x if self._reuse else None
            return False
        self._spare = self.anchor if self._reuse and self.anchor is not self._start else None
        self.anchor = x
        self._ledger.restart()
        return True


def run(
    program: Program,
    denoiser: Denoiser,
    x_T: Tensor,
    seeds: Sequence[int] | None = None,
    reuse: bool = False,
) -> Generator[State, State | None, None]:
    """Run a program on a denoiser, one accepted state at a time.

    Goes on from the State that is sent back, or from its own.

    Args:
        program: what `fewstep.solving.resolve` found, or anything's `program()`
        denoiser: D(x [b, ...], sigma [b]) -> [b, ...]
        x_T: the start, [b, ...]
        seeds: one per picture, needed by stochastic solvers
        reuse: as in `Stepper`

    Raises:
        ValueError: x_T is no tensor [b, ...], seeds do not fit it, or D has another shape than x.
    """
    function("denoiser", denoiser, "D(x, sigma)")
    if not isinstance(x_T, Tensor) or x_T.ndim < 1:
        found = f"shape {tuple(x_T.shape)}" if isinstance(x_T, Tensor) else type(x_T).__name__
        raise ValueError(f"x_T must be a tensor [b, ...], one row a picture, got {found}")
    if seeds is not None and not hasattr(seeds, "__len__"):
        raise ValueError(f"seeds must be whole numbers, one per picture, got {seeds!r:.80}")
    if seeds is not None and len(seeds) != len(x_T):
        raise ValueError(f"seeds must have one entry per picture, got {len(seeds)} for {len(x_T)}")
    return _run(Stepper(program, x_T, None if seeds is None else seeded(seeds), reuse), denoiser)


def finish(
    program: Program, denoiser: Denoiser, x_T: Tensor, seeds: Sequence[int] | None = None
) -> Tensor:
    """x at the end of `run`. Memory is reused where gradients are off.

    Args:
        program, denoiser, x_T, seeds: as in `run`

    Returns:
        x at the program's end, like x_T, in float32 or x_T's float64.

    Raises:
        ValueError: as in `run`.
    """
    x = x_T
    for state in run(program, denoiser, x_T, seeds, reuse=not torch.is_grad_enabled()):
        x = state.x
    return x


def _run(stepper: Stepper, denoiser: Denoiser) -> Generator[State, State | None, None]:
    try:
        while (found := stepper.advance()) is not None:
            if not isinstance(found, State):
                if found.source == "net":
                    stepper.tell(*_evaluate(denoiser, stepper.x, found))
                else:
                    stepper.tell(stand_in(denoiser, stepper, found))
                continue
            sent = yield found
            if sent is not None:
                stepper.put(sent.x, sent.history)
    finally:
        stepper.close()


def seeded(seeds: Sequence[int]) -> Draw:
    """Noise that is keyed by each picture's seed."""

    def draw(op: Combine, index: int, x: Tensor) -> Tensor:
        shape = x.shape[1:]
        if op.interval is None:
            noise = normal(seeds, shape, "step", index, x.dtype)
        else:
            noise = brownian(seeds, shape, op.interval, x.dtype)
        if x.device.type == "cuda":  # from pinned memory the copy does not wait for the device
            noise = noise.pin_memory()
        return noise.to(x.device, non_blocking=True)

    return draw


def _evaluate(denoiser: Denoiser, x: Tensor, op: Eval) -> tuple[Tensor, Tensor | None]:
    """(D, features) of the network."""
    told = op.sigma if op.cond is None else op.cond
    if isinstance(told, Tensor):
        sigma = told.to(x).expand(x.shape[0])
    else:
        sigma = torch.full((x.shape[0],), told, dtype=x.dtype, device=x.device)
    features = None
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
    return denoised, features


def stand_in(denoiser: Denoiser, stepper: Stepper, op: Eval, rows: slice = slice(None)) -> Tensor:
    """What stands for the evaluation `op` of a stepper that costs nothing, "mean" or "path".

    Args:
        rows: which samples of the denoiser's batch the stepper has

    Raises:
        ValueError: the denoiser does not know the mean of D, or the data's covariance.
    """
    x = stepper.x
    if op.source == "mean":
        mean = far_mean(denoiser)
        check_mean_start(op.sigma, getattr(denoiser, "sigma_max", None))
        return (mean if len(mean) == 1 else mean[rows]).to(x).expand_as(x)
    if stepper.denoised is None or op.cond is None:
        raise ValueError("a path leads from an evaluation to a level: put both before it")
    return covariance(denoiser)[rows].between(x, stepper.denoised, op.sigma, op.cond)


def covariance(denoiser: Denoiser) -> Covariance:
    """That of the data. Raises ValueError where the denoiser does not know it."""
    found = getattr(denoiser, "covariance", None)
    if found is None:
        raise ValueError(
            "consistency-pca needs denoiser.covariance, the statistics in a model's folder, and no "
            "guidance; take consistency-kappa, which has one number for all directions"
        )
    return found


def check_known(program: Program, denoiser: Denoiser) -> None:
    """Raise ValueError, before any work, where the denoiser does not know what stands for one of a
    program's evaluations."""
    if program.adapts:
        return
    sources = {op.source for op in program.start() if isinstance(op, Eval)}
    for source, known in (("mean", far_mean), ("path", covariance)):
        if source in sources:
            known(denoiser)


def far_mean(denoiser: Denoiser) -> Tensor:
    """The mean of D at sigma_max.

    Raises:
        ValueError: the denoiser does not know it.
    """
    mean = getattr(denoiser, "far_mean", None)
    if mean is None:
        raise ValueError(
            "afs='mean' needs denoiser.far_mean, the mean of D at sigma_max; "
            "set it, or use afs='zero'"
        )
    return mean


def check_mean_start(sigma: Level, sigma_max: float | None) -> None:
    """far_mean is the mean of D at sigma_max, and stands for no D below it.

    Raises:
        ValueError: for an analytic first step "mean" from below.
    """
    if sigma_max is None or isinstance(sigma, Tensor) or starts_at(sigma, sigma_max):
        return
    if sigma < sigma_max:
        raise ValueError(
            f"afs='mean' holds at sigma_max, {sigma_max:.10g}, and this starts at {sigma:.10g}; "
            "take afs='none' or 'zero'"
        )


def starts_at(sigma: float, level: float) -> bool:
    """Whether two levels are one, but for rounding to five digits: published grids of Stable
    Diffusion start at 14.615, its own table at 14.6146."""
    return math.isclose(sigma, level, rel_tol=1e-4)


def _to_eps(x: Tensor, denoised: Tensor, sigma: float | Tensor, out: Tensor | None) -> Tensor:
    if isinstance(sigma, Tensor):
        return (x - denoised) / per_sample(sigma, x)
    return torch.sub(x, denoised, out=out).mul_(1 / sigma)


def _sum(anchor: Tensor, history: Sequence[Tensor], a: Level, b: Row, out: Tensor | None) -> Tensor:
    """a anchor + sum_j b_j history_j, into `out` where all weights are floats."""
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
