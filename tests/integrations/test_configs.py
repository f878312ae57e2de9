"""What another scheduler's configuration says is honoured, or refused by its name."""

from __future__ import annotations

import inspect
import json
from typing import Any

import numpy as np
import pytest

from fewstep.integrations.configs import OTHER_PREDICTIONS, REFUSED, REPLACED, SPACINGS
from fewstep.integrations.diffusers import KNOWN, FewstepScheduler
from fewstep.models.process import FLOWS
from fewstep.solver import get
from tests.support import pipelines

diffusers: Any = pipelines.diffusers
SD = pipelines.SD_TABLE
OWN = inspect.signature(FewstepScheduler.__init__).parameters.keys() - {"self"}
SET: dict[str, Any] = {  # values that would change a picture
    "shift_terminal": 0.1,
    "invert_sigmas": True,
    "stochastic_sampling": True,
    "timestep_type": "continuous",
    "interpolation_type": "log_linear",
    "lambda_min_clipped": -5.1,
    "sigma_min": 0.03,
    "sigma_max": 10.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "rho": 7.0,
    "snr_shift_scale": 3.0,
    "scale_factors": [0.5, 1.0],
}


def from_config(config: Any, **given: Any) -> Any:
    return FewstepScheduler.from_config(config, **given)


def made(**given: Any) -> Any:
    return FewstepScheduler(**SD, **given)


@pytest.mark.parametrize("flag", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 5, 12])
@pytest.mark.parametrize("by", ["config", "argument", "constructor"])
def test_levels_by_a_flag_are_those_of_diffusers(flag: str, steps: int, by: str) -> None:
    if flag == "use_beta_sigmas":
        pytest.importorskip("scipy")
    theirs: Any = diffusers.DPMSolverMultistepScheduler(**SD, **{flag: True})
    theirs.set_timesteps(steps)
    ours = {
        "config": lambda: from_config(theirs.config),
        "argument": lambda: from_config(diffusers.DDIMScheduler(**SD).config, **{flag: True}),
        "constructor": lambda: made(**{flag: True}),
    }[by]()
    ours.set_timesteps(steps)
    np.testing.assert_allclose(ours.sigmas, theirs.sigmas, rtol=2e-5, atol=1e-7)
    assert ours.timesteps.tolist() == pytest.approx(
        theirs.timesteps.tolist(), abs=1.01
    )  # whole numbers


@pytest.mark.parametrize("flag", SPACINGS)
def test_what_the_caller_names_goes_before_the_configuration(flag: str) -> None:
    config = diffusers.DPMSolverMultistepScheduler(**SD, **{flag: True}).config
    named = from_config(config, grid="discrete")
    plain = from_config(diffusers.DDIMScheduler(**SD).config, grid="discrete")
    for scheduler in (named, plain):
        scheduler.set_timesteps(4)
    assert named.sigmas.tolist() == plain.sigmas.tolist()
    for other in ({"grid": "karras"}, {"final": True}, {"end": "sigma_min"}):
        with pytest.raises(ValueError, match=f"{flag} .*leave out"):
            from_config(SD, **{flag: True}, **other)
        with pytest.raises(ValueError, match=f"{flag} .*leave out"):
            made(**{flag: True}, **other)
    with pytest.raises(ValueError, match="not with flows"):
        from_config(diffusers.FlowMatchEulerDiscreteScheduler().config, **{flag: True})


def test_two_flags_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        from_config(SD, use_karras_sigmas=True, use_beta_sigmas=True)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("flow", [False, True])
def test_what_is_not_honoured_is_refused_by_its_name(name: str, flow: bool) -> None:
    kind = diffusers.FlowMatchEulerDiscreteScheduler() if flow else diffusers.DDIMScheduler(**SD)
    with pytest.raises(ValueError, match=f"{name}=.* is not honoured"):
        from_config({**kind.config, name: SET[name]})
    with pytest.raises(ValueError, match=f"{name}=.* is not honoured"):
        from_config(kind.config, **{name: SET[name]})
    from_config({**kind.config, name: REFUSED[name][0]})


@pytest.mark.parametrize("name", REPLACED)
def test_fields_of_the_solver_are_replaced_and_refused_as_arguments(name: str) -> None:
    from_config({**SD, name: 3})
    with pytest.raises(ValueError, match=f"{name} is not honoured"):
        from_config(SD, **{name: 3})


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("sovler", "solver"),
        ("grids", "grid"),
        ("use_karas_sigmas", "use_karras_sigmas"),
        ("prediction_typ", "prediction_type"),
        ("endd", "end"),
        ("beta_sart", "beta_start"),
        ("Plan", "plan"),
    ],
)
def test_a_misspelt_argument_is_an_error_with_the_near_name(typed: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"no argument '{typed}'; did you mean {meant}?"):
        from_config(SD, **{typed: "heun"})


def test_a_name_that_is_near_to_none_is_an_error_with_all_names() -> None:
    with pytest.raises(ValueError, match=r"no argument 'zzz'; it has: afs, .*solver"):
        from_config(SD, zzz=1)


def test_unused_arguments_are_given_back_to_who_asks_for_them() -> None:
    scheduler, unused = FewstepScheduler.from_config(SD, return_unused_kwargs=True, zzz=1)
    assert unused["zzz"] == 1
    assert isinstance(scheduler, FewstepScheduler)


@pytest.mark.parametrize("name", [*KNOWN, *FLOWS])
def test_every_field_of_every_scheduler_has_its_place(name: str) -> None:
    fields = inspect.signature(getattr(diffusers, name).__init__).parameters.keys()
    placed = {*OWN, *REFUSED, *REPLACED, *OTHER_PREDICTIONS, "self", "args", "kwargs"}
    assert fields - placed == set()


@pytest.mark.parametrize(
    "name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CogVideoXDDIMScheduler"]
)
def test_a_process_of_another_kind_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"not honoured|does not run"):
        from_config(getattr(diffusers, name)().config)


@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_where_the_levels_end_is_kept(end: str) -> None:
    config = diffusers.DPMSolverMultistepScheduler(**SD, final_sigmas_type=end).config
    for scheduler in (from_config(config), from_config(SD, final_sigmas_type=end)):
        scheduler.set_timesteps(4)
        assert (scheduler.sigmas[-1] == 0) == (end == "zero")
    named = from_config(config, end="zero")
    named.set_timesteps(4)
    assert named.sigmas[-1] == 0


def test_arguments_of_the_other_kind_of_process_are_refused() -> None:
    flow = diffusers.FlowMatchEulerDiscreteScheduler().config
    with pytest.raises(ValueError, match="shift is of flows"):
        from_config(SD, shift=3.0)
    with pytest.raises(ValueError, match="beta_end is of tables"):
        from_config(flow, beta_end=0.01)
    assert from_config(flow, shift=3.0).config["shift"] == 3
    assert from_config(SD, use_flow_sigmas=True, flow_shift=2.0).config["shift"] == 2


@pytest.mark.parametrize("flag", SPACINGS)
def test_flags_survive_a_journey_and_a_file(flag: str, tmp_path: Any) -> None:
    if flag == "use_beta_sigmas":
        pytest.importorskip("scipy")
    mine = from_config(SD, solver="heun", **{flag: True})
    mine.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())[flag] is True
    back = from_config(diffusers.DPMSolverMultistepScheduler.from_config(mine.config).config)
    for other in (back, FewstepScheduler.from_pretrained(tmp_path)):
        mine.set_timesteps(3)
        other.set_timesteps(3)  # type: ignore[union-attr]
        assert other.timesteps.tolist() == mine.timesteps.tolist()  # type: ignore[union-attr]


def test_auto_is_what_the_cards_of_pipelines_have() -> None:
    for auto in (from_config(SD, solver="auto"), FewstepScheduler(**SD, solver="auto")):
        named = from_config(SD, solver="dpmpp-2m")
        for scheduler in (auto, named):
            scheduler.set_timesteps(4)
        assert auto._full == named._full


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_a_plan_from_above_the_network_s_noise_is_refused(solver: str) -> None:
    plan = get(solver).plan((80.0, 10.0, 1.0, 0.0))
    with pytest.raises(
        ValueError, match=r"starts at sigma 80, and the pipeline's noise ends at 14"
    ):
        from_config(SD, solver=plan)
    with pytest.raises(ValueError, match="solver must be a name here"):
        FewstepScheduler(**SD, solver=plan)  # type: ignore[arg-type]
    scheduler = FewstepScheduler(**SD)
    with pytest.raises(ValueError, match="starts at sigma 20"):
        scheduler.set_timesteps(sigmas=[20.0, 1.0])
    scheduler.set_timesteps(sigmas=[14.615, 1.0])  # as published, of 14.6146


@pytest.mark.parametrize(
    "options",
    [
        {"num_train_timesteps": -1},
        {"num_train_timesteps": True},
        {"beta_schedule": "exponential"},
        {"thresholding": "yes"},
        {"thresholding": 1},
    ],
)
def test_a_setting_of_the_wrong_kind_is_refused_by_its_name(options) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))}[^\n]*$"):
        FewstepScheduler(**options)


@pytest.mark.parametrize("count", [0, -1, 2.5, True, None, "3"])
def test_a_number_of_steps_of_the_wrong_kind_is_refused(count) -> None:
    with pytest.raises(ValueError, match="num_inference_steps must be a whole number"):
        FewstepScheduler().set_timesteps(count)
    with pytest.raises(ValueError, match="config must be a scheduler's configuration"):
        FewstepScheduler.from_config(5)
