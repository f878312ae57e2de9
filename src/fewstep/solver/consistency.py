"""Sampling of consistency functions: the end of the path, then fresh noise to the next level.

    x_s = D(x_t) + s xi        the last step, into s = 0, returns D

Right where D(x, t) is the end of the probability-flow path through x, as a distilled network has
it, and wrong where it is E[x_0 | x]. Without fresh noise, x_s = D + s eps with the eps of x and D,
this is `ddim`, also called "consistency-ode".

Sources: Song et al. 2023 (consistency models), arXiv:2303.01469, algorithm 1; Luo et al. 2023
(LCM), arXiv:2310.04378, algorithm 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from fewstep.plan import Combine, Eval, Ops

__all__ = ["consistency"]


def consistency(sigmas: Sequence[float]) -> Ops:
    """Multistep consistency sampling, on D."""
    for cur, nxt in pairwise(sigmas):
        yield Eval(cur)
        yield Combine((1.0,), nxt, a=0.0, noise=nxt)
