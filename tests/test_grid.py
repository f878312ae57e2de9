"""Laws of the grids: their formulas written a second time, their ends, and what is refused."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fewstep.grid import (
    GRIDS,
    check_grid,
    discrete,
    karras,
    log_snr,
    make_grid,
    time_uniform,
    trailing,
)
from fewstep.schedule import EDM, VP, Flow

LATENT = VP.scaled_linear()


@pytest.mark.parametrize("name", GRIDS)
@given(points=st.integers(2, 40), cut=st.floats(0, 0.3))
def test_every_grid_strictly_falls_between_its_exact_ends(name, points, cut):
    ratio = LATENT.sigma_max / LATENT.sigma_min
    high, low = LATENT.sigma_max / ratio**cut, LATENT.sigma_min * ratio ** (cut / 3)
    sigmas = make_grid(name, points, high, low, LATENT)
    assert len(sigmas) == points
    assert (sigmas[0], sigmas[-1]) == (high, low)
    assert all(a > b for a, b in pairwise(sigmas))
    assert all(type(sigma) is float for sigma in sigmas)


@pytest.mark.parametrize("points", [2, 5, 18])
@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_karras_is_uniform_in_a_root_of_sigma(points, rho):
    roots = np.linspace(80 ** (1 / rho), 0.002 ** (1 / rho), points)
    np.testing.assert_allclose(karras(points, 80.0, 0.002, rho), roots**rho, rtol=1e-11)


@pytest.mark.parametrize("ours, theirs", [(karras, "karras"), (log_snr, "exponential")])
def test_grids_equal_those_of_diffusers(ours, theirs):
    from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_schedule=theirs)
    scheduler.set_timesteps(11)
    # they end at 0, and keep sigmas in float32
    np.testing.assert_allclose(ours(11, 80.0, 0.002), scheduler.sigmas[:-1].numpy(), rtol=2e-5)


def test_log_snr_is_geometric():
    np.testing.assert_allclose(log_snr(9, 80.0, 0.002), np.geomspace(80, 0.002, 9), rtol=1e-12)


@pytest.mark.parametrize("ends", [(80.0, 0.002, 1e-3), (14.6, 0.0292, 1e-3), (10.0, 0.5, 0.3)])
def test_time_uniform_is_a_linear_vp_process(ends):
    high, low, end_time = ends
    times = np.linspace(1, end_time, 7)
    # the two ends, as two linear equations in beta_d and beta_min
    matrix = np.array([[0.5, 1.0], [end_time**2 / 2, end_time]])
    beta_d, beta_min = np.linalg.solve(matrix, np.log1p(np.square([high, low])))
    expected = np.sqrt(np.expm1(beta_d * times**2 / 2 + beta_min * times))
    np.testing.assert_allclose(time_uniform(7, high, low, end_time), expected, rtol=1e-9)


@example(high=10.0, ratio=2.03, end_time=0.4)  # rises to a maximum between the ends
@given(high=st.floats(0.1, 200), ratio=st.floats(1.01, 1e4), end_time=st.floats(1e-4, 0.5))
def test_time_uniform_is_refused_only_where_its_curve_does_not_rise(high, ratio, end_time):
    low = high / ratio
    matrix = np.array([[0.5, 1.0], [end_time**2 / 2, end_time]])
    beta_d, beta_min = np.linalg.solve(matrix, np.log1p(np.square([high, low])))
    slopes = beta_d * np.array([1.0, end_time]) + beta_min
    if min(slopes) > 1e-6:
        assert len(time_uniform(6, high, low, end_time)) == 6
    elif min(slopes) < -1e-6:
        with pytest.raises(ValueError, match="end_time above"):
            time_uniform(6, high, low, end_time)


def test_the_end_time_that_the_error_names_is_the_least():
    with pytest.raises(ValueError, match=r"end_time above 0\.0128,"):
        time_uniform(6, 80.0, 0.5)
    assert len(time_uniform(6, 80.0, 0.5, end_time=0.0129)) == 6


@pytest.mark.parametrize("points", [2, 6, 100])
def test_discrete_is_uniform_in_the_models_time(points):
    sigmas = discrete(points, LATENT)
    np.testing.assert_allclose(
        [LATENT.t(sigma) for sigma in sigmas], np.linspace(999, 0, points), atol=1e-8
    )
    sigmas = discrete(points, Flow(), sigma_max=9.0, sigma_min=0.25)  # t from 0.9 to 0.2
    times = np.linspace(0.9, 0.2, points)
    np.testing.assert_allclose(sigmas, times / (1 - times), rtol=1e-12)


def test_trailing_has_the_timesteps_of_diffusers():
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing")
    for nfe in (1, 4, 10, 50):
        scheduler.set_timesteps(nfe)
        times = [LATENT.t(sigma) for sigma in trailing(nfe + 1, LATENT)]
        np.testing.assert_allclose(times[:-1], scheduler.timesteps.numpy(), atol=1e-8)
        assert times[-1] == 0


def test_trailing_on_the_whole_table_is_its_published_formula():
    points = 7
    expected = [1000 * (1 - i / (points - 1)) - 1 for i in range(points - 1)]
    times = [LATENT.t(sigma) for sigma in trailing(points, LATENT)]
    np.testing.assert_allclose(times, [*expected, 0], atol=1e-8)


def test_trailing_on_a_part_is_trailing_on_the_table_of_that_part():
    part = VP(LATENT.sigmas[40:641])  # 601 entries with a time of their own
    np.testing.assert_allclose(
        trailing(7, LATENT, LATENT.sigmas[640], LATENT.sigmas[40]), trailing(7, part), rtol=1e-10
    )


def test_trailing_in_a_flow_reaches_for_time_zero():
    schedule = Flow()
    times = [schedule.t(sigma) for sigma in trailing(5, schedule)]
    expected = schedule.t_max * np.array([1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(times, [*expected, schedule.t_min], rtol=1e-9)


def test_trailing_needs_an_entry_for_every_interval():
    table = VP.linear(count=10)
    assert len(trailing(10, table)) == 10
    with pytest.raises(ValueError, match="points=11"):
        trailing(11, table)


def test_make_grid_hands_on_what_it_is_given():
    ends = 10.0, 0.05
    assert make_grid("karras", 5, *ends) == karras(5, *ends)
    assert make_grid("log-snr", 5, *ends) == log_snr(5, *ends)
    assert make_grid("time-uniform", 5, *ends) == time_uniform(5, *ends)
    assert make_grid("discrete", 5, *ends, LATENT) == discrete(5, LATENT, *ends)
    assert make_grid("trailing", 5, *ends, LATENT) == trailing(5, LATENT, *ends)


@pytest.mark.parametrize(
    "wrong, near", [("karas", "karras"), ("time_uniform", "time-uniform"), ("?", "karras or log")]
)
def test_an_unknown_grid_names_its_neighbours(wrong, near):
    with pytest.raises(ValueError, match=f"did you mean {near}"):
        make_grid(wrong, 5, 80.0, 0.002)


@pytest.mark.parametrize("name", ["discrete", "trailing"])
@pytest.mark.parametrize("schedule", [None, EDM()])
def test_grids_in_the_models_time_need_one(name, schedule):
    with pytest.raises(ValueError, match=f"the {name} grid .* own time"):
        make_grid(name, 5, 80.0, 0.002, schedule)


@pytest.mark.parametrize("grid", [discrete, trailing])
@pytest.mark.parametrize("ends", [(80.0, 0.1), (10.0, 0.002)])
def test_grids_in_the_models_time_stay_in_its_range(grid, ends):
    with pytest.raises(ValueError, match="within the schedule's"):
        grid(5, LATENT, *ends)


@pytest.mark.parametrize("grid", [discrete, trailing])
def test_ends_may_come_from_float32(grid):
    # a float32 step outwards from each end
    high, low = LATENT.sigma_max * (1 + 2**-23), LATENT.sigma_min * (1 - 2**-23)
    assert grid(5, LATENT, high, low)[::4] == (high, low)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(
    "arguments, rule",
    [
        ((1, 10.0, 0.1), "points must be at least 2, got 1"),
        ((5, 0.1, 10.0), "sigma_min < sigma_max, got 10.0 and 0.1"),
        ((5, 10.0, 0.0), "0 < sigma_min"),
        ((5, math.inf, 0.1), "0 < sigma_min"),
        ((5, math.nan, 0.1), "0 < sigma_min"),
    ],
)
def test_impossible_ranges_are_refused(name, arguments, rule):
    with pytest.raises(ValueError, match=rule):
        make_grid(name, *arguments, schedule=LATENT)


def test_rho_and_end_time_are_checked():
    with pytest.raises(ValueError, match="rho must be > 0, got 0"):
        karras(5, 80.0, 0.002, rho=0)
    with pytest.raises(ValueError, match="end_time must lie"):
        time_uniform(5, 80.0, 0.002, end_time=1.0)


def test_a_good_grid_comes_back_as_floats():
    assert check_grid(np.array([3, 2, 0])) == (3.0, 2.0, 0.0)
    assert all(type(sigma) is float for sigma in check_grid([3, 2, 1]))


@pytest.mark.parametrize(
    "sigmas, rule",
    [
        ([], "at least 2 points, got 0"),
        ([1.0], "at least 2 points, got 1"),
        ([3, 2, 2, 5], r"sigmas\[1\] = 2.0 and sigmas\[2\] = 2.0"),
        ([1, 3], r"sigmas\[0\] = 1.0 and sigmas\[1\] = 3.0"),
        ([1, 0, 0], r"sigmas\[1\] = 0.0 and sigmas\[2\] = 0.0"),
        ([1, -1], r"sigmas\[1\] = -1"),
        ([math.inf, 1], r"sigmas\[0\] = inf"),
        ([3, math.nan, 1], r"sigmas\[1\] = nan"),
    ],
)
def test_a_bad_grid_is_named_where_it_breaks(sigmas, rule):
    with pytest.raises(ValueError, match=rule):
        check_grid(sigmas)
