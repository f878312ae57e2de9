"""Pipelines of diffusers run by our solvers equal the same pipelines run by their own schedulers.

Every pipeline is a small real one, made by `pipelines.py` and read back from its files. Ours is
`fewstep.solve` on the bound denoiser; theirs is the pipeline's own call, from the same noise, its
states recorded as the scheduler returns them. Tolerance: both compute the network in float32 and
the schedulers keep their sigmas in float32; the states are compared relative to their size.
"""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.grid import discrete
from fewstep.integrations.diffusers import FewstepScheduler
from fewstep.models.families import FAMILIES
from fewstep.noise import normal
from fewstep.solver import get
from tests.support import pipelines
from tests.support.pipelines import diffusers

PROMPTS = ["a cat sat on a mat", "mat"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The folder of each pipeline, as diffusers writes it."""
    base = tmp_path_factory.mktemp("pipelines")
    return {name: pipelines.saved(name, base / name) for name in pipelines.MAKERS}


def theirs(pipe: Any, run: Any) -> Tensor:
    """The last state that the pipeline's scheduler returned while `run(pipe)` went on."""
    states, step = [], pipe.scheduler.step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        out = step(*args, **kwargs)
        states.append(out[0] if isinstance(out, tuple) else out.prev_sample)
        return out

    pipe.scheduler.step = recorded
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        run(pipe)
    return states[-1].float()


def assert_close(ours: Tensor, other: Tensor, tolerance: float = 1e-4) -> None:
    size = max(1.0, float(other.abs().max()))
    torch.testing.assert_close(ours / size, other / size, rtol=0, atol=tolerance)


def vp_sigmas(scheduler: Any) -> list[float]:
    """The levels that a scheduler visits after set_timesteps, and then 0."""
    if hasattr(scheduler, "sigmas"):
        return scheduler.sigmas.tolist()
    table = torch.cumprod(1 - scheduler.betas.double(), 0)
    return [math.sqrt(1 / float(table[t]) - 1) for t in scheduler.timesteps] + [0.0]


def solve(model: Any, solver: Any, grid: list[float], z: Tensor, **conditions: Any) -> Tensor:
    """Our route: from the pipeline's noise z in its own units."""
    x = z / model.process.schedule.alpha(grid[0])
    with torch.no_grad():
        return fewstep.solve(model.denoiser(**conditions), x, solver, grid=grid)


SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {}),
    "unipc-2": ("UniPCMultistepScheduler", {}),
}
FLOW_SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0}),
    "unipc-2": ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0}),
}
V = {"prediction_type": "v_prediction"}
ZERO_SNR = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
# The class, and what its scheduler is told; clipping has a test of its own.
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "DDPM": ("ddpm", {"clip_sample": False}),
    "DDIM": ("ddim", {}),
    "LDM": ("ldm", {}),
    "Stable Diffusion 1": ("sd", {}),
    "Stable Diffusion 2, v": ("sd", V),
    "Stable Diffusion XL": ("sdxl", {}),
    "Stable Diffusion 3": ("sd3", {}),
}
GUIDANCE = {
    name: [None, 5.0] if family in pipelines.TEXT else [None]
    for name, (family, _) in CLASSES.items()
}


def scheduler_of(pipe: Any, name: str, solver: str) -> Any:
    """diffusers' scheduler for one of our solvers, on the pipeline's process."""
    kind, options = (FLOW_SOLVERS if name == "sd3" else SOLVERS)[solver]
    made = getattr(diffusers, kind).from_config(pipe.scheduler.config, **options)
    if name == "sd3" and solver != "ddim":
        made.register_to_config(prediction_type="flow_prediction")
        made.set_timesteps = partial(_keep_times, made, made.set_timesteps)
    return made


def _keep_times(scheduler: Any, original: Any, *args: Any, **kwargs: Any) -> None:
    """Their multistep schedulers of flows cut the network's time, 665.9, to a whole number, away
    from the level that they step from. Here it is kept."""
    original(*args, **kwargs)
    scheduler.timesteps = 1000 * scheduler.sigmas[:-1]


def levels_of(scheduler: Any, flow: bool) -> list[float]:
    """The levels that it visits after set_timesteps, in EDM units, and then 0."""
    if not flow:
        return vp_sigmas(scheduler)
    times = [min(t, 1 - 1e-5) for t in scheduler.sigmas.double().tolist()]
    return [t / (1 - t) for t in times]


def test_every_family_is_tried_and_listed():
    """A new line of FAMILIES needs a maker, the comparison with diffusers, and its documents."""
    made = {name: type(make()).__name__ for name, make in pipelines.MAKERS.items()}
    assert sorted(made.values()) == sorted(FAMILIES)
    texts = [name for name, kind in made.items() if FAMILIES[kind].encode]
    assert texts == [*pipelines.TEXT, *pipelines.STUDENTS]
    assert {*(family for family, _ in CLASSES.values()), *pipelines.STUDENTS} == set(made)
    table = (Path(__file__).parents[2] / "docs" / "diffusers.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+Pipeline)`", "".join(rows))) == sorted(FAMILIES)


class Route:
    """One pipeline's class, run by diffusers and by us from the same noise and prompts."""

    def __init__(self, name: str, guidance: float | None, folder: Path) -> None:
        family, options = CLASSES[name]
        self.family, self.text = family, family in pipelines.TEXT
        self.model = pipelines.load(pipelines.saved(family, folder, **options))
        self.pipe = pipelines.MAKERS[family](**options)
        self.z = pipelines.noise(2, *self.model.shape) if self.text else start_of(self.model, 7)
        self.conditions: dict[str, Any] = {}
        if self.text:
            negative = None if guidance is None else ["on", "a"]
            self.conditions = {"prompt": PROMPTS, "negative": negative, "guidance": guidance}

    def by_diffusers(self, scheduler: Any, intervals: int) -> Tensor:
        """The last state of the pipeline's own call."""
        self.pipe.scheduler = scheduler
        run: dict[str, Any] = {"num_inference_steps": intervals}
        if not self.text:
            generator = torch.Generator().manual_seed(7)
            return theirs(self.pipe, lambda pipe: pipe(2, generator=generator, **run))
        run |= {"guidance_scale": self.conditions["guidance"] or 1.0, "output_type": "latent"}
        run |= {"negative_prompt": self.conditions["negative"], "latents": self.z}
        return theirs(self.pipe, lambda pipe: pipe(PROMPTS, **run))


@pytest.mark.parametrize(
    "solver",
    [pytest.param(s, marks=pytest.mark.slow if s != "dpmpp-2m" else ()) for s in SOLVERS],
)
@pytest.mark.parametrize(
    "name, guidance", [(name, scale) for name in CLASSES for scale in GUIDANCE[name]]
)
def test_three_routes_lead_to_the_same_latents(name, guidance, solver, tmp_path):
    """diffusers' pipeline and scheduler, diffusers' pipeline with our scheduler, and ours alone."""
    route = Route(name, guidance, tmp_path)
    theirs_too = scheduler_of(route.pipe, route.family, solver)
    config = route.pipe.scheduler.config
    made_for_ddim = {"DDPM": ("unipc-2",), "DDIM": ("dpmpp-2m", "unipc-2")}
    theirs_too.set_timesteps(5)
    grid = levels_of(theirs_too, route.family == "sd3")
    ours = solve(route.model, solver, grid, route.z, **route.conditions)
    plan = FewstepScheduler.from_config(config, solver=get(solver).plan(grid))
    # both take the network's times from levels in float64; theirs from the table, in float32
    assert_close(route.by_diffusers(plan, 5), ours, 1e-5)
    if solver not in made_for_ddim.get(name, ()):  # their steps do not take what these pass
        assert_close(route.by_diffusers(theirs_too, 5), ours, 1e-4)


@pytest.mark.parametrize("nfe", [1, 4])
def test_a_latent_consistency_model_samples_as_in_diffusers(nfe, folders, monkeypatch):
    """With our noise at each of its levels, in place of what its scheduler would draw."""
    model, pipe = pipelines.load(folders["lcm"]), pipelines.lcm()
    assert model.card.auto["4"].solver == "consistency"
    seeds, given = [3, 5], iter(range(nfe))

    def noise(shape: Any, **options: Any) -> Tensor:
        assert tuple(shape) == (2, *model.shape)
        return normal(seeds, model.shape, "step", next(given))

    monkeypatch.setattr(type(pipe.scheduler).__module__ + ".randn_tensor", noise)
    z = normal(seeds, model.shape, "prior")
    run = {"num_inference_steps": nfe, "guidance_scale": 8.0, "output_type": "latent"}
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        other = pipe(PROMPTS, latents=z, **run).images
        denoiser = model.denoiser(prompt=PROMPTS, guidance=8.0)
        grid = model.card.auto[str(nfe)].grid
        ours = fewstep.solve(denoiser, model.prior(seeds), "consistency", grid=grid, seeds=seeds)
    assert_close(ours, other, 1e-5)
    made = fewstep.sample(model, nfe=nfe, seeds=seeds, prompt=PROMPTS, guidance=8.0)
    assert (made.network_calls, made.provenance["solver"]) == (nfe, "consistency")


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m"])
def test_zero_terminal_snr_starts_at_pure_noise_as_the_pipeline_does(solver, tmp_path):
    model = pipelines.load(pipelines.saved("sd", tmp_path, **ZERO_SNR))
    pipe = pipelines.sd(**ZERO_SNR)
    kind, options = SOLVERS[solver]
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **options)
    z = pipelines.noise(2, *model.shape)
    run = {"guidance_scale": 4.0, "num_inference_steps": 4, "output_type": "latent"}
    found = theirs(pipe, lambda pipe: pipe(PROMPTS, latents=z, **run))
    grid = [4096.0, *vp_sigmas_of_times(pipe)[1:], 0.0]
    assert model.process.sigma_max == 4096.0
    ours = solve(model, solver, grid, z, prompt=PROMPTS, guidance=4.0)
    # DDIM's abar is 0 at the first level, ours 2^-24, whose alpha is 2.4e-4
    assert_close(ours, found, 5e-4 if solver == "ddim" else 1e-4)


def vp_sigmas_of_times(pipe: Any) -> list[float]:
    table = torch.cumprod(1 - pipe.scheduler.betas.double(), 0)
    return [math.sqrt(1 / max(float(table[t]), 2.0**-24) - 1) for t in pipe.scheduler.timesteps]


def start_of(model: Any, generator_seed: int) -> Tensor:
    """The noise that an unconditional pipeline draws of a generator."""
    generator = torch.Generator().manual_seed(generator_seed)
    return torch.randn((2, *model.shape), generator=generator)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_unconditional_pixels_equal_the_pipeline(name, folders):
    """Where D is clipped, its eps has to follow it: use_clipped_model_output."""
    model = pipelines.load(folders[name])
    made = pipelines.MAKERS[name]()
    pipe = diffusers.DDIMPipeline(unet=made.unet, scheduler=made.scheduler)
    assert pipe.scheduler.config.clip_sample == (name == "ddpm")
    run = {"num_inference_steps": 6, "use_clipped_model_output": True, "output_type": "np"}
    found = theirs(pipe, lambda pipe: pipe(2, generator=torch.Generator().manual_seed(7), **run))
    assert_close(solve(model, "ddim", vp_sigmas(pipe.scheduler), start_of(model, 7)), found)


def test_pictures_of_latents_equal_the_pipelines(folders):
    model, pipe, pictures = pipelines.load(folders["ldm"]), pipelines.ldm(), []
    run = {"num_inference_steps": 5, "output_type": "np", "return_dict": False}
    generator = torch.Generator().manual_seed(7)
    found = theirs(pipe, lambda pipe: pictures.append(pipe(2, generator=generator, **run)[0]))
    off = model.decode(found).astype(int) - (pictures[0] * 255).round().astype(int)
    assert abs(off).max() <= 1  # their last bit


@pytest.mark.parametrize("guidance", [None, 4.0])
@pytest.mark.parametrize("kind, t5", [("Euler", False), ("Heun", True)])
def test_flow_equals_the_pipeline_with_its_own_scheduler(kind, guidance, t5, folders, tmp_path):
    folder = folders["sd3"] if t5 else pipelines.saved("sd3", tmp_path, t5=False)
    model = pipelines.load(folder)
    pipe = pipelines.sd3(t5)
    if kind == "Heun":
        pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    z = pipelines.noise(2, *model.shape)
    found = theirs(
        pipe,
        lambda pipe: pipe(
            PROMPTS,
            negative_prompt=["on", "a"],
            guidance_scale=guidance or 1.0,
            num_inference_steps=4,
            latents=z,
            output_type="latent",
        ),
    )
    times = list(dict.fromkeys(pipe.scheduler.sigmas.double().tolist()))  # Heun lists them twice
    assert times[0] == 1
    assert times[-1] == 0
    grid = [t / (1 - t) for t in [1 - 1e-5, *times[1:]]]
    solver = {"Euler": "ddim", "Heun": "heun"}[kind]
    negative = None if guidance is None else ["on", "a"]
    x = (1 + grid[0]) * z
    denoiser = model.denoiser(prompt=PROMPTS, negative=negative, guidance=guidance)
    with torch.no_grad():
        assert_close(fewstep.solve(denoiser, x, solver, grid=grid), found)


def test_a_shifted_flow_has_the_schedulers_times_on_the_discrete_grid(folders):
    model = pipelines.load(folders["sd3"])
    shift, n = 3.0, 8
    uniform = [1 - i / n for i in range(n)]
    times = [shift * u / (1 + (shift - 1) * u) for u in uniform]
    made = discrete(n + 1, model.schedule)
    found = [sigma / (1 + sigma) for sigma in made]
    # the ends differ: t = 1 - 1e-5 for 1, u = 1e-3 for 0
    assert max(abs(a - b) for a, b in zip(found, times, strict=False)) < 3e-3
    assert found[0] == pytest.approx(1 - 1e-5, abs=1e-9)
