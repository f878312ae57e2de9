"""What diffusers expects of every scheduler, checked on FewstepScheduler in all its configurations.

The list of behaviours is that of diffusers' common scheduler tests, written anew; those themselves
run in test_diffusers_common.py, where there is a checkout of diffusers.
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.integrations.diffusers import FewstepScheduler, FewstepSchedulerOutput
from fewstep.solver import get
from tests.support import pipelines
from tests.support.pipelines import diffusers

INTERVALS = 5
SIGMAS = (14.6, 6.0, 2.0, 0.7, 0.2, 0.05)
SD = pipelines.SD_TABLE
CONFIGS: dict[str, dict[str, Any]] = {
    "ddim": {**SD, "solver": "ddim"},
    "dpmpp-2m": {**SD, "solver": "dpmpp-2m"},
    "unipc-2": {**SD, "solver": "unipc-2", "prediction_type": "v_prediction"},
    "heun": {**SD, "solver": "heun", "grid": "karras", "final": True},
    "dpm-solver-3": {**SD, "solver": "dpm-solver-3", "clip_sample": True},
    "ddim-eta": {**SD, "solver": "ddim-eta:eta=0.7"},
    "sde": {**SD, "solver": "dpmpp-2m-sde", "prediction_type": "sample"},
    "afs": {**SD, "solver": "ipndm-2", "afs": "zero"},
    "plan": {**SD, "plan": json.loads(get("deis-3").plan(SIGMAS).to_json())},
    "flow": {"solver": "dpmpp-2m", "prediction_type": "flow_prediction", "shift": 3.0},
}
TABLES = [name for name in CONFIGS if name != "flow"]
every = pytest.mark.parametrize("name", CONFIGS)


def made(name: str, **changes: Any) -> Any:
    return FewstepScheduler(**{**CONFIGS[name], **changes})


def own(scheduler: FewstepScheduler) -> dict[str, Any]:
    """Its configuration, without what is private."""
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def sample(seed: int = 0) -> Tensor:
    return pipelines.noise(3, 3, 8, 6, seed=seed)


def network(x_t: Tensor, t: Any) -> Tensor:
    return torch.tanh(x_t + 0.001 * float(t)) * 0.5


def run(scheduler: FewstepScheduler, x: Tensor, begin: int = 0, end: int | None = None) -> Tensor:
    """Steps `begin` to `end` of a run, in place of a pipeline; its noise is the same for all."""
    for i, t in list(enumerate(scheduler.timesteps))[begin:end]:
        generator = torch.Generator().manual_seed(i)
        out = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, generator=generator, return_dict=False)[0]
    return x


@every
def test_the_attributes_that_pipelines_read_are_there(name):
    scheduler = made(name)
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.order >= 1
    assert scheduler.num_inference_steps is None
    assert isinstance(scheduler.timesteps, Tensor)
    assert isinstance(scheduler.sigmas, Tensor)
    assert len(scheduler) == scheduler.config["num_train_timesteps"] == 1000
    assert scheduler.step_index is scheduler.begin_index is None
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    assert {"timesteps", "sigmas", "device"} <= accepted.keys()
    assert {"generator", "return_dict"} <= inspect.signature(scheduler.step).parameters.keys()
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = scheduler.nonsense


@every
def test_there_are_no_arguments_but_those_that_are_named(name):
    kinds = [p.kind for p in inspect.signature(FewstepScheduler.__init__).parameters.values()]
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert not FewstepScheduler._deprecated_kwargs
    assert all(key in made(name).config for key in CONFIGS[name])


@every
def test_scaling_an_input_keeps_its_shape_and_changes_nothing(name):
    scheduler, x = made(name), sample()
    assert scheduler.scale_model_input(x, 0.0).shape == x.shape  # before set_timesteps
    scheduler.set_timesteps(INTERVALS)
    t = scheduler.timesteps[0]
    one, two = (scheduler.scale_model_input(x, t) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(x, sample())
    assert scheduler.step_index is None


@every
def test_an_output_is_a_tuple_or_an_object_with_the_same_in_it(name):
    outs: list[Any] = []
    for return_dict in (True, False):
        scheduler, x = made(name), sample()
        scheduler.set_timesteps(INTERVALS)
        t, generator = scheduler.timesteps[0], torch.Generator().manual_seed(0)
        outs.append(scheduler.step(0.1 * x, t, x, generator=generator, return_dict=return_dict))
    assert isinstance(outs[0], FewstepSchedulerOutput)
    assert isinstance(outs[1], tuple)
    for mine, other in zip(outs[0].to_tuple(), outs[1], strict=True):
        assert torch.equal(mine, other)
        assert mine.shape == sample().shape
    assert torch.equal(outs[0].prev_sample, outs[0]["prev_sample"])


@every
def test_the_step_index_counts_network_calls_and_starts_anew(name):
    scheduler, x, ends = made(name), sample(), []
    for _ in range(2):
        scheduler.set_timesteps(INTERVALS)
        assert scheduler.step_index is None
        y = x
        for i, t in enumerate(scheduler.timesteps):
            generator = torch.Generator().manual_seed(i)
            y = scheduler.step(network(y, t), t, y, generator=generator).prev_sample
            assert scheduler.step_index == i + 1
        ends.append(y)
    assert torch.equal(*ends)


@every
def test_timesteps_fall_and_are_as_many_as_the_sigmas_but_one(name):
    scheduler = made(name)
    scheduler.set_timesteps(INTERVALS, device="cpu")
    times, sigmas = scheduler.timesteps.tolist(), scheduler.sigmas.tolist()
    assert len(sigmas) == len(times) + 1
    assert all(0 <= t <= 1000 for t in times)
    assert times[0] == max(times)
    assert sigmas[-1] == min(sigmas)
    assert all(times[scheduler.index_for_timestep(t)] == t for t in times)


@every
def test_saving_and_loading_keeps_the_configuration_and_the_step(name, tmp_path):
    scheduler, x = made(name), sample()
    scheduler.save_config(tmp_path)
    text = (tmp_path / "scheduler_config.json").read_text()
    assert json.loads(text)["_class_name"] == "FewstepScheduler"
    again: Any = FewstepScheduler.from_pretrained(tmp_path)
    assert json.loads(json.dumps(own(again))) == json.loads(json.dumps(own(scheduler)))
    for one in (scheduler, again):
        one.set_timesteps(INTERVALS)
    assert torch.equal(run(scheduler, x), run(again, x))
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "scheduler_config.json").read_text() == text


def compatibles() -> list[Any]:
    """Those that can be made here: some want a package that may be missing."""
    found = FewstepScheduler().compatibles
    return [kind for kind in found if issubclass(kind, diffusers.SchedulerMixin)]


@pytest.mark.parametrize("name", ["unipc-2", "afs", "plan"])
def test_a_journey_through_any_compatible_scheduler_brings_it_back(name):
    scheduler = made(name)
    assert len(compatibles()) > 10
    for kind in compatibles():
        back = FewstepScheduler.from_config(kind.from_config(scheduler.config).config)
        assert own(back).items() >= own(scheduler).items(), kind.__name__


def test_a_flow_comes_back_from_the_schedulers_of_flows():
    scheduler = made("flow")
    for kind in (
        diffusers.FlowMatchEulerDiscreteScheduler,
        diffusers.FlowMatchHeunDiscreteScheduler,
    ):
        back = FewstepScheduler.from_config(kind.from_config(scheduler.config).config)
        assert own(back).items() >= own(scheduler).items()


def test_a_configuration_of_another_scheduler_comes_without_a_warning():
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("diffusers.configuration_utils")
    logger.addHandler(handler)
    try:
        for kind in compatibles():
            if kind is diffusers.EDMEulerScheduler:  # of another process
                continue
            twice = FewstepScheduler.from_config(FewstepScheduler.from_config(kind().config).config)
            assert twice.config["solver"] == "dpmpp-2m"
        assert heard == []
        FewstepScheduler.from_config({**SD, "colour": "red"})
        assert "colour" in heard[0]
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("betas", [[0.1, 0.3], np.array([0.1, 0.3])], ids=["list", "array"])
@pytest.mark.parametrize("name", TABLES)
def test_betas_of_the_users_own_are_kept(name, betas, tmp_path):
    """Two of them: no grid of eight intervals has room there, and nothing asks for one yet."""
    if name == "plan":  # which starts at Stable Diffusion's last level
        with pytest.raises(ValueError, match=r"the pipeline's noise ends at 0\.766"):
            made(name, trained_betas=betas)
        return
    scheduler = made(name, trained_betas=betas)
    torch.testing.assert_close(scheduler.betas, torch.tensor([0.1, 0.3]))
    scheduler.save_pretrained(tmp_path)
    again: Any = FewstepScheduler.from_pretrained(tmp_path)
    assert again.betas.tolist() == torch.tensor([0.1, 0.3]).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", TABLES)
def test_noise_is_added_in_shape_type_and_amount(name, dtype):
    scheduler = made(name)
    scheduler.set_timesteps(INTERVALS)
    x, z = sample().to(dtype), sample(1).to(dtype)
    for t in (scheduler.timesteps[2][None], torch.tensor([3, 500, 999]), torch.tensor(40)):
        noisy = scheduler.add_noise(x, z, t)
        assert (noisy.shape, noisy.dtype, noisy.device) == (x.shape, dtype, x.device)
    t = torch.tensor([3, 401, 777])  # of the table and, being none of the run's, diffusers' formula
    other = diffusers.DDPMScheduler(**SD).add_noise(x.float(), z.float(), t)
    off = scheduler.add_noise(x, z, t).float() - other
    assert off.abs().max() < {torch.float32: 1e-5, torch.float16: 4e-3}.get(dtype, 3e-2)


@every
def test_a_value_of_the_configuration_is_found_but_warned_of(name):
    scheduler = made(name)
    with pytest.warns(FutureWarning, match="num_train_timesteps"):
        assert scheduler.num_train_timesteps == 1000
    scheduler.mine = 5
    assert scheduler.mine == 5


def pickled(scheduler: FewstepScheduler) -> FewstepScheduler:
    return pickle.loads(pickle.dumps(scheduler))


def saved(scheduler: FewstepScheduler) -> FewstepScheduler:
    """By way of torch.save, as a checkpoint of a whole pipeline would."""
    file = io.BytesIO()
    torch.save(scheduler, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, pickled, saved])
@every
def test_a_copy_in_the_middle_of_a_run_shares_nothing_and_goes_on(name, way):
    """After an odd number of calls: solvers with stages are inside an interval."""
    x, whole = sample(), made(name)
    whole.set_timesteps(INTERVALS)
    expected = run(whole, x)
    scheduler = made(name)
    scheduler.set_timesteps(INTERVALS)
    middle = run(scheduler, x, end=3)
    other = way(scheduler)
    assert torch.equal(run(other, middle, begin=3), expected)
    assert scheduler.step_index == 3  # the copy's steps are its own
    assert torch.equal(run(scheduler, middle, begin=3), expected)
    other.set_timesteps(INTERVALS)
    assert torch.equal(run(other, x), expected)


def test_a_pipeline_is_copied_with_its_scheduler():
    pipe = pipelines.sd()
    pipe.scheduler = FewstepScheduler.from_config(pipe.scheduler.config, solver="heun")
    pipe.set_progress_bar_config(disable=True)
    z = pipelines.noise(1, 4, 8, 8)
    settings = {"num_inference_steps": 3, "latents": z, "output_type": "latent"}
    one, two = (p("a cat", **settings).images for p in (pipe, copy.deepcopy(pipe)))
    assert torch.equal(one, two)


def test_what_is_saved_is_plain_text(tmp_path):
    made("plan").save_pretrained(tmp_path)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["scheduler_config.json"]
    read = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert read["plan"]["sigmas"] == list(SIGMAS)
