"""The operations of AMED-Solver and AMED-Plugin, over any source of the learned values.

With s = nxt^r cur^(1-r) and the network at s told a s,

    amed                  x_s = x + (s - cur) eps(x; cur)      x_nxt = x + c (nxt - cur) eps(x_s; s)
    on dpm-solver-2       x_nxt = x + c (nxt - cur) [eps_s / (2 r) + (1 - 1 / (2 r)) eps_cur]
    on a multistep rule   two of its own steps, to s and from there to nxt, the second with c b

Source: Zhou et al. 2023, arXiv:2312.00094. Dividing eps by s while the network is told a s is as
published.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.learned.predictor import Values
from fewstep.plan import Combine, Eval, Level, Ops, Prediction, Seen
from fewstep.solver import get, names
from fewstep.solver.multistep import linear_multistep
from fewstep.solver.rules import Weights, expm1, log

__all__ = ["Base", "base_of", "bases", "check_slope"]

Source = Callable[[int, Seen | None], Values]  # (number of the interval, what is seen at its start)


@dataclass(frozen=True)
class Base:
    """What the learned values are inserted into.

    ops: ops(sigmas, values, afs, features, detach=False); detach: gradients do not reach from one
        interval into the next by way of the levels of past outputs
    restarts: a step needs nothing of the steps before it, so it may be trained from any state
    states: how many states it accepts in an interval
    quantile: by which each D is thresholded, as `fewstep.plan.Program` says
    """

    ops: Callable[..., Ops]
    prediction: Prediction
    depth: int
    restarts: bool
    states: int
    quantile: float | None = None


def amed(
    sigmas: Sequence[float], values: Source, afs: str, features: bool, detach: bool = False
) -> Ops:
    """AMED-Solver: two evaluations an interval."""
    for i, (start, cur, nxt) in enumerate(_intervals(sigmas, afs, features)):
        r, c, a = values(i, (yield start))
        mid = nxt**r * cur ** (1 - r)
        yield Combine((mid - cur,), mid, accept=False)
        yield Eval(mid, cond=a * mid)
        yield Combine((c * (nxt - cur),), nxt)


def on_dpm_solver_2(
    sigmas: Sequence[float], values: Source, afs: str, features: bool, detach: bool = False
) -> Ops:
    """AMED-Plugin on DPM-Solver-2, whose fixed midpoint it replaces."""
    for i, (start, cur, nxt) in enumerate(_intervals(sigmas, afs, features)):
        r, c, a = values(i, (yield start))
        mid = nxt**r * cur ** (1 - r)
        yield Combine((mid - cur,), mid, accept=False)
        yield Eval(mid, cond=a * mid)
        whole = c * (nxt - cur)
        new = whole / (2 * r)
        yield Combine((new, whole - new), nxt)


def on_multistep(
    sigmas: Sequence[float],
    values: Source,
    afs: str,
    features: bool,
    detach: bool = False,
    *,
    rule: Callable[..., Weights],
    order: int,
) -> Ops:
    """AMED-Plugin on a linear multistep rule, which takes a step to s and one on to nxt."""
    past: list[Level] = []
    for i, (start, cur, nxt) in enumerate(_intervals(sigmas, afs, features)):
        r, c, a = values(i, (yield start))
        mid = nxt**r * cur ** (1 - r)
        past = [cur, *past[: order - 1]]
        keep, b = rule(past, mid, order)
        yield Combine(b, mid, keep)
        yield Eval(mid, cond=a * mid)
        past = [mid, *past[: order - 1]]
        keep, b = rule(past, nxt, order)
        yield Combine(tuple(c * weight for weight in b), nxt, keep)
        past = [_detached(level) for level in past] if detach else past


def on_dpm_multistep(
    sigmas: Sequence[float],
    values: Source,
    afs: str,
    features: bool,
    detach: bool = False,
    *,
    order: int,
    final: bool,
    eps: bool,
) -> Ops:
    """AMED-Plugin on the published multistep DPM-Solver, on eps or on D.

    final: the order falls towards the end (lower_order_final), so that the last step has order 1
    """
    past: list[Level] = []
    total = 2 * (len(sigmas) - 1)

    def order_of(step: int) -> int:
        """Of the step that is the step-th, from 1 on."""
        return step if step < order else min(order, total + 1 - step if final else order)

    for i, (start, cur, nxt) in enumerate(_intervals(sigmas, afs, features)):
        r, c, a = values(i, (yield start))
        mid = nxt**r * cur ** (1 - r)
        past = [cur, *past[: order - 1]]
        keep, b = dpm_multistep(past, mid, order_of(2 * i + 1), eps)
        yield Combine(b, mid, keep)
        yield Eval(mid, cond=a * mid)
        past = [mid, *past[: order - 1]]
        keep, b = dpm_multistep(past, nxt, order_of(2 * i + 2), eps)
        yield Combine(tuple(c * weight for weight in b), nxt, keep)
        past = [_detached(level) for level in past] if detach else past


def dpm_multistep(past: Sequence[Level], nxt: Level, order: int, eps: bool) -> Weights:
    """A step of multistep DPM-Solver, with its Taylor terms in h as published.

    With h = log(past[0] / nxt), slopes D1, D2 of the outputs in log SNR, scaled by h, and
    phi_1 = e^h - 1 on eps and e^-h - 1 on D:

        order 2    phi_1 (y_0 + D1 / 2)      order 3    phi_1 y_0 + phi_2 D1 + phi_3 D2

    Source: Lu et al. 2022 (DPM-Solver++), arXiv:2211.01095.
    """
    sign = 1.0 if eps else -1.0
    h = log(past[0] / nxt)
    scale = -nxt if eps else -1.0
    keep = 1.0 if eps else nxt / past[0]
    phi_1 = expm1(sign * h)
    if order == 1:
        return keep, (scale * phi_1,)
    r0 = log(past[1] / past[0]) / h
    if order == 2:
        half = phi_1 / (2 * r0)
        return keep, (scale * (phi_1 + half), -scale * half)
    r1 = log(past[2] / past[1]) / h
    phi_2 = phi_1 / h - sign
    phi_3 = phi_2 / h - 0.5
    # D1 = (1 + q) E - q F, D2 = (E - F) / (r0 + r1), E = (y0 - y1) / r0, F = (y1 - y2) / r1
    q, s2 = r0 / (r0 + r1), 1 / (r0 + r1)
    on_d1 = sign * phi_2
    e, f = on_d1 * (1 + q) + phi_3 * s2, on_d1 * -q - phi_3 * s2
    weights = (phi_1 + e / r0, -e / r0 + f / r1, -f / r1)
    return keep, tuple(scale * weight for weight in weights)


# The published multistep DPM-Solver as bases: on eps (dpm) or D (dpmpp), by the highest order, and
# whether the order falls at the end. On D it is thresholded, analytic steps too.
PUBLISHED: dict[str, Base] = {
    f"{kind}-{order}-multistep{'-final' if final else ''}": Base(
        partial(on_dpm_multistep, order=order, final=final, eps=kind == "dpm"),
        "eps" if kind == "dpm" else "x0",
        order,
        restarts=False,
        states=2,
        quantile=0.995 if kind == "dpmpp" else None,
    )
    for kind in ("dpm", "dpmpp")
    for order in (1, 2, 3)
    for final in (False, True)
}


def base_of(name: str | None) -> Base:
    """The base of a name; None is AMED-Solver itself.

    Raises:
        ValueError: AMED-Plugin does not go with that solver.
    """
    if name is None:
        return Base(amed, "eps", 1, restarts=True, states=1)
    if name in PUBLISHED:
        return PUBLISHED[name]
    solver = get(name)
    if solver.name == "dpm-solver-2":
        return Base(on_dpm_solver_2, "eps", 2, restarts=True, states=1)
    ops = solver.ops
    if not isinstance(ops, partial) or ops.func is not linear_multistep:
        raise ValueError(f"amed-plugin has no way into {name!r}; it goes with {', '.join(bases())}")
    inserted = partial(on_multistep, **ops.keywords)
    return Base(inserted, solver.prediction, solver.depth, restarts=False, states=2)


def check_slope(name: str | None) -> None:
    """Whether the base's weights can be differentiated in the learned levels.

    A rule that calls `math`, or takes `float(level)`, loses their gradient, or a part of it, and
    training would learn nothing. So each weight's gradient is compared with its central difference.

    Raises:
        ValueError: Where they differ, or the rule takes no tensors.
    """
    ops = None if name is None or name in PUBLISHED else get(name).ops
    if not isinstance(ops, partial) or ops.func is not linear_multistep:
        return
    rule, order = ops.keywords["rule"], ops.keywords["order"]
    older = [3.0 * 1.7**k for k in range(order)]
    steps = (  # to the learned level, and on from it
        lambda mid, count: rule([3.0, *older[1:count]], mid, order),
        lambda mid, count: rule([mid, *older[: count - 1]], 0.6, order),
    )
    for step, count in ((step, count) for step in steps for count in range(1, order + 1)):
        try:
            right = _slopes_agree(lambda mid, step=step, count=count: step(mid, count))
        except (TypeError, RuntimeError, AttributeError):
            right = False
        if not right:
            raise ValueError(
                f"amed-plugin cannot train on {name!r}: its rule loses the gradient of the levels; "
                "write it with log and expm1 of fewstep.solver.rules instead of math, or take tuned"
            )


@torch.inference_mode(False)
@torch.enable_grad()
def _slopes_agree(weights: Callable[[Tensor], Weights]) -> bool:
    """Whether the gradients of a step's weights in the level 1.3 are their differences."""

    def row(level: float, grad: bool = False) -> tuple[Tensor, list[Level]]:
        mid = torch.tensor([level], dtype=torch.float64, requires_grad=grad)
        a, b = weights(mid)
        return mid, [a, *b]

    step = 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the very calls that are looked for
        mid, values = row(1.3, grad=True)
        above, below = row(1.3 + step)[1], row(1.3 - step)[1]
    for value, high, low in zip(values, above, below, strict=True):
        expected = (float(high) - float(low)) / (2 * step)
        found = 0.0
        if isinstance(value, Tensor) and value.requires_grad:
            slope = torch.autograd.grad(value.sum(), mid, retain_graph=True, allow_unused=True)[0]
            found = 0.0 if slope is None else float(slope)
        if abs(found - expected) > 1e-4 * max(1.0, abs(expected)):
            return False
    return True


def bases() -> list[str]:
    """The solvers that AMED-Plugin goes with."""
    multistep = (getattr(get(name).ops, "func", None) is linear_multistep for name in names())
    return ["dpm-solver-2", *(name for name, fits in zip(names(), multistep, strict=True) if fits)]


def _intervals(
    sigmas: Sequence[float], afs: str, features: bool
) -> Iterator[tuple[Eval, float, float]]:
    """Each interval's opening evaluation and its ends; the very first may be analytic."""
    for i, (cur, nxt) in enumerate(pairwise(sigmas)):
        analytic = i == 0 and afs != "none"
        start = Eval(cur, source=afs) if analytic else Eval(cur, features=features)  # type: ignore[arg-type]
        yield start, cur, nxt


def _detached(level: Level) -> Level:
    return level.detach() if isinstance(level, Tensor) else level
