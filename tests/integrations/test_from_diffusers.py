"""What docs/from-diffusers.md calls equal ends at the same numbers.

Schedulers are made and driven as their pipelines do it, from their constructor and `set_timesteps`;
ours gets the solver and the grid that stand beside them. The counts of evaluations are such that
the times of the `discrete` and `trailing` grids are whole numbers, which schedulers round to.

Tolerance: schedulers keep their levels, and some of them their states and coefficients, in float32.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.denoiser import Clipped, Thresholded
from fewstep.noise import brownian, normal
from fewstep.sampling.settings import Settings
from fewstep.schedule import VP
from fewstep.solver import get
from fewstep.solving import resolve, solve
from tests.support.testbed import Mixture

diffusers: Any = pytest.importorskip("diffusers")

PAGE = Path(__file__).parents[2] / "docs" / "from-diffusers.md"
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SEEDS, SHAPE, TOLERANCE = [5, 6, 7, 8], (3, 1), 2e-5  # schedulers want a dimension for pixels
D = Callable[[Tensor, Tensor], Tensor]


def mixture(x: Tensor, sigma: Tensor) -> Tensor:
    return Mixture()(x[..., 0], sigma)[..., None]


class Latent:
    """The mixture on the range, and with the time, of Stable Diffusion's table."""

    schedule = VP.scaled_linear()
    sigma_min, sigma_max = schedule.sigma_min, schedule.sigma_max

    def __init__(self, inner: D | None = None) -> None:
        self.inner = inner or mixture

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.inner(x, sigma)


class Edm(Latent):
    sigma_min, sigma_max, schedule = 0.002, 80.0, None


def start(sigma: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return sigma * torch.randn(len(SEEDS), *SHAPE, generator=generator, dtype=torch.float64)


def build(text: str, evaluations: int) -> Any:
    """The scheduler of a constructor's text, on Stable Diffusion's table unless it is EDM's."""
    name, arguments = text.split("(", 1)
    table = {} if name.startswith("EDM") else TABLE
    options = {**table, **eval(f"dict({arguments}")}
    made = getattr(diffusers, name)(**options)
    made.set_timesteps(evaluations)
    if hasattr(made, "sigmas"):
        made.set_begin_index(0)  # not looked up by time: rounded times may repeat
    return made


def step(i: int) -> Tensor:
    """The noise of our i-th draw."""
    return normal(SEEDS, SHAPE, "step", i, torch.float64)


def levels_of(scheduler: Any) -> list[float]:
    """The level at each of its times, as the page says to read them, without the end."""
    if hasattr(scheduler, "sigmas"):
        return scheduler.sigmas.tolist()
    abar = scheduler.alphas_cumprod[scheduler.timesteps].double()
    return (1 / abar - 1).sqrt().tolist()


def drive(scheduler: Any, denoiser: D, fresh: Callable[[int], Tensor] | None = None) -> Tensor:
    """Its loop, from `start` at its first level to the end, in EDM units.

    fresh: the noise of its i-th draw
    """
    edm, levels = "sigma_data" in scheduler.config, levels_of(scheduler)
    vp = float(scheduler.init_noise_sigma) == 1  # else its state is ours

    def alpha(sigma: float) -> float:
        return 1 / math.sqrt(1 + sigma**2) if vp else 1.0

    draws = iter(range(1000))
    with pytest.MonkeyPatch.context() as patch:
        if fresh is not None:
            module = importlib.import_module(type(scheduler).__module__)
            patch.setattr(module, "randn_tensor", lambda *_, **__: fresh(next(draws)))
        x_t = alpha(levels[0]) * start(levels[0])
        for i, t in enumerate(scheduler.timesteps):
            scheduler.scale_model_input(x_t, t)  # for its side effects
            middle = hasattr(scheduler, "sigmas_interpol") and not scheduler.state_in_first_order
            sigma = float(scheduler.sigmas_interpol[i]) if middle else levels[i]
            x = x_t / alpha(sigma)
            denoised = denoiser(x, torch.full((len(x),), sigma, dtype=torch.float64))
            if edm:  # the raw network's output, before their preconditioning
                total = sigma**2 + scheduler.config.sigma_data**2
                skip = scheduler.config.sigma_data**2 / total * x
                out = (denoised - skip) * math.sqrt(total) / (sigma * scheduler.config.sigma_data)
            else:
                out = (x - denoised) / sigma
            x_t = scheduler.step(out, t, x_t, return_dict=False)[0].double()
    end = levels[-1] if len(levels) > len(scheduler.timesteps) else 0.0
    return x_t / alpha(end)


def rows() -> list[tuple[str, str]]:
    """The rows of the page's tables of equals, as their constructor and our arguments."""
    text, found, name = PAGE.read_text(encoding="utf-8"), [], ""
    for line in text[text.index("## Schedulers that have") : text.index("## Grids")].splitlines():
        if heading := re.fullmatch(r"### `(\w+)`", line):
            name = heading[1]
        elif row := re.fullmatch(r"\| (?:`(.*)`|the defaults) \| `(.*)` \|", line):
            found.append((f"{name}({row[1] or ''})", row[2]))
    return found


def test_the_tables_are_there() -> None:
    assert len(rows()) > 30


@pytest.mark.parametrize(("theirs", "ours"), rows(), ids=[left for left, _ in rows()])
def test_a_scheduler_equals_what_stands_beside_it(theirs: str, ours: str) -> None:
    name, _, rest = ours.partition(", ")
    solver, options = get(eval(name)), eval(f"dict({rest})")
    on_grid = 9 + options.get("final", False) if options["grid"] == "discrete" else 8
    scheduler = build(theirs, on_grid)
    denoiser = Edm() if theirs.startswith("EDM") else Latent()
    spent = len(scheduler.timesteps)
    run = {"afs": "none", "final": False, **options}
    sigmas = (*resolve(Settings(solver, spent, **run), denoiser).sigmas, 0.0)

    def path(i: int) -> Tensor:  # between our levels: a Brownian path is rough, theirs are float32
        return brownian(SEEDS, SHAPE, (sigmas[i], sigmas[i + 1]), torch.float64)

    fresh = None if not solver.stochastic else path if "sde" in solver.name else step
    found = drive(scheduler, mixture, fresh)
    ended = solve(denoiser, start(levels_of(scheduler)[0]), solver, spent, seeds=SEEDS, **options)
    torch.testing.assert_close(ended, found, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("theirs", "solver", "end"),
    [
        ('LMSDiscreteScheduler(timestep_spacing="leading")', "lms-4", []),
        ('EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1)', "ddim", []),
        ('DPMSolverMultistepScheduler(timestep_spacing="leading")', "dpmpp-2m", []),
        ("DDIMScheduler(clip_sample=False)", "ddim", [0.0]),
        ("DDPMScheduler(clip_sample=False)", "ddpm", [0.0]),
        (
            "DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)",
            "ddim",
            [Latent.sigma_min],
        ),
    ],
)
def test_the_levels_of_any_scheduler_go_in_as_sigmas(
    theirs: str, solver: str, end: list[float]
) -> None:
    scheduler = build(theirs, 6)
    sigmas = [*levels_of(scheduler), *end]
    found = drive(scheduler, mixture, step if get(solver).stochastic else None)
    if end and end[0] > 0:  # the driver takes x at 0 for the end
        found = found * math.sqrt(1 + end[0] ** 2)
    ended = solve(Latent(), start(sigmas[0]), solver, grid=sigmas, seeds=SEEDS)
    torch.testing.assert_close(ended, found, rtol=0, atol=TOLERANCE)


def wide(x: Tensor, sigma: Tensor) -> Tensor:
    """A denoiser whose pictures leave [-1, 1]."""
    return 3 * mixture(x, sigma)


@pytest.mark.parametrize(
    ("theirs", "solver", "held"),
    [
        ('DDPMScheduler(timestep_spacing="trailing")', "ddpm", Clipped),
        (
            'DPMSolverMultistepScheduler(timestep_spacing="trailing", thresholding=True)',
            "dpmpp-2m",
            Clipped,
        ),
        (
            'DPMSolverMultistepScheduler(timestep_spacing="trailing", thresholding=True, '
            "sample_max_value=100.0)",
            "dpmpp-2m",
            Thresholded,
        ),
    ],
)
def test_clipping_and_thresholding_wrap_the_denoiser(theirs: str, solver: str, held: Any) -> None:
    scheduler = build(theirs, 8)
    found = drive(scheduler, wide, step if get(solver).stochastic else None)
    run = {"grid": "trailing", "end": "zero", "seeds": SEEDS}
    x = start(levels_of(scheduler)[0])
    ended = solve(held(Latent(wide)), x, solver, 8, **run)
    torch.testing.assert_close(ended, found, rtol=0, atol=TOLERANCE)
    assert (solve(Latent(wide), x, solver, 8, **run) - found).abs().max() > 0.1
