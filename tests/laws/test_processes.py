"""No solver is much worse than ddim at equal evaluations, whatever the network's process.

The data are the mixture of the test bed, of spread 0.57, under each schedule; starts and exact
solutions are computed here. A network with a time of its own is sampled as pipelines are, on
the trailing grid down to 0, from its start and from the middle. An EDM network has no such grid:
there a solver and ddim each have the best of three.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep.solver as registry
from fewstep.grid import make_grid
from fewstep.models.process import Shifted
from fewstep.plan import Combine, gain
from fewstep.sampling.choose import GAIN, plan_for
from fewstep.sampling.settings import Settings
from fewstep.schedule import EDM, PURE_NOISE, VP, Flow
from fewstep.solver.rules import trapezoid
from fewstep.solving import solve
from tests.support.testbed import ODE_SOLVERS, SDE_SOLVERS, Mixture

MIXTURE, COUNT = Mixture(), 64
BUDGETS = (3, 5, 7)
MOST = {("dpm-solver-3", "shifted flow"): 2.2}  # two intervals in all; elsewhere 2, the law
NAMED = ("karras", "log-snr", "time-uniform")  # grids that need no time of the network's own


def zero_snr() -> VP:
    """Stable Diffusion's table rescaled to zero terminal SNR (Lin et al. 2023, algorithm 1)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = torch.cumprod(1 - betas, 0).sqrt()
    abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    return VP.from_betas(1 - torch.cat([abar[:1], abar[1:] / abar[:-1]]), terminal_sigma=4096.0)


PROCESSES: dict[str, Any] = {
    "EDM": EDM(),
    "VP": VP.scaled_linear(),
    "cosine VP": VP.cosine(),
    "zero-SNR VP": zero_snr(),
    "flow": Flow(),
    "shifted flow": Shifted(Flow(), 3.0),
}
FROM_NOISE = [name for name, schedule in PROCESSES.items() if schedule.sigma_max > PURE_NOISE]


def data(count: int, seed: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    kind = torch.multinomial(MIXTURE.weight, count, True, generator=gen)
    spread = MIXTURE.variance[kind].sqrt()[:, None]
    return MIXTURE.mean[kind] + spread * torch.randn(count, 3, generator=gen, dtype=torch.float64)


@functools.cache
def start(sigma: float, count: int = COUNT) -> Tensor:
    gen = torch.Generator().manual_seed(1)
    return data(count, 0) + sigma * torch.randn(count, 3, generator=gen, dtype=torch.float64)


@functools.cache
def exact(sigma: float) -> Tensor:
    """The ends at 0 of those starts: 200 steps of order 4 in log sigma, to about 1e-5."""
    grid = (*make_grid("log-snr", 201, sigma, 1e-4), 0.0)
    return solve(MIXTURE, start(sigma), "exp-adams-4", grid=grid)


@functools.cache
def error(name: str, sigmas: tuple[float, ...]) -> float:
    ends = solve(MIXTURE, start(sigmas[0]), name, grid=sigmas)
    return (ends - exact(sigmas[0])).square().mean().sqrt().item()


def to_zero(process: str, name: str, grid: str, nfe: int) -> tuple[float, ...]:
    """The grid on which a solver spends the budget; ValueError where it cannot."""
    schedule = PROCESSES[process]
    points = registry.intervals_for(registry.get(name), nfe, end="zero") + 1
    ends = schedule.sigma_max, schedule.sigma_min
    return registry.end_at(make_grid(grid, points, *ends, schedule), "zero")


def spendable(name: str) -> list[int]:
    counts = {registry.get(name).on((3.0, *levels)).evaluations for levels in LEVELS}
    return [nfe for nfe in BUDGETS if nfe in counts]


LEVELS = [(*(2.0 * 0.5**i for i in range(n)), 0.0) for n in range(max(BUDGETS))]


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_no_solver_has_more_than_twice_the_error_of_ddim(name: str, process: str) -> None:
    grids = ("trailing",) if PROCESSES[process].own_time else NAMED
    for nfe in spendable(name):
        found = min(error(name, to_zero(process, name, grid, nfe)) for grid in grids)
        ddim = min(error("ddim", to_zero(process, "ddim", grid, nfe)) for grid in grids)
        assert found <= MOST.get((name, process), 2) * ddim, (nfe, found, ddim)


@pytest.mark.parametrize("process", [name for name in PROCESSES if name != "EDM"])
@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_neither_has_one_that_starts_in_the_middle(name: str, process: str) -> None:
    """As from a picture: the second half of a grid of twice as many intervals."""
    schedule = PROCESSES[process]

    def half(points: int) -> tuple[float, ...]:
        ends = schedule.sigma_max, schedule.sigma_min
        whole = make_grid("trailing", 2 * points - 1, *ends, schedule)
        return registry.end_at(whole, "zero")[points - 1 :]

    for nfe in spendable(name)[-1:]:
        points = registry.intervals_for(registry.get(name), nfe, end="zero") + 1
        # trailing grids of even size share their middle but for a thousandth
        ddim = half(nfe + 1)
        found = error(name, half(points))
        assert found <= 2 * error("ddim", ddim), (nfe, found)


@pytest.mark.parametrize("end", registry.ENDS)
@pytest.mark.parametrize("name", ["heun", "dpm-solver-2", "dpm-solver-3", "dpmpp-2s"])
def test_on_few_intervals_of_an_edm_grid_it_is_warned_of_or_near_ddim(name: str, end: str) -> None:
    """The published rules have up to 25 times ddim's error on karras; 2.2 without a warning."""

    def on(solver: str, nfe: int) -> tuple[float, ...]:
        points = registry.intervals_for(registry.get(solver), nfe, end=end) + 1
        return registry.end_at(make_grid("karras", points, 80.0, 0.002), end)

    found = {}
    for nfe in range(3, 10):
        try:
            sigmas = on(name, nfe)
        except ValueError:
            continue
        ratio = error(name, sigmas) / error("ddim", on("ddim", nfe))
        found[nfe] = ratio, gain(registry.get(name).plan(sigmas))
    assert found
    assert all(ratio < 2.2 or weighed > GAIN for ratio, weighed in found.values()), found
    if name == "dpmpp-2s":
        assert all(
            weighed == pytest.approx(1, abs=1e-3) for _, weighed in found.values()
        )  # means of D's


@pytest.mark.parametrize("name, nfe, warned", [("heun", 4, True), ("dpmpp-2s", 4, False)])
def test_the_warning_says_how_many_intervals_there_are(name: str, nfe: int, warned: bool) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        plan_for(Settings(name, nfe))
    assert [str(one.message)[:38] for one in seen] == [
        f"{name} at {nfe} evaluations has 2 long intervals"[:38]
    ] * warned


DIRECTIONS = torch.nn.functional.normalize(
    torch.randn(3, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64), dim=0
)


def distance(ends: Tensor) -> float:
    """Sliced Wasserstein distance of order 1 to the data: between sorted projections."""
    there = (data(len(ends), 3) @ DIRECTIONS).sort(0).values
    return ((ends @ DIRECTIONS).sort(0).values - there).abs().mean().item()


def unkeyed(seeds: Any, shape: Any, *_: Any) -> Tensor:
    """Noise that is quick to draw. A law does not depend on whose seed a draw belongs to, and the
    solvers here draw over intervals that do not meet."""
    return torch.randn(len(seeds), *shape, dtype=torch.float64)


@functools.cache
def nearest(name: str, process: str, nfe: int, count: int = 1000) -> float:
    """A stochastic solver's distance to the data, on its best grid."""
    grids = ("trailing",) if PROCESSES[process].own_time else NAMED
    x = start(PROCESSES[process].sigma_max, count)
    runs = (to_zero(process, name, grid, nfe) for grid in grids)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr("fewstep.loop.normal", unkeyed)
        patch.setattr("fewstep.loop.brownian", unkeyed)
        return min(distance(solve(MIXTURE, x, name, grid=run, seeds=range(count))) for run in runs)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", SDE_SOLVERS)
def test_no_stochastic_solver_draws_from_a_law_more_than_twice_as_far(
    name: str, process: str
) -> None:
    """Than that of ddim with fresh noise."""
    for nfe in (5, 7):
        assert nearest(name, process, nfe) <= 2 * nearest("ddim-eta", process, nfe)


@pytest.mark.parametrize("process", FROM_NOISE)
@pytest.mark.parametrize("name", ["heun", "churn:churn=0"])
def test_the_trapezoid_is_near_the_solution_from_pure_noise(name: str, process: str) -> None:
    """In sigma its errors at 5 evaluations are 167, 2.8, 702 and 10 (ddim: 0.14 to 0.24)."""
    grid = to_zero(process, "heun", "trailing", 5)
    ends = solve(MIXTURE, start(grid[0]), name, grid=grid, seeds=range(COUNT))
    assert (ends - exact(grid[0])).square().mean().sqrt() < 0.4


@pytest.mark.parametrize("cur, nxt", [(1e5, 4.0), (4096.0, 30.0), (4.0, 0.7), (0.7, 0.01)])
def test_from_pure_noise_the_trapezoid_is_that_of_a_flow(cur: float, nxt: float) -> None:
    """x / (1 + sigma) moves by half of dx/dt = eps - D at either end, in t = sigma/(1 + sigma)."""
    x, first, second = 0.3 * cur, 0.2, -0.4  # the state, eps at cur, eps at nxt
    a, (new, old) = trapezoid(cur, nxt, 1e5)
    found = a * x + new * second + old * first
    trial = x + (nxt - cur) * first
    slopes = first - (x - cur * first), second - (trial - nxt * second)
    step = nxt / (1 + nxt) - cur / (1 + cur)
    by_hand = (1 + nxt) * (x / (1 + cur) + step * sum(slopes) / 2)
    assert found == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("top", [0.5, 14.6, 80.0, 157.4, PURE_NOISE])
@pytest.mark.parametrize("name", ["heun", "churn"])
def test_below_pure_noise_it_is_the_published_rule_to_the_bit(name: str, top: float) -> None:
    sigmas = make_grid("karras", 5, top, 0.002)
    ends = [op for op in registry.get(name).plan(sigmas).ops if isinstance(op, Combine) and op.b]
    for trial, end in zip(ends[::2], ends[1::2], strict=True):
        assert end.b == (trial.b[0] / 2, trial.b[0] / 2)
