"""Laws of the schedules: definitions, inverse pairs, published tables, tensors as floats."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.schedule import EDM, VP, Flow

SCHEDULES = {
    "linear": VP.linear(),
    "scaled-linear": VP.scaled_linear(),
    "cosine": VP.cosine(),
    "short": VP.from_betas([0.1, 0.4, 0.2]),
    "edm": EDM(),
    "flow": Flow(),
}
TABLES = [name for name in SCHEDULES if name not in ("edm", "flow")]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_table = pytest.mark.parametrize("name", TABLES)

# Betas as the papers write them: DDPM, Stable Diffusion, and improved DDPM's cosine
COSINE = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
BETAS = {
    "linear": np.linspace(1e-4, 0.02, 1000),
    "scaled-linear": np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
    "cosine": np.minimum(1 - COSINE[1:] / COSINE[:-1], 0.999),
    "short": np.array([0.1, 0.4, 0.2]),
}


@every_schedule
@given(u=st.floats(0, 1))
def test_t_and_sigma_are_an_inverse_pair(schedule, u):
    t = schedule.t_min + u * (schedule.t_max - schedule.t_min)
    assert schedule.t(schedule.sigma(t)) == pytest.approx(t, rel=1e-9, abs=1e-9)
    sigma = schedule.sigma_min ** (1 - u) * schedule.sigma_max**u
    assert schedule.sigma(schedule.t(sigma)) == pytest.approx(sigma, rel=1e-9)


@every_schedule
@given(u=st.floats(0, 1), v=st.floats(0, 1))
def test_sigma_rises_with_t(schedule, u, v):
    low, high = sorted(schedule.t_min + w * (schedule.t_max - schedule.t_min) for w in (u, v))
    if high - low > 1e-6:
        assert schedule.sigma(low) < schedule.sigma(high)


@every_schedule
def test_ends_belong_together(schedule):
    assert schedule.sigma(schedule.t_min) == pytest.approx(schedule.sigma_min, rel=1e-12)
    assert schedule.sigma(schedule.t_max) == pytest.approx(schedule.sigma_max, rel=1e-9)
    assert schedule.t_clean < schedule.t_min < schedule.t_max


@every_table
def test_tables_equal_a_cumulative_product(name):
    abar = np.cumprod(1 - BETAS[name])
    schedule = SCHEDULES[name]
    # 1/abar - 1 loses 4 digits at the clean end
    np.testing.assert_allclose(schedule.sigmas, np.sqrt(1 / abar - 1), rtol=1e-11)
    np.testing.assert_allclose(
        [schedule.alpha(sigma) for sigma in schedule.sigmas], np.sqrt(abar), rtol=1e-11
    )


@pytest.mark.parametrize(
    "name, theirs",
    [
        ("linear", {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}),
        (
            "scaled-linear",
            {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        ),
        ("cosine", {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_tables_equal_those_of_diffusers(name, theirs):
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    abar = DDPMScheduler(num_train_timesteps=1000, **theirs).alphas_cumprod.double().numpy()
    ours = 1 / (1 + np.square(SCHEDULES[name].sigmas))
    np.testing.assert_allclose(ours, abar, rtol=1e-4, atol=0)  # they multiply in float32
    np.testing.assert_allclose(ours, abar, rtol=0, atol=2e-6)


@every_table
def test_entries_are_met_exactly(name):
    schedule = SCHEDULES[name]
    for t, sigma in enumerate(schedule.sigmas):
        assert schedule.sigma(float(t)) == sigma
        assert schedule.t(sigma) == t


@every_table
@given(data=st.data())
def test_log_sigma_is_linear_between_entries(name, data):
    schedule = SCHEDULES[name]
    t = data.draw(st.floats(0, len(BETAS[name]) - 1))
    logs = 0.5 * np.log(1 / np.cumprod(1 - BETAS[name]) - 1)
    expected = np.interp(t, np.arange(len(logs)), logs)
    assert math.log(schedule.sigma(t)) == pytest.approx(expected, abs=1e-10)


@every_table
def test_tables_hold_at_their_ends(name):
    schedule = SCHEDULES[name]
    assert schedule.sigma(-3.0) == schedule.sigma_min
    assert schedule.sigma(schedule.t_max + 5) == schedule.sigma_max
    assert schedule.t(schedule.sigma_min / 2) == 0
    assert schedule.t(schedule.sigma_max * 2) == schedule.t_max
    assert schedule.alpha(1e6) == pytest.approx(1e-6)  # alpha is not held


@given(t=st.floats(0, 1 - 1e-5))
def test_flow_is_the_line_from_data_to_noise(t):
    sigma = Flow().sigma(t)
    assert Flow().alpha(sigma) == pytest.approx(1 - t, rel=1e-9)  # x_t = (1 - t) x_0 + t eps
    assert Flow().alpha(sigma) * sigma == pytest.approx(t, rel=1e-12)


def test_flow_stays_finite_at_pure_noise():
    schedule = Flow()
    assert schedule.sigma(1.0) == schedule.sigma_max == pytest.approx(1e5, rel=1e-4)
    assert schedule.t(math.inf) == pytest.approx(schedule.t_max, rel=1e-12)
    assert schedule.sigma(0.0) == schedule.t(0.0) == 0


def test_edm_is_the_identity():
    assert EDM().sigma(3.5) == EDM().t(3.5) == 3.5
    assert EDM().alpha(3.5) == 1
    assert EDM().alpha(torch.rand(2, 3)).tolist() == [[1, 1, 1], [1, 1, 1]]
    assert not EDM().own_time


@every_schedule
@pytest.mark.parametrize("method", ["sigma", "t", "alpha"])
def test_tensors_are_read_as_floats_are(schedule, method):
    call = getattr(schedule, method)
    high = schedule.t_max if method == "sigma" else schedule.sigma_max
    values = torch.linspace(0, high * 1.01, 24, dtype=torch.float64).reshape(6, 4).T  # strided
    expected = [[call(value) for value in row] for row in values.tolist()]
    assert call(values).tolist() == expected
    for dtype in (torch.float32, torch.bfloat16):
        cast = values.to(dtype)
        assert torch.equal(call(cast), call(cast.double()).to(dtype))
    assert isinstance(call(high), float)
    assert call(torch.tensor(high)).shape == ()


def test_an_integer_tensor_gives_floats():
    schedule = SCHEDULES["linear"]
    got = schedule.sigma(torch.tensor([0, 7, 999]))
    expected = [schedule.sigmas[t] for t in (0, 7, 999)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32))


@every_schedule
@pytest.mark.parametrize("method", ["sigma", "t", "alpha"])
def test_no_map_waits_for_the_device(schedule, method):
    values = torch.empty(5, device="meta")  # which has no numbers: whoever looks at one raises
    got = getattr(schedule, method)(values)
    assert got.device == values.device
    assert got.shape == values.shape


@pytest.mark.parametrize("name", ["linear", "cosine", "flow"])
def test_maps_have_gradients(name):
    schedule = copy.deepcopy(SCHEDULES[name])
    t = (schedule.t_min + torch.tensor([0.2, 0.5, 0.7]) * schedule.t_max).double()
    with torch.inference_mode():
        schedule.sigma(t)  # what is kept from here must not spoil later gradients
    assert torch.autograd.gradcheck(schedule.sigma, t.requires_grad_())
    sigma = schedule.sigma(t.detach()).requires_grad_()
    assert torch.autograd.gradcheck(schedule.t, sigma)
    assert torch.autograd.gradcheck(schedule.alpha, sigma)


def test_abar_and_betas_give_one_table():
    betas = torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)
    abar = torch.cumprod(1 - betas, 0)
    np.testing.assert_allclose(
        VP.from_abar(abar).sigmas, VP.from_betas(betas.tolist()).sigmas, rtol=1e-11
    )


@pytest.mark.parametrize(
    "build, last", [(VP.from_betas, [0.1, 0.2, 1.0]), (VP.from_abar, [0.9, 0.72, 0.0])]
)
def test_zero_terminal_snr_is_refused_or_replaced(build, last):
    with pytest.raises(ValueError, match="terminal_sigma=4096"):
        build(last)
    schedule = build(last, terminal_sigma=4096.0)
    assert schedule.sigmas == (*build(last[:2]).sigmas, 4096.0)
    assert schedule.t(4096.0) == 2


@pytest.mark.parametrize(
    "build",
    [
        lambda: VP(()),
        lambda: VP((1.0,)),
        lambda: VP((1.0, 1.0)),
        lambda: VP((0.0, 1.0)),
        lambda: VP((1.0, math.nan, 2.0)),
        lambda: VP.from_betas([0.1, -0.2]),
        lambda: VP.from_betas([0.1, 1.0, 0.1], terminal_sigma=10.0),
        lambda: VP.from_betas([0.1, 1.0], terminal_sigma=0.1),
        lambda: VP.from_abar([0.5, 0.7]),
        lambda: EDM(sigma_min=0.0),
        lambda: EDM(sigma_min=2.0, sigma_max=1.0),
        lambda: Flow(t_max=1.0),
        lambda: Flow(t_min=0.0),
    ],
)
def test_impossible_schedules_are_refused(build):
    with pytest.raises(ValueError, match=r"got|terminal"):
        build()


def test_a_table_is_a_value():
    schedule = SCHEDULES["scaled-linear"]
    schedule.sigma(torch.rand(3))
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule == VP.scaled_linear() != VP.linear()
    assert hash(again) == hash(schedule)
    assert len(repr(schedule)) < 80
