"""FewstepScheduler in diffusers' own pipelines: the common behaviour of schedulers, and that a
pipeline with it gives what `fewstep.solve` gives."""

from __future__ import annotations

import copy
import inspect
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.grid import trailing
from fewstep.integrations.diffusers import FewstepScheduler
from fewstep.learned.amed import Amed
from fewstep.learned.predictor import Predictor
from fewstep.learned.solver import LearnedSolver
from fewstep.learned.tuned import Tuned
from fewstep.plan import Combine, Eval, Plan, freeze
from fewstep.solver import get
from tests.support import pipelines
from tests.support.pipelines import diffusers

SD = pipelines.SD_TABLE
PROMPTS = ["a cat", "mat"]
ODE = ["ddim", "dpmpp-2m", "unipc-2", "ipndm-4", "heun", "dpm-solver-2", "dpm-solver-3"]
ALL = [*ODE, "ddim-eta", "dpmpp-2m-sde", "churn"]
KINDS = {
    "eps": {**SD},
    "v": {**SD, "prediction_type": "v_prediction"},
    "flow": {"prediction_type": "flow_prediction", "shift": 3.0},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("models")
    folders = {name: pipelines.saved(name, base / name) for name in pipelines.TEXT}
    return {name: pipelines.load(path) for name, path in folders.items()}


def network(x_t: Tensor, t: Tensor) -> Tensor:
    """Something smooth that depends on both, in place of a network."""
    return torch.tanh(x_t + 0.001 * float(t)) * 0.5 + 0.1 * x_t


def run(scheduler: Any, x: Tensor, generator: Any = None, begin: int = 0) -> Tensor:
    """As pipelines drive a scheduler."""
    for t in scheduler.timesteps[begin:]:
        told = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(told, t), t, x, generator=generator, return_dict=False)[0]
    return x


def assert_close(ours: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    size = max(1.0, float(other.abs().max()))
    torch.testing.assert_close(ours / size, other / size, rtol=0, atol=tolerance)


def silent(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("guidance", [pytest.param(1.0, marks=pytest.mark.slow), 4.0])
@pytest.mark.parametrize("solver", ODE)
@pytest.mark.parametrize("name", pipelines.TEXT)
def test_a_pipeline_with_our_scheduler_gives_what_our_own_route_gives(
    name, solver, guidance, models
):
    model, pipe = models[name], silent(pipelines.MAKERS[name]())
    pipe.scheduler = FewstepScheduler.from_config(pipe.scheduler.config, solver=solver)
    z = pipelines.noise(2, *model.shape)
    pictures = {"guidance_scale": guidance, "latents": z, "output_type": "latent"}
    found = pipe(PROMPTS, num_inference_steps=4, **pictures).images
    grid = (*trailing(5, model.schedule)[:-1], 0.0)
    x = z / model.process.schedule.alpha(grid[0])
    with torch.no_grad():
        denoiser = model.denoiser(prompt=PROMPTS, guidance=guidance)
        ours = fewstep.solve(denoiser, x, solver, grid=grid)
    # from sigma = 1e5 the stages of a singlestep solver magnify rounding errors
    rough = name == "sd3" and solver in ("heun", "dpm-solver-2", "dpm-solver-3")
    assert_close(found, ours, 1e-4 if rough else 1e-5)


@pytest.mark.parametrize("solver", ["ipndm-2", "heun", "dpm-solver-2", "unipc-2"])
def test_an_analytic_first_step_saves_the_first_call(solver, models):
    model, pipe = models["sd"], silent(pipelines.sd())
    config, calls = pipe.scheduler.config, {}
    for afs in ("none", "zero"):
        pipe.scheduler = FewstepScheduler.from_config(config, solver=solver, afs=afs)
        pipe.scheduler.set_timesteps(4)
        calls[afs] = len(pipe.scheduler.timesteps)
    assert calls["zero"] == calls["none"] - 1
    z = pipelines.noise(2, *model.shape)
    pictures = {"guidance_scale": 1.0, "latents": z, "output_type": "latent"}
    found = pipe(PROMPTS, num_inference_steps=4, **pictures).images
    grid = (*trailing(5, model.schedule)[:-1], 0.0)
    x = z / model.process.schedule.alpha(grid[0])
    with torch.no_grad():
        denoiser = model.denoiser(prompt=PROMPTS)
        ours = fewstep.solve(denoiser, x, solver, grid=grid, afs="zero")
    assert_close(found, ours)


def learned_like(sigmas: tuple[float, ...], first_told: float) -> Plan:
    """What a learned table amounts to: odd weights, a level inside, the network told another."""

    def ops():
        for cur, nxt in pairwise(sigmas):
            middle = (cur * nxt) ** 0.5
            yield Eval(cur, cond=first_told * cur if cur == sigmas[0] else None)
            yield Combine((middle - cur,), middle, accept=False)
            yield Eval(middle, cond=1.1 * middle)
            yield Combine((0.9 * (nxt - cur), 0.1 * (nxt - cur)), nxt)

    return freeze(ops(), prediction="eps", depth=2, solver="learned", sigmas=sigmas)


@pytest.mark.parametrize("first_told", [1.0, 0.8])
def test_a_plan_runs_as_it_is_and_is_told_other_levels(first_told, models, tmp_path):
    model, pipe = models["sd"], silent(pipelines.sd())
    plan = learned_like((model.card.sigma_max, 3.0, 0.7, 0.05), first_told)
    pipe.scheduler = FewstepScheduler.from_plan(pipe.scheduler.config, plan)
    assert (pipe.scheduler.order, len(pipe.scheduler.timesteps)) == (2, 6)
    z = pipelines.noise(2, *model.shape)
    pictures = {"guidance_scale": 1.0, "latents": z, "output_type": "latent"}
    found = pipe(PROMPTS, num_inference_steps=3, **pictures).images
    with torch.no_grad():
        x = z / model.process.schedule.alpha(model.card.sigma_max)
        ours = fewstep.solve(model.denoiser(prompt=PROMPTS), x, plan)
    assert_close(found, ours * model.process.schedule.alpha(0.05))  # the plan ends above 0
    pipe.scheduler.save_pretrained(tmp_path)
    again: Any = FewstepScheduler.from_pretrained(tmp_path)
    assert Plan.from_json(json.dumps(again.config["plan"])) == plan
    with pytest.raises(ValueError, match="num_inference_steps=3"):
        pipe.scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="num_inference_steps=3"):
        pipe.scheduler.set_timesteps(sigmas=[3.0, 1.0])


@pytest.mark.parametrize("theirs, ours", [("DDIM", "ddim"), ("DPMSolverMultistep", "dpmpp-2m")])
def test_the_scheduler_it_replaces_gives_the_same_states(theirs, ours):
    spacing = {"timestep_spacing": "trailing"}
    clip = {"clip_sample": False} if theirs == "DDIM" else {}
    other = getattr(diffusers, f"{theirs}Scheduler")(**SD, **spacing, **clip)
    mine = FewstepScheduler.from_config(other.config, solver=ours)
    for scheduler in (other, mine):
        scheduler.set_timesteps(5)
    assert mine.timesteps.tolist() == pytest.approx(other.timesteps.tolist(), abs=1e-3)
    z, ends = pipelines.noise(2, 4, 8, 8), []
    for scheduler in (mine, other):
        x = z
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
        ends.append(x)
    assert_close(*ends, tolerance=1e-4)


def image_pipe() -> Any:
    parts = pipelines.sd().components
    return silent(diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False))


def test_image_to_image_starts_inside_and_equals_our_own_route(models):
    model, pipe = models["sd"], image_pipe()
    pipe.scheduler = FewstepScheduler.from_config(pipe.scheduler.config, solver="dpmpp-2m")
    latents = pipelines.noise(2, *model.shape, seed=1) * 0.3
    generators = [torch.Generator().manual_seed(i) for i in (5, 6)]
    found = pipe(
        PROMPTS,
        image=latents,
        strength=0.5,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=generators,
        output_type="latent",
    ).images
    z = torch.cat(
        [torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(i)) for i in (5, 6)]
    )
    grid = (*trailing(5, model.schedule)[2:-1], 0.0)
    with torch.no_grad():
        start = latents + grid[0] * z
        assert_close(
            found, fewstep.solve(model.denoiser(prompt=PROMPTS), start, "dpmpp-2m", grid=grid)
        )


def test_image_to_image_calls_back_and_takes_other_times(models):
    """strength 1/2 of four times of the user's own leaves the last two of them."""
    model, pipe, seen = models["sd"], image_pipe(), []
    pipe.scheduler = FewstepScheduler.from_config(pipe.scheduler.config, solver="unipc-2")
    latents = pipelines.noise(1, *model.shape, seed=1) * 0.3

    def note(pipe: Any, index: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(float(t))
        return {"latents": tensors["latents"]}

    run = {"image": latents, "strength": 0.5, "guidance_scale": 3.0, "output_type": "latent"}
    generator = torch.Generator().manual_seed(5)
    found = pipe(
        "mat", generator=generator, timesteps=[999, 700, 400, 100], callback_on_step_end=note, **run
    ).images
    assert seen == pytest.approx([400, 100], abs=1e-3)
    z = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(5))
    grid = (model.schedule.sigma(400.0), model.schedule.sigma(100.0), 0.0)
    with torch.no_grad():
        denoiser = model.denoiser(prompt="mat", guidance=3.0)
        assert_close(found, fewstep.solve(denoiser, latents + grid[0] * z, "unipc-2", grid=grid))
    with pytest.raises(ValueError, match="no timestep is left"):
        pipe.scheduler.add_noise(latents, z, torch.tensor([]))


@pytest.mark.parametrize("strength, left", [(1.0, 3), (0.4, 1)])
def test_image_to_image_with_a_plan_that_keeps_to_its_intervals(strength, left, models):
    model, pipe = models["sd"], image_pipe()
    sigmas = (model.card.sigma_max, 3.0, 0.7, 0.05)
    plan = learned_like(sigmas, 1.0)
    pipe.scheduler = FewstepScheduler.from_plan(pipe.scheduler.config, plan)
    latents = pipelines.noise(1, *model.shape, seed=1) * 0.3
    run = {"image": latents, "num_inference_steps": 3, "guidance_scale": 1.0}
    run |= {"generator": torch.Generator().manual_seed(5), "output_type": "latent"}
    found = pipe("mat", strength=strength, **run).images
    z = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(5))
    rest = sigmas[-1 - left :]
    with torch.no_grad():
        denoiser = model.denoiser(prompt="mat")
        ours = fewstep.solve(denoiser, latents + rest[0] * z, learned_like(rest, 1.0))
    assert_close(found, ours * model.process.schedule.alpha(0.05))


@pytest.mark.parametrize("name, given", [("sd", "timesteps"), ("sd", "sigmas"), ("sd3", "sigmas")])
def test_pipelines_pass_on_times_and_levels_of_the_users_own(name, given, models):
    model, pipe = models[name], silent(pipelines.MAKERS[name]())
    pipe.scheduler = FewstepScheduler.from_config(pipe.scheduler.config, solver="dpmpp-2m")
    values = {"timesteps": [999, 600, 200], "sigmas": [14.0, 3.0, 0.5]}[given]
    if name == "sd3":  # times before the shift by 3
        values = [0.95, 0.5, 0.2]
    z = pipelines.noise(1, *model.shape)
    run = {"latents": z, "guidance_scale": 3.0, "output_type": "latent", given: values}
    found = pipe("mat", **run).images
    read = {"timesteps": model.schedule.sigma, "sigmas": float}[given]
    if name == "sd3":
        read = model.schedule.sigma
    grid = [*(read(float(value)) for value in values), 0.0]
    x = z / model.process.schedule.alpha(grid[0])
    with torch.no_grad():
        denoiser = model.denoiser(prompt="mat", guidance=3.0)
        assert_close(found, fewstep.solve(denoiser, x, "dpmpp-2m", grid=grid))


LEARNED = {"tuned": None, "amed": None, "amed-plugin": "dpmpp-2m"}


def learned_plan(method: str, afs: str, sigmas: tuple[float, ...]) -> Plan:
    """What such a solver comes to, its numbers moved away from where training starts."""
    generator = torch.Generator().manual_seed(2)
    if method == "tuned":
        table = Tuned.start("ipndm-2", sigmas, afs)
        for value in table.learned.values():
            value += 0.05 * torch.randn(value.shape, generator=generator)
        return LearnedSolver(table).plan()
    weights = Predictor.fresh(0, 0.05, 0.2, 0, torch.device("cpu")).weights
    for name in ("head.weight", "head.bias"):
        weights[name] = 0.5 * torch.randn(weights[name].shape, generator=generator)
    predictor = Predictor(0, 0.05, 0.2, weights)
    return LearnedSolver(Amed(method, LEARNED[method], sigmas, afs, predictor)).plan()


@pytest.mark.parametrize("afs", ["none", "zero"])
@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_learned_solvers_without_features_are_schedulers(name, method, afs, models, tmp_path):
    model, pipe = models[name], silent(pipelines.MAKERS[name]())
    plan = learned_plan(method, afs, (model.card.sigma_max, 4.0, 1.0, 0.2))
    pipe.scheduler = FewstepScheduler.from_config(pipe.scheduler.config, solver=plan)
    pipe.scheduler.save_pretrained(tmp_path)
    pipe.scheduler = FewstepScheduler.from_pretrained(tmp_path)
    z = pipelines.noise(2, *model.shape)
    run = {"latents": z, "guidance_scale": 4.0, "output_type": "latent"}
    found = pipe(PROMPTS, num_inference_steps=len(plan.sigmas) - 1, **run).images
    x = z / model.process.schedule.alpha(model.card.sigma_max)
    with torch.no_grad():
        ours = fewstep.solve(model.denoiser(prompt=PROMPTS, guidance=4.0), x, plan)
    assert_close(found, ours * model.process.schedule.alpha(plan.sigmas[-1]))


@pytest.mark.parametrize("solver", ["heun", "unipc-2", "dpm-solver-3", "ddim-eta:eta=0"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_begins_inside_is_the_solver_on_the_rest_of_the_grid(kind, solver):
    whole = FewstepScheduler(solver=solver, **KINDS[kind])
    whole.set_timesteps(5)
    part = FewstepScheduler(solver=solver, end="zero", **KINDS[kind])
    begin = 2 * whole.order
    edges = [float(whole.timesteps[i]) for i in range(begin, len(whole.timesteps), whole.order)]
    part.set_timesteps(timesteps=edges)
    x = pipelines.noise(1, 3, 4, 4)
    whole.set_begin_index(begin)
    # float32 times of a flow near its start have lost digits of 1 - t
    assert_close(run(whole, x, begin=begin), run(part, x), 1e-4)
    with pytest.raises(ValueError, match="intervals begin at") if whole.order > 1 else _nothing():
        whole.set_timesteps(5)
        whole.set_begin_index(begin + 1)
        run(whole, x, begin=begin + 1)


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *details: Any) -> None: ...


def test_a_plan_that_uses_what_came_before_cannot_start_inside():
    sigmas = (14.0, 5.0, 1.0, 0.1)
    multistep = FewstepScheduler.from_plan(SD, get("dpmpp-2m").plan(sigmas))
    multistep.set_timesteps()
    multistep.set_begin_index(1)
    with pytest.raises(ValueError, match="cannot start at its evaluation 1"):
        run(multistep, pipelines.noise(1, 3, 4, 4), begin=1)
    single = FewstepScheduler.from_plan(SD, get("heun").plan(sigmas))
    single.set_timesteps(3)
    single.set_begin_index(2)
    run(single, pipelines.noise(1, 3, 4, 4), begin=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", ALL)
def test_step_keeps_shape_dtype_and_device_and_repeats_itself(solver, kind):
    ends = []
    for dtype in (torch.float32, torch.float32, torch.float64, torch.bfloat16):
        scheduler = FewstepScheduler(solver=solver, **KINDS[kind])
        scheduler.set_timesteps(4, device="cpu")
        x = pipelines.noise(2, 3, 8, 6).to(dtype)
        generator = torch.Generator().manual_seed(0)
        out = run(scheduler, x, generator)
        assert (out.shape, out.dtype, out.device) == (x.shape, dtype, x.device)
        assert torch.isfinite(out).all()
        ends.append(out)
    assert torch.equal(ends[0], ends[1])
    if solver in ODE:
        assert_close(ends[0], ends[2].float(), 1e-4)
        if kind != "flow":
            assert_close(ends[3].float(), ends[0], 0.1)


@pytest.mark.parametrize("solver", ALL)
def test_saving_and_loading_changes_nothing(solver, tmp_path):
    scheduler = FewstepScheduler(solver=solver, **SD)
    scheduler.save_pretrained(tmp_path)
    json.loads((tmp_path / "scheduler_config.json").read_text())
    again: Any = FewstepScheduler.from_pretrained(tmp_path)
    own = inspect.signature(FewstepScheduler.__init__).parameters.keys() - {"self"}
    assert {key: again.config[key] for key in own} == {key: scheduler.config[key] for key in own}
    x, ends = pipelines.noise(1, 3, 4, 4), []
    for one in (scheduler, again):
        one.set_timesteps(4)
        ends.append(run(one, x, torch.Generator().manual_seed(0)))
    assert torch.equal(*ends)


def test_a_pipeline_is_saved_and_loaded_with_it(models, tmp_path):
    pipe = silent(pipelines.sd())
    pipe.scheduler = FewstepScheduler.from_config(pipe.scheduler.config, solver="unipc-2")
    pipe.save_pretrained(tmp_path)
    again = silent(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path))
    assert type(again.scheduler) is FewstepScheduler
    z = pipelines.noise(1, *models["sd"].shape)
    settings = {"num_inference_steps": 3, "latents": z, "output_type": "latent"}
    one, two = (p("a cat", **settings).images for p in (pipe, again))
    assert_close(one, two)
    assert pipelines.load(tmp_path).card.sigma_max == pytest.approx(14.6146, abs=1e-3)


@pytest.mark.parametrize("solver", ["dpmpp-2m", "heun", "unipc-2"])
def test_a_copy_in_the_middle_of_a_run_goes_on_by_itself(solver):
    scheduler = FewstepScheduler(solver=solver, **SD)
    scheduler.set_timesteps(4)
    x, ends = pipelines.noise(1, 3, 4, 4), []
    for t in scheduler.timesteps[:2]:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
    for one in (copy.deepcopy(scheduler), scheduler):
        y = x
        for t in one.timesteps[2:]:
            y = one.step(network(y, t), t, y, return_dict=False)[0]
        ends.append(y)
    assert torch.equal(*ends)


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm-solver-3", "unipc-2"])
def test_the_timesteps_are_one_for_each_network_call(solver):
    scheduler = FewstepScheduler(solver=solver, **SD)
    scheduler.set_timesteps(6)
    plan = get(solver).plan(tuple(scheduler._full.plan.sigmas))
    assert len(scheduler.timesteps) == fewstep.nfe(plan)
    assert math.ceil(len(scheduler.timesteps) / 6) == scheduler.order
    assert scheduler.num_inference_steps == 6
    assert scheduler.init_noise_sigma == 1
    assert len(scheduler) == 1000


def test_custom_timesteps_and_sigmas_are_the_levels_that_the_network_is_told():
    scheduler: Any = FewstepScheduler(**SD)
    scheduler.set_timesteps(timesteps=[999, 700, 200])
    assert scheduler.timesteps.tolist() == pytest.approx([999, 700, 200], abs=1e-3)
    table = torch.cumprod(1 - scheduler.betas.double(), 0)
    sigmas = [math.sqrt(1 / float(table[t]) - 1) for t in (999, 700, 200)]
    assert scheduler.sigmas.tolist() == pytest.approx([*sigmas, 0], rel=1e-5)
    other = FewstepScheduler(**SD)
    other.set_timesteps(sigmas=[*sigmas, 0.0])
    assert other.timesteps.tolist() == pytest.approx([999, 700, 200], abs=1e-3)
    with pytest.raises(ValueError, match="not both"):
        scheduler.set_timesteps(timesteps=[1], sigmas=[1])


def test_custom_sigmas_of_a_flow_are_times_before_the_shift():
    mine = FewstepScheduler(**KINDS["flow"])
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.2])
    assert mine.timesteps.tolist() == pytest.approx(theirs.timesteps.tolist(), abs=1e-3)
    assert mine.sigmas.tolist() == pytest.approx(theirs.sigmas.tolist(), abs=1e-6)


def test_a_dynamic_shift_comes_from_the_pipeline():
    config = {"use_dynamic_shifting": True}
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    mine = FewstepScheduler.from_config(theirs.config)
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.2], mu=0.8)
    assert mine.timesteps.tolist() == pytest.approx(theirs.timesteps.tolist(), abs=1e-3)
    with pytest.raises(ValueError, match="needs mu"):
        mine.set_timesteps(4)


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_add_noise_is_that_of_the_scheduler_it_replaces(kind):
    x, noise = pipelines.noise(3, 4, 8, 8), pipelines.noise(3, 4, 8, 8, seed=1)
    mine = FewstepScheduler(**KINDS[kind])
    if kind == "eps":
        t = torch.tensor([10, 500, 999])
        other = diffusers.DDIMScheduler(**SD).add_noise(x, noise, t)
        assert_close(mine.add_noise(x, noise, t), other)
    else:
        theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        theirs.set_timesteps(5)
        t = theirs.timesteps[1:4]
        assert_close(mine.scale_noise(x, t, noise), theirs.scale_noise(x, t, noise))


@pytest.mark.parametrize("kind", KINDS)
def test_per_seed_generators_keep_each_picture_to_its_own(kind):
    def end(rows: list[int]) -> Tensor:
        scheduler = FewstepScheduler(solver="ddim-eta", **KINDS[kind])
        scheduler.set_timesteps(4)
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return run(scheduler, pipelines.noise(3, 3, 4, 4)[rows], generators)

    together, alone = end([0, 1, 2]), end([1])
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-5)
    assert not torch.equal(end([0])[0], alone[0])


def test_callbacks_see_each_step_and_what_they_change_counts(models):
    pipe, seen = silent(pipelines.sd()), []
    pipe.scheduler = FewstepScheduler.from_config(pipe.scheduler.config)

    def note(pipe: Any, index: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((index, float(t)))
        return {"latents": tensors["latents"] * (0 if index == 0 else 1)}

    settings = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
    ends = []
    for seed in (0, 1):
        z = pipelines.noise(1, *models["sd"].shape, seed=seed)
        ends.append(pipe("mat", latents=z, callback_on_step_end=note, **settings).images)
    assert [index for index, _ in seen] == [0, 1, 2] * 2
    assert not torch.equal(*ends)  # the history remembers
    ddim = FewstepScheduler.from_config(pipe.scheduler.config, solver="ddim")
    pipe.scheduler, ends = ddim, []
    for seed in (0, 1):
        z = pipelines.noise(1, *models["sd"].shape, seed=seed)
        ends.append(pipe("mat", latents=z, callback_on_step_end=note, **settings).images)
    assert torch.equal(*ends)  # nothing is left of the noise


@pytest.mark.parametrize(
    "kind",
    ["DDIM", "DDPM", "PNDM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "LCM"],
)
def test_the_process_of_other_schedulers_is_kept(kind):
    other = getattr(diffusers, f"{kind}Scheduler")(**SD, prediction_type="v_prediction")
    mine = FewstepScheduler.from_config(other.config)
    torch.testing.assert_close(mine.betas, other.betas)
    assert mine.process.prediction == "v"
    back = getattr(diffusers, f"{kind}Scheduler").from_config(mine.config)
    assert back.config["beta_end"] == SD["beta_end"]


def test_the_process_of_a_flow_is_kept():
    mine = FewstepScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    assert mine.process.prediction == "flow"
    mine.set_timesteps(4)
    times = [3 * u / (1 + 2 * u) * 1000 for u in (1, 0.75, 0.5, 0.25)]
    assert mine.timesteps.tolist() == pytest.approx(times, abs=0.05)


def test_unconditional_pixels_with_clipping(tmp_path):
    model = pipelines.load(pipelines.saved("ddpm", tmp_path))
    pipe = silent(pipelines.ddpm())
    pipe.scheduler = FewstepScheduler.from_config(pipe.scheduler.config, solver="dpmpp-2m")
    pictures = pipe(2, torch.Generator().manual_seed(3), 4, output_type="np").images
    z = torch.randn((2, *model.shape), generator=torch.Generator().manual_seed(3))
    grid = (*trailing(5, model.schedule)[:-1], 0.0)
    x = z / model.process.schedule.alpha(grid[0])
    with torch.no_grad():
        x = fewstep.solve(model.denoiser(), x, "dpmpp-2m", grid=grid)
    off = model.decode(x).astype(int) - (pictures * 255).round().astype(int)
    assert np.abs(off).max() <= 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"solver": "dpmpp-9m"}, "no solver is called|there is no solver"),
        ({"grid": "linear"}, "no grid is called"),
        ({"afs": "mean", "solver": "ipndm-2"}, "does not know"),
        ({"afs": "zero", **KINDS["flow"]}, "no room for"),
        ({"prediction_type": "score"}, "does not run"),
    ],
)
def test_what_cannot_be_run_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        FewstepScheduler(**options)


def test_steps_out_of_order_are_refused():
    scheduler, x = FewstepScheduler(**SD), pipelines.noise(1, 3, 4, 4)
    with pytest.raises(ValueError, match="run set_timesteps"):
        scheduler.step(x, 999, x)
    with pytest.raises(ValueError, match="at least 1"):
        scheduler.set_timesteps(0)
    scheduler.set_timesteps(2)
    run(scheduler, x)
    with pytest.raises(ValueError, match="the run is over"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="none of the timesteps"):
        scheduler.step(x, 123, x)


def test_importing_fewstep_does_not_import_diffusers(tmp_path):
    import subprocess
    import sys

    code = "import fewstep, fewstep.models, sys; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(tmp_path)).returncode == 0
