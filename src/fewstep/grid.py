"""Grids: the noise levels that a solver visits, from sigma_max strictly down to sigma_min.

With u = i/(N - 1), i = 0 .. N - 1, and N the number of *points*, of which intervals are one fewer:

    karras          (smax^(1/rho) + u (smin^(1/rho) - smax^(1/rho)))^rho
    log-snr         smax^(1-u) smin^u, uniform in lambda = -log sigma
    time-uniform    sqrt(exp(beta_d t^2/2 + beta_min t) - 1), t uniform from 1 to end_time
    discrete        uniform in the model's own t
    trailing        uniform in the model's own t, with the last interval reaching past its end

Sources: Karras et al. 2022 (EDM), arXiv:2206.00364, eq. 5; Lu et al. 2022 (DPM-Solver),
arXiv:2206.00927, for log-snr; Song et al. 2021, arXiv:2011.13456, for the VP process behind
time-uniform; Lin et al. 2023, arXiv:2305.08891, table 2, for trailing.

Every function returns Python floats, computed in float64; the first is sigma_max and the last
sigma_min to the bit.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from itertools import pairwise

from torch import Tensor

from fewstep.schedule import Schedule

__all__ = [
    "karras",
    "log_snr",
    "time_uniform",
    "discrete",
    "trailing",
    "GRIDS",
    "make_grid",
    "check_grid",
]


def karras(points: int, sigma_max: float, sigma_min: float, rho: float = 7.0) -> tuple[float, ...]:
    """EDM's polynomial grid, uniform in sigma^(1/rho). Karras et al. 2022, arXiv:2206.00364.

    Args:
        points: how many sigmas, the ends among them, at least 2
        sigma_max, sigma_min: the ends, sigma_max > sigma_min > 0
        rho: the more, the more points at low noise; 1 is uniform in sigma

    Returns:
        Strictly decreasing sigmas.

    Raises:
        ValueError: for too few points, ends that do not fall, and rho <= 0.
    """
    _check_range(points, sigma_max, sigma_min)
    if not rho > 0:
        raise ValueError(f"rho must be > 0, got {rho}")
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return _with_ends(
        [(high + u * (low - high)) ** rho for u in _fractions(points)], sigma_max, sigma_min
    )


def log_snr(points: int, sigma_max: float, sigma_min: float) -> tuple[float, ...]:
    """Uniform in lambda = -log sigma.

    Args:
        points: how many sigmas, the ends among them, at least 2
        sigma_max, sigma_min: the ends, sigma_max > sigma_min > 0

    Returns:
        Strictly decreasing sigmas.

    Raises:
        ValueError: for too few points, and ends that do not fall.
    """
    _check_range(points, sigma_max, sigma_min)
    ratio = math.log(sigma_min / sigma_max)
    return _with_ends(
        [sigma_max * math.exp(u * ratio) for u in _fractions(points)], sigma_max, sigma_min
    )


def time_uniform(
    points: int, sigma_max: float, sigma_min: float, end_time: float = 1e-3
) -> tuple[float, ...]:
    """Uniform in the time of the linear VP process with sigma_max at 1, sigma_min at `end_time`.

    log(1 + sigma^2) = beta_d t^2/2 + beta_min t is linear in the two betas, so the two ends give
    them: with A = log(1 + smax^2), B = log(1 + smin^2), e = end_time,

        beta_d = 2 (A e - B) / (e (1 - e)),    beta_min = A - beta_d/2

    sigma rises with t on [e, 1] only while B < A e (2 - e): for sigma_max = 80 and e = 1e-3 that is
    a sigma_min below 0.13. An end_time above 1 - sqrt(1 - B/A) mends it.

    Args:
        points: how many sigmas, the ends among them, at least 2
        sigma_max, sigma_min: the ends, sigma_max > sigma_min > 0
        end_time: t at sigma_min, in (0, 1)

    Returns:
        Strictly decreasing sigmas.

    Raises:
        ValueError: for ends between which sigma does not rise; it names an end_time that does.
    """
    _check_range(points, sigma_max, sigma_min)
    if not 0 < end_time < 1:
        raise ValueError(f"end_time must lie in (0, 1), got {end_time}")
    at_start, at_end = math.log1p(sigma_max**2), math.log1p(sigma_min**2)
    if not at_end < at_start * end_time * (2 - end_time):
        least = 1 - math.sqrt(1 - at_end / at_start)
        raise ValueError(
            f"time-uniform has no rising curve from sigma_min={sigma_min} at end_time={end_time} "
            f"to sigma_max={sigma_max} at 1: pass an end_time above {least:.3g}, or take another "
            "grid"
        )
    beta_d = 2 * (at_start * end_time - at_end) / (end_time * (1 - end_time))
    beta_min = at_start - beta_d / 2
    times = [1 + u * (end_time - 1) for u in _fractions(points)]
    return _with_ends(
        [math.sqrt(math.expm1(beta_d * t**2 / 2 + beta_min * t)) for t in times],
        sigma_max,
        sigma_min,
    )


def discrete(
    points: int,
    schedule: Schedule | None,
    sigma_max: float | None = None,
    sigma_min: float | None = None,
) -> tuple[float, ...]:
    """Uniform in the model's own t, from t(sigma_max) to t(sigma_min).

    t is not rounded.

    Args:
        points: how many sigmas, the ends among them, at least 2
        schedule: the model's, sigma <-> t
        sigma_max, sigma_min: the ends, within the schedule's own, which they are where left out

    Returns:
        Strictly decreasing sigmas.

    Raises:
        ValueError: there is no schedule, or the ends lie beyond it.
    """
    schedule, sigma_max, sigma_min = _own_range("discrete", points, schedule, sigma_max, sigma_min)
    start, end = schedule.t(sigma_max), schedule.t(sigma_min)
    return _with_ends(
        [schedule.sigma(start + u * (end - start)) for u in _fractions(points)],
        sigma_max,
        sigma_min,
    )


def trailing(
    points: int,
    schedule: Schedule | None,
    sigma_max: float | None = None,
    sigma_min: float | None = None,
) -> tuple[float, ...]:
    """Uniform in the model's own t, evaluated at the noisy end of each interval.

    Cut the T entries of a table into N - 1 equal intervals and tell the network the last entry of
    each: t_i = T (1 - i/(N - 1)) - 1. The first is T - 1; the last, where no evaluation takes
    place, is -1, one entry past the table, where the data would be clean, and is put at the low
    end instead. Hence the last interval is one entry shorter than the others.

    On a part of the range, from t_high = t(sigma_max) to t_low = t(sigma_min), the same rule is

        t_i = t_high - i/(N - 1) (t_high - t_low + gap)      gap = t_min - t_clean

    with the last again at the low end: there are t_high - t_low + 1 entries to cut, and the end
    still lies one entry past the last of them. gap is 1 for a table; a flow, which reaches clean
    data at t = 0, has gap = t_min. The ends default to the schedule's and must lie within them;
    ValueError where there are as many intervals as entries, or more.
    """
    schedule, sigma_max, sigma_min = _own_range("trailing", points, schedule, sigma_max, sigma_min)
    start, end = schedule.t(sigma_max), schedule.t(sigma_min)
    length = start - end + schedule.t_min - schedule.t_clean
    times = [start - u * length for u in _fractions(points)]
    if not times[-2] > end:
        raise ValueError(
            f"trailing has no room for points={points} from t={start:g} to t={end:g}: take fewer"
        )
    return _with_ends([schedule.sigma(max(t, end)) for t in times], sigma_max, sigma_min)


GRIDS: dict[str, Callable[[int, float, float, Schedule | None], tuple[float, ...]]] = {
    "karras": lambda points, high, low, schedule: karras(points, high, low),
    "log-snr": lambda points, high, low, schedule: log_snr(points, high, low),
    "time-uniform": lambda points, high, low, schedule: time_uniform(points, high, low),
    "discrete": lambda points, high, low, schedule: discrete(points, schedule, high, low),
    "trailing": lambda points, high, low, schedule: trailing(points, schedule, high, low),
}


def make_grid(
    name: str,
    points: int,
    sigma_max: float,
    sigma_min: float,
    schedule: Schedule | None = None,
) -> tuple[float, ...]:
    """A grid by name, with its defaults.

    Args:
        name: a key of GRIDS
        schedule: the network's, for the grids that live in its own time; the others do not look at
            it
    """
    if name not in GRIDS:
        near = difflib.get_close_matches(name, GRIDS, n=2) or list(GRIDS)
        raise ValueError(f"no grid is called {name!r}; did you mean {' or '.join(near)}?")
    return GRIDS[name](points, sigma_max, sigma_min, schedule)


def check_grid(sigmas: Iterable[float]) -> tuple[float, ...]:
    """The grid as Python floats; ValueError unless 2 points, finite, >= 0, strictly decreasing."""
    sigmas = tuple(sigmas)
    if any(isinstance(sigma, Tensor) and sigma.requires_grad for sigma in sigmas):
        raise ValueError(
            "a grid here is numbers; levels with gradients belong in a solver of their own"
        )
    grid = tuple(float(sigma) for sigma in sigmas)
    if len(grid) < 2:
        raise ValueError(f"a grid needs at least 2 points, got {len(grid)}")
    for i, sigma in enumerate(grid):
        if not (math.isfinite(sigma) and sigma >= 0):
            raise ValueError(f"sigmas must be finite and >= 0, got sigmas[{i}] = {sigma}")
    for i, (cur, nxt) in enumerate(pairwise(grid)):
        if not cur > nxt:
            raise ValueError(
                f"sigmas must strictly decrease, got sigmas[{i}] = {cur} and "
                f"sigmas[{i + 1}] = {nxt}"
            )
    return grid


def _fractions(points: int) -> list[float]:
    return [i / (points - 1) for i in range(points)]


def _with_ends(sigmas: list[float], sigma_max: float, sigma_min: float) -> tuple[float, ...]:
    """The ends to the bit, whatever rounding made of them."""
    return check_grid((sigma_max, *sigmas[1:-1], sigma_min))


def _check_range(points: int, sigma_max: float, sigma_min: float) -> None:
    if points < 2:
        raise ValueError(f"points must be at least 2, got {points}")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")


def _own_range(
    name: str,
    points: int,
    schedule: Schedule | None,
    sigma_max: float | None,
    sigma_min: float | None,
) -> tuple[Schedule, float, float]:
    """The schedule and the ends of a grid that lives in the network's own time."""
    if schedule is None or not schedule.own_time:
        raise ValueError(
            f"the {name} grid is uniform in a network's own time, and there is none here: take "
            "karras, log-snr or time-uniform, or a network with a schedule (VP, flow)"
        )
    sigma_max = schedule.sigma_max if sigma_max is None else sigma_max
    sigma_min = schedule.sigma_min if sigma_min is None else sigma_min
    _check_range(points, sigma_max, sigma_min)
    slack = 1 + 1e-6  # ends that went through float32
    if sigma_max > schedule.sigma_max * slack or sigma_min * slack < schedule.sigma_min:
        raise ValueError(
            f"the {name} grid must lie within the schedule's {schedule.sigma_max:.6g} to "
            f"{schedule.sigma_min:.6g}, got {sigma_max} to {sigma_min}"
        )
    return schedule, sigma_max, sigma_min
