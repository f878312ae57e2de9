"""Our solvers equal diffusers' schedulers, step for step, on the schedulers' own grids.

A scheduler is driven as its pipelines drive it, by the same mixture turned into the prediction that
it asks for. Those in VP units hold x_t = alpha_t x, alpha = 1 / sqrt(1 + sigma^2); the k-diffusion
family holds our x.

Tolerance: diffusers keeps its sigmas in float32. Ours are the very same numbers, and theirs are
widened to float64 once their grid is set, so that most schedulers then compute in float64 and agree
to 1e-9; those that cast the state to float32 agree to 2e-6 on ends of size 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.noise import brownian, normal
from fewstep.solving import solve
from tests.support.testbed import Mixture

diffusers: Any = pytest.importorskip("diffusers")

# Stable Diffusion's table, as its scheduler_config.json has it: sigma from 14.6 down.
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SEEDS = [5, 6, 7, 8]
SHAPE = (3,)
WIDE, NARROW = 1e-9, 2e-6


def start(sigma: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return sigma * torch.randn(len(SEEDS), *SHAPE, generator=generator, dtype=torch.float64)


def make(scheduler: str, evaluations: int = 8, **options: Any) -> Any:
    """A scheduler with its grid set, and that grid in float64."""
    made = getattr(diffusers, scheduler)(**{**TABLE, **options})
    made.set_timesteps(evaluations)
    if hasattr(made, "sigmas"):
        made.sigmas = made.sigmas.double()
        made.set_begin_index(0)  # not looked up by time: rounded times may repeat
    return made


def alpha(sigma: float) -> float:
    return 1 / math.sqrt(1 + sigma**2)


def output(scheduler: Any, x: Tensor, sigma: float) -> Tensor:
    """What the scheduler's network would return at x = x_t / alpha_t."""
    told = torch.full((len(x),), sigma, dtype=torch.float64)
    denoised = Mixture()(x, told)
    return denoised if scheduler.config.prediction_type == "sample" else (x - denoised) / sigma


def drive_vp(
    scheduler: Any, sigmas: list[float], noise: Callable[[int], Tensor] | None = None, **extra: Any
) -> Tensor:
    """Run a scheduler that lives in VP units; noise: of step i."""
    x_t = alpha(sigmas[0]) * start(sigmas[0])
    for i, (sigma, t) in enumerate(zip(sigmas, scheduler.timesteps, strict=False)):
        fresh = {} if noise is None else {"variance_noise": noise(i)}
        made = output(scheduler, x_t / alpha(sigma), sigma)
        x_t = scheduler.step(made, t, x_t, return_dict=False, **fresh, **extra)[0].double()
    return x_t / alpha(sigmas[-1])


def drive_sigma(scheduler: Any, **extra: Any) -> Tensor:
    """Run a scheduler of the k-diffusion family."""
    x = start(float(scheduler.sigmas[0]))
    for i, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, t)  # for its side effect; the mixture takes x as it is
        middle = hasattr(scheduler, "sigmas_interpol") and not scheduler.state_in_first_order
        sigma = float((scheduler.sigmas_interpol if middle else scheduler.sigmas)[i])
        made = output(scheduler, x, sigma)
        x = scheduler.step(made, t, x, return_dict=False, **extra)[0].double()
    return x


def ours(name: str, sigmas: list[float], **options: Any) -> Tensor:
    return solve(Mixture(), start(sigmas[0]), name, grid=sigmas, **options)


def assert_same(one: Tensor, other: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


# lower_order_final=False: ours keep their order on the last intervals, unless the grid ends at 0.
DPM = {"prediction_type": "sample", "lower_order_final": False}
VP = {
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}, NARROW),
    "dpmpp-3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}, NARROW),
    "unipc-2": ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}, WIDE),
    "unipc-2-bh1": ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh1"}, WIDE),
    "unipc-3": ("UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh2"}, WIDE),
    "unipc-3-bh1": ("UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh1"}, WIDE),
    "deis-2": ("DEISMultistepScheduler", {"solver_order": 2}, WIDE),
    "deis-3": ("DEISMultistepScheduler", {"solver_order": 3}, WIDE),
}


@pytest.mark.parametrize("grid", ["linspace", "karras"])
@pytest.mark.parametrize("name", VP)
def test_multistep_schedulers_down_to_sigma_min(name, grid):
    scheduler, options, tolerance = VP[name]
    # DEIS has no such option: it always ends at sigma_min
    end = {} if "DEIS" in scheduler else {"final_sigmas_type": "sigma_min"}
    theirs = make(scheduler, **{**DPM, **options, **end}, use_karras_sigmas=grid == "karras")
    sigmas = theirs.sigmas.tolist()
    if grid == "karras":
        # their karras grid ends at sigma_min already, which is then repeated: up to there
        sigmas, theirs.timesteps = sigmas[:-1], theirs.timesteps[:-1]
    assert_same(ours(name, sigmas), drive_vp(theirs, sigmas), tolerance)


@pytest.mark.parametrize("name", ["dpmpp-2m", "dpmpp-3m", "unipc-2"])
def test_multistep_schedulers_down_to_zero(name):
    scheduler, options, tolerance = VP[name]
    # UniPC falls to order 1 only if told to, which at order 2 touches the last interval alone
    final = {"final_sigmas_type": "zero", "lower_order_final": "UniPC" in scheduler}
    theirs = make(scheduler, **{**DPM, **options, **final})
    sigmas = theirs.sigmas.tolist()
    assert sigmas[-1] == 0
    assert_same(ours(name, sigmas), drive_vp(theirs, sigmas), tolerance)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim(eta):
    # "leading" times end at the table's first entry, where set_alpha_to_one=False would stay
    theirs = make(
        "DDIMScheduler", prediction_type="epsilon", clip_sample=False, set_alpha_to_one=False
    )
    kept = theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    sigmas = [math.sqrt(1 / float(kept[t]) - 1) for t in theirs.timesteps]
    theirs.timesteps = theirs.timesteps[:-1]
    found = drive_vp(
        theirs, sigmas, lambda i: normal(SEEDS, SHAPE, "step", i, torch.float64), eta=eta
    )
    assert_same(ours(f"ddim-eta:eta={eta}", sigmas, seeds=SEEDS), found, WIDE)
    if eta == 0:
        assert_same(ours("ddim", sigmas), found, WIDE)


SIGMA = {
    "euler": ("EulerDiscreteScheduler", {}, NARROW),
    "heun": ("HeunDiscreteScheduler", {}, WIDE),
    "dpm-solver-2": ("KDPM2DiscreteScheduler", {}, NARROW),  # its midpoints are set in float32
    "lms-4": ("LMSDiscreteScheduler", {}, WIDE),
    "lms-3": ("LMSDiscreteScheduler", {"order": 3}, WIDE),
    "lms-2": ("LMSDiscreteScheduler", {"order": 2}, WIDE),
}


@pytest.mark.parametrize("name", SIGMA)
def test_schedulers_of_the_k_diffusion_family_down_to_zero(name):
    scheduler, options, tolerance = SIGMA[name]
    theirs = make(scheduler, prediction_type="epsilon")
    # two-stage schedulers list each level twice
    sigmas = sorted(set(theirs.sigmas.tolist()), reverse=True)
    assert len(sigmas) == 9
    assert sigmas[-1] == 0
    assert_same(ours(name, sigmas), drive_sigma(theirs, **options), tolerance)


def test_ipndm_with_its_own_levels_replaced_by_ours():
    """Its own start has alpha = 0; it reads levels from `alphas` and `betas`, and predicts v."""
    sigmas = make("EulerDiscreteScheduler").sigmas.tolist()
    theirs = diffusers.IPNDMScheduler()
    theirs.set_timesteps(8)
    theirs.set_begin_index(0)
    theirs.alphas = torch.tensor([alpha(sigma) for sigma in sigmas], dtype=torch.float64)
    theirs.betas = torch.tensor([sigma * alpha(sigma) for sigma in sigmas], dtype=torch.float64)
    x_t = alpha(sigmas[0]) * start(sigmas[0])
    for i, t in enumerate(theirs.timesteps):
        x = x_t / theirs.alphas[i]
        denoised = Mixture()(x, torch.full((len(x),), sigmas[i], dtype=torch.float64))
        v = theirs.alphas[i] * (x - denoised) / sigmas[i] - theirs.betas[i] * denoised
        x_t = theirs.step(v, t, x_t, return_dict=False)[0]
    assert_same(ours("ipndm-4", sigmas), x_t, WIDE)


def test_euler_ancestral_fed_with_our_noise(monkeypatch):
    from diffusers.schedulers import scheduling_euler_ancestral_discrete as module

    draws = iter(range(8))

    def ours_instead(shape, **_: Any) -> Tensor:
        return normal(SEEDS, shape[1:], "step", next(draws))

    monkeypatch.setattr(module, "randn_tensor", ours_instead)
    theirs = make("EulerAncestralDiscreteScheduler", prediction_type="epsilon")
    found = drive_sigma(theirs)
    assert next(draws, None) is None  # all drawn: the last one is multiplied by 0
    assert_same(ours("euler-ancestral", theirs.sigmas.tolist(), seeds=SEEDS), found, NARROW)


@pytest.mark.parametrize("end", ["sigma_min", "zero"])
def test_sde_dpmpp_2m_fed_with_our_brownian_path(end):
    theirs = make(
        "DPMSolverMultistepScheduler",
        **DPM,
        algorithm_type="sde-dpmsolver++",
        solver_order=2,
        final_sigmas_type=end,
    )
    sigmas = theirs.sigmas.tolist()

    def increment(i: int) -> Tensor:
        # into 0 theirs multiplies it by 0
        return brownian(SEEDS, SHAPE, (sigmas[i], sigmas[i + 1]))

    found = drive_vp(theirs, sigmas, increment)
    assert_same(ours("dpmpp-2m-sde", sigmas, seeds=SEEDS), found, NARROW)
