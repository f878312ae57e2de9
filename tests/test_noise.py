"""Noise is a pure function of its keys, and the Brownian path of a seed is one path."""

from __future__ import annotations

import hashlib
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from fewstep.noise import brownian, generator, key, normal
from fewstep.solving import solve
from tests.support.testbed import ALL_SOLVERS, Mixture, karras, largest, noise

SHAPE = (3, 4)


def clock(sigma: float) -> float:
    """The path's time: log2(sigma), held inside [-20, 20]."""
    return min(max(math.log2(sigma), -20.0), 20.0) if sigma > 0 else -20.0


def difference(seeds, shape, high: float, low: float) -> torch.Tensor:
    """W(high) - W(low): the increment before it is scaled to unit variance."""
    return math.sqrt(clock(high) - clock(low)) * brownian(seeds, shape, (high, low), torch.float64)


# --- keys ----------------------------------------------------------------------------------------


def test_a_key_is_a_hash_of_its_parts_and_of_nothing_else():
    """Written out: a change of the key would change every picture, and must not go unseen."""
    digest = hashlib.blake2b(b"(7, 'step', 2)", digest_size=8).digest()
    assert key(7, "step", 2) == int.from_bytes(digest, "little") // 2
    parts = [(1,), (2,), ("1",), (1, 2), (2, 1), (12,), (1, "2"), ("a", "b"), ("ab",), (-1,)]
    keys = {key(*part) for part in parts}
    assert len(keys) == len(parts)
    assert all(0 <= value < 2**63 for value in keys)


def test_a_generator_starts_at_its_key():
    ours = torch.randn(5, generator=generator(3, "x"))
    assert torch.equal(ours, torch.randn(5, generator=torch.Generator().manual_seed(key(3, "x"))))


DRAWS = {
    "normal": lambda seeds: normal(seeds, SHAPE, "step", 2),
    "brownian": lambda seeds: brownian(seeds, SHAPE, (3.0, 0.7)),
}


@pytest.mark.parametrize("kind", DRAWS)
@given(seeds=st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
def test_a_picture_s_noise_is_the_same_bits_in_any_batch_and_order(kind, seeds):
    draw = DRAWS[kind]
    together = draw(seeds)
    assert together.shape == (len(seeds), *SHAPE)
    assert torch.equal(together.flip(0), draw(seeds[::-1]))
    for row, seed in zip(together, seeds, strict=True):
        assert torch.equal(row, draw([seed])[0])


@pytest.mark.parametrize("kind", DRAWS)
def test_drawing_leaves_torch_s_own_generator_alone(kind):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = DRAWS[kind]([1, 2])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(DRAWS[kind]([1, 2]), first)


def test_seeds_streams_and_indices_are_independent_of_each_other():
    seeds = [0, 1, 2]
    draws = [
        normal(seeds, (20_000,), stream, index)
        for stream, index in itertools.product(("step", "prior"), (0, 1))
    ]
    rows = torch.cat(draws)  # [12, 20000]
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert largest(correlation) < 5 / math.sqrt(20_000)  # five standard errors
    for row in rows:
        assert kstest(row.numpy(), "norm").pvalue > 1e-4


def test_float64_noise_is_the_float32_noise():
    """So a float64 run can be compared with a float32 one."""
    assert torch.equal(normal([1], SHAPE, "a").double(), normal([1], SHAPE, "a", 0, torch.float64))
    wide, narrow = (brownian([1], SHAPE, (2.0, 1.0), t) for t in (torch.float64, torch.float32))
    torch.testing.assert_close(wide.float(), narrow, rtol=0, atol=0)


# --- the Brownian path ---------------------------------------------------------------------------

LEVELS = st.floats(1e-5, 1e5)


@given(levels=st.lists(LEVELS, min_size=3, max_size=6, unique=True), seed=st.integers(0, 99))
def test_increments_over_neighbouring_intervals_add_up(levels, seed):
    """Nested grids walk one path: increments times the root of their length sum to the whole's."""
    levels = sorted(levels, reverse=True)
    if any(math.log2(a / b) < 1e-9 for a, b in itertools.pairwise(levels)):
        return  # equal to rounding
    whole = difference([seed], SHAPE, levels[0], levels[-1])
    parts = sum(difference([seed], SHAPE, a, b) for a, b in itertools.pairwise(levels))
    assert largest(whole - parts) < 1e-13 * 40  # values of size sqrt(40) on the path


def test_zero_and_levels_out_of_range_are_the_ends_of_the_path():
    for seed in (1, 2):
        to_zero = difference([seed], SHAPE, 1.0, 0.0)
        assert torch.equal(to_zero, difference([seed], SHAPE, 1.0, 2.0**-20))
        assert torch.equal(to_zero, difference([seed], SHAPE, 1.0, 2.0**-30))
        up = difference([seed], SHAPE, 1e9, 1.0)
        assert torch.equal(up, difference([seed], SHAPE, 2.0**20, 1.0))


@pytest.mark.parametrize("interval", [(1.0, 1.0), (1.0, 2.0), (0.0, 0.0)])
def test_an_interval_must_go_from_more_to_less_noise(interval):
    with pytest.raises(ValueError, match="interval must go from more to less noise"):
        brownian([1], SHAPE, interval)


PIXELS = (20_000,)
INTERVALS = [(80.0, 20.0), (20.0, 19.9), (2.5, 0.7), (0.7, 0.699), (0.01, 0.0), (1e5, 3.0)]


@pytest.mark.parametrize("interval", INTERVALS)
def test_an_increment_is_standard_normal(interval):
    for seed in range(3):
        drawn = brownian([seed], PIXELS, interval).flatten()
        # standard errors: 0.007 for the mean, 0.005 for the spread
        assert abs(float(drawn.mean())) < 0.03
        assert abs(float(drawn.std()) - 1) < 0.02
        assert kstest(drawn.numpy(), "norm").pvalue > 1e-4


def test_increments_over_disjoint_intervals_and_of_other_seeds_are_independent():
    levels = [80.0, 31.0, 30.0, 7.0, 1.0, 0.99, 0.3, 0.0]
    rows = torch.cat(
        [brownian([1, 2, 3], PIXELS, interval) for interval in itertools.pairwise(levels)]
    )
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert largest(correlation) < 5 / math.sqrt(PIXELS[0])  # five standard errors


def test_the_covariance_of_overlapping_increments_is_the_length_of_the_overlap():
    one = difference([5], PIXELS, 8.0, 1.0)  # log2: from 3 to 0
    other = difference([5], PIXELS, 2.0, 0.125)  # from 1 to -3
    covariance = float((one * other).mean())
    assert abs(covariance - 1.0) < 5 * math.sqrt((3 * 4 + 1) / PIXELS[0])  # five standard errors


def test_across_a_leaf_of_the_tree_the_path_is_a_line():
    """Leaves are 40 / 2^20 wide, 3.8e-5, and one begins at log2(sigma) = 0."""
    one, two, three = (2.0 ** (k * 1e-5) for k in (1, 2, 3))
    upper = difference([1], SHAPE, three, two)
    lower = difference([1], SHAPE, two, one)
    assert float(upper.abs().min()) > 1e-6
    torch.testing.assert_close(upper, lower, rtol=1e-6, atol=0)


# --- in the solvers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_SOLVERS)
def test_a_picture_does_not_depend_on_its_batch(name):
    """To rounding: the mixture's own sums run over batches of other sizes."""
    seeds = [3, 1, 4, 1_000_003]
    sigmas = karras(7, 20.0, 0.05)
    x = noise(len(seeds), 20.0)
    together = solve(Mixture(), x, name, grid=sigmas, seeds=seeds)
    for i, seed in enumerate(seeds):
        alone = solve(Mixture(), x[i : i + 1], name, grid=sigmas, seeds=[seed])
        assert largest(alone - together[i]) < 1e-12
    order = [2, 0, 3, 1]
    mixed = solve(Mixture(), x[order], name, grid=sigmas, seeds=[seeds[i] for i in order])
    assert largest(mixed - together[order]) < 1e-12


@pytest.mark.parametrize("name", ["ddim-eta", "churn", "dpmpp-2m-sde"])
def test_other_seeds_make_other_pictures(name):
    sigmas = karras(7, 20.0, 0.05)
    x = noise(1, 20.0).expand(3, -1)
    ends = solve(Mixture(), x, name, grid=sigmas, seeds=[1, 2, 1])
    assert largest(ends[0] - ends[1]) > 0.01
    assert torch.equal(ends[0], ends[2])


def test_nested_grids_of_the_sde_solver_converge_path_by_path():
    """Every grid sees increments of one path, so a finer grid comes nearer to the same picture."""
    finest = karras(65, 2.0, 0.1)
    seeds = range(12)
    x = noise(len(seeds), 5.0)
    ends = [
        solve(Mixture(), x, "dpmpp-2m-sde", grid=finest[::every], seeds=seeds)
        for every in (1, 4, 16)  # 64, 16 and 4 intervals
    ]
    near, far = (float((ends[0] - end).square().mean().sqrt()) for end in ends[1:])
    strangers = solve(Mixture(), x, "dpmpp-2m-sde", grid=finest[::4], seeds=range(100, 112))
    apart = float((ends[0] - strangers).square().mean().sqrt())
    assert near < far / 3
    assert near < apart / 10
