"""Sampling of consistency functions: the end of the path, then fresh noise to the next level.

    x_s = D(x_t) + s xi        the last step, into s = 0, returns D

Right where D(x, t) is the end of the probability-flow path through x, as a distilled network has
it, and wrong where it is E[x_0 | x]. Without fresh noise, x_s = D + s eps with the eps of x and D,
this is `ddim`, also called "consistency-ode".

That chord is wrong even for a perfect D, since the path is curved. On Gaussian data of standard
deviation c the path through x is x (c^2 + s^2)^1/2 / (c^2 + t^2)^1/2 and ends in x c / (c^2 +
t^2)^1/2, so the right step is

    x_s = D + kappa (x - D) / t      kappa / t = (root(s) - c) / (root(t) - c)

    with root(s)^2 = c^2 + s^2,

which is `consistency_kappa`: no fresh noise, so a seed keeps its picture at every budget. c = 0 is
`ddim` again, and one evaluation is the same with all of them. Data have another c along each of
their principal directions. `consistency_pca` takes the same step along each of those that the
denoiser knows, so it is exact on Gaussian data of any covariance.

Sources: Song et al. 2023 (consistency models), arXiv:2303.01469, algorithm 1; Luo et al. 2023
(LCM), arXiv:2310.04378, algorithm 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from fewstep.plan import Combine, Eval, Ops

__all__ = ["consistency", "consistency_kappa", "consistency_pca"]


def consistency(sigmas: Sequence[float]) -> Ops:
    """Multistep consistency sampling, on D."""
    for cur, nxt in pairwise(sigmas):
        yield Eval(cur)
        yield Combine((1.0,), nxt, a=0.0, noise=nxt)


def consistency_kappa(sigmas: Sequence[float], *, c: float = 0.12) -> Ops:
    """Multistep consistency sampling along the path, exact on Gaussian data, on D.

    Args:
        sigmas: strictly decreasing
        c: the data's standard deviation, >= 0; the default is what suits pictures in [-1, 1], most
            of whose directions have far less than EDM's 0.5 (see docs/splam.md)
    """
    for cur, nxt in pairwise(sigmas):
        # (root(s) - c) / (root(t) - c), without the differences
        kept = (nxt / cur) ** 2 * (math.hypot(c, cur) + c) / (math.hypot(c, nxt) + c or 1.0)
        yield Eval(cur)
        yield Combine((1 - kept,), nxt, a=kept)


def consistency_pca(sigmas: Sequence[float]) -> Ops:
    """The same along each principal direction of the data, by `denoiser.covariance`, on D."""
    for cur, nxt in pairwise(sigmas):
        yield Eval(cur)
        if nxt > 0:
            yield Eval(cur, cond=nxt, source="path")
        yield Combine((1.0,), nxt, a=0.0)
