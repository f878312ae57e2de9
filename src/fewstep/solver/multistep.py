"""Multistep solvers: one evaluation per interval, history from the steps before.

    linear multistep    Eval, then one step by a rule of `rules.py`; order ramps up with the history
    unipc               predictor, Eval, corrector: a state is accepted without a new evaluation

Sources: see `rules.py`; Zhao et al. 2023 (UniPC), arXiv:2302.04867.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from fewstep.plan import Combine, Eval, Ops
from fewstep.solver.rules import Weights, unic, unip

__all__ = ["linear_multistep", "unipc"]


def linear_multistep(sigmas: Sequence[float], *, rule: Callable[..., Weights], order: int) -> Ops:
    """Any method x_nxt = a x + sum_j b_j y_j over the last `order` outputs, with (a, b) from
    `rule`."""
    past: list[float] = []
    for cur, nxt in pairwise(sigmas):
        yield Eval(cur)
        past = [cur, *past[: order - 1]]
        a, b = rule(past, nxt, order)
        yield Combine(b, nxt, a)


def unipc(sigmas: Sequence[float], *, order: int, bh: int = 2) -> Ops:
    """UniPC of the given order: each evaluation at a predicted state also corrects that state.

    The last state is predicted only. Depth is order + 1.
    """
    past: list[float] = []
    last = len(sigmas) - 2
    for i, (cur, nxt) in enumerate(pairwise(sigmas)):
        yield Eval(cur)
        if past:
            a, b = unic(past, cur, order, bh)
            yield Combine(b, cur, a)
        past = [cur, *past[: order - 1]]
        a, b = unip(past, nxt, order, bh)
        yield Combine(b, nxt, a, accept=i == last)
