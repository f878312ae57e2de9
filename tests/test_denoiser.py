"""Laws of the denoisers: predictions, guidance, thresholding, and what passes through wrappers.

The data are one Gaussian, D = m + v/(v + sigma^2) (x - m), written out here.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.denoiser import Clipped, Counted, Guided, Predicted, Thresholded
from fewstep.schedule import EDM, VP, Flow

SHAPE = (2, 3)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MEAN, VARIANCE = randn(*SHAPE, seed=1), 0.3


def column(sigma):
    return sigma.reshape(-1, 1, 1)


def gaussian(x, sigma):
    return MEAN + VARIANCE / (VARIANCE + column(sigma) ** 2) * (x - MEAN)


def conditional(x, sigma, condition):
    """A denoiser for each condition [b, 2, 3]: the Gaussian with its mean moved there."""
    return condition + gaussian(x - condition, sigma)


class Recorder:
    """A callable that keeps what it is called with."""

    def __init__(self, function):
        self.function = function
        self.calls = []

    def __call__(self, *args):
        self.calls.append(args)
        return self.function(*args)


VP_TABLE = VP.linear()
LOGS = 0.5 * np.log(1 / np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)) - 1)


def vp_levels(t):
    """(alpha_t, sigma^vp_t) at a float index: log(sigma^vp/alpha) linear in t."""
    ratio = np.exp(np.interp(t.numpy(), np.arange(1000), LOGS))
    alpha = torch.from_numpy(1 / np.sqrt(1 + ratio**2))
    return column(alpha), column(torch.from_numpy(ratio)) * column(alpha)


def flow_levels(t):
    return column(1 - t), column(t)


def edm_levels(t):
    return torch.ones_like(column(t)), column(t)


def network(prediction, levels):
    """What an ideal network predicts at (x_t, t)."""

    def net(x_t, t):
        alpha, sigma_t = levels(t)
        x_0 = gaussian(x_t / alpha, (sigma_t / alpha).flatten())
        eps = (x_t - alpha * x_0) / sigma_t
        return {
            "eps": eps,
            "x0": x_0,
            "v": alpha * eps - sigma_t * x_0,
            "flow": eps - x_0,
        }[prediction]

    return net


KINDS = {
    "vp-eps": ("eps", VP_TABLE, vp_levels),
    "vp-x0": ("x0", VP_TABLE, vp_levels),
    "vp-v": ("v", VP_TABLE, vp_levels),
    "flow": ("flow", Flow(), flow_levels),
    "flow-x0": ("x0", Flow(), flow_levels),
    "edm-eps": ("eps", EDM(), edm_levels),
    "edm-x0": ("x0", EDM(), edm_levels),
}


@pytest.mark.parametrize("kind", KINDS)
@given(u=st.lists(st.floats(0, 1), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_every_prediction_gives_the_same_denoiser(kind, u, seed):
    prediction, schedule, levels = KINDS[kind]
    low, high = math.log(schedule.sigma_min), math.log(schedule.sigma_max)
    sigma = torch.exp(low + (high - low) * torch.tensor(u, dtype=torch.float64))
    x = MEAN + column(sigma) * randn(len(u), *SHAPE, seed=seed)
    denoiser = Predicted(network(prediction, levels), schedule, prediction)
    # 1e-16 of x, which is up to 1e5
    torch.testing.assert_close(denoiser(x, sigma), gaussian(x, sigma), rtol=0, atol=1e-10)


def test_the_network_is_told_its_own_time_in_full_precision():
    net = Recorder(lambda x_t, t: torch.zeros_like(x_t))
    sigma = torch.tensor([0.05, 1.234, 150.0])
    x = randn(3, *SHAPE).float()
    denoised = Predicted(net, VP_TABLE, "eps", dtype=torch.bfloat16)(x, sigma)
    x_t, t = net.calls[0]
    assert (x_t.dtype, t.dtype) == (torch.bfloat16, torch.float32)
    expected = np.interp(np.log(sigma.double().numpy()), LOGS, np.arange(1000))
    np.testing.assert_allclose(t.numpy(), expected, rtol=1e-5)
    assert denoised.dtype == torch.float32
    assert torch.equal(denoised, x)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_keeps_its_dtype_whatever_the_networks_is(kind):
    prediction, schedule, _ = KINDS[kind]
    denoiser = Predicted(lambda x_t, t: x_t, schedule, prediction, dtype=torch.float16)
    for dtype in (torch.float32, torch.float64):
        assert denoiser(randn(2, *SHAPE).to(dtype), torch.tensor([0.5, 2.0])).dtype == dtype
        assert denoiser(randn(2, *SHAPE).to(dtype), torch.ones(2).double()).dtype == dtype


def test_time_is_scaled_and_rounded_on_request():
    x, sigma = randn(3, *SHAPE), torch.tensor([1 / 3, 1.0, 3.0], dtype=torch.float64)
    net = Recorder(lambda x_t, t: torch.zeros_like(x_t))
    Predicted(net, Flow(), "flow", time_scale=1000)(x, sigma)
    Predicted(net, Flow(), "flow", time_scale=7, round_time=True)(x, sigma)
    np.testing.assert_allclose(net.calls[0][1].numpy(), [250, 500, 750], rtol=1e-12)
    told = net.calls[1][1]
    assert told.dtype == torch.int64
    assert told.tolist() == [2, 4, 5]  # of 1.75, 3.5, 5.25


@pytest.mark.parametrize(
    "prediction, schedule", [("v", Flow()), ("v", EDM()), ("flow", VP_TABLE), ("flow", EDM())]
)
def test_a_prediction_on_the_wrong_schedule_is_refused(prediction, schedule):
    with pytest.raises(ValueError, match="does not go with"):
        Predicted(gaussian, schedule, prediction)


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="eps, v, x0, flow, got 'noise'"):
        Predicted(gaussian, VP_TABLE, "noise")


SCALES = {"float": 7.5, "one": 1.0, "per-sample": torch.tensor([0.0, 1.0, 4.0])}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("rows", [1, 3])
def test_guidance_in_one_call_equals_two(scale, rows):
    x, sigma = randn(3, *SHAPE), torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    cond, uncond = randn(rows, *SHAPE, seed=2), randn(1, *SHAPE, seed=3)
    inner = Recorder(conditional)
    got = Guided(inner, scale, cond, uncond)(x, sigma)
    assert [len(args[0]) for args in inner.calls] == [6]
    with_, without = (conditional(x, sigma, c.expand(3, *SHAPE)) for c in (cond, uncond))
    w = column(torch.as_tensor(scale).expand(3))
    torch.testing.assert_close(got, without + w * (with_ - without), rtol=0, atol=1e-12)


def test_guidance_keeps_the_state_in_its_dtype():
    x, sigma = randn(3, *SHAPE).float(), torch.tensor([0.1, 1.0, 30.0])
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    inner = lambda x, sigma, condition: conditional(x, sigma, condition).to(x.dtype)  # noqa: E731
    assert Guided(inner, scale, MEAN[None], MEAN[None])(x, sigma).dtype == torch.float32


def test_conditions_may_be_trees():
    def by_tree(x, sigma, condition):
        shift, (scale, bias) = condition["text"], condition["size"]
        return x * column(scale) + shift + column(bias)

    x, sigma, one = randn(3, *SHAPE), torch.ones(3), torch.ones(3).double()
    cond = {"text": randn(3, *SHAPE, seed=2), "size": (2 * one, 3 * one)}
    uncond = {"text": randn(1, *SHAPE, seed=3), "size": (one[:1], 0 * one[:1])}
    got = Guided(by_tree, 2.0, cond, uncond)(x, sigma)
    expected = 2 * (2 * x + cond["text"] + 3) - (x + uncond["text"])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_conditions_that_do_not_match_are_refused():
    x, sigma = randn(3, *SHAPE), torch.ones(3)
    with pytest.raises(ValueError, match="one for each of 3 samples, got 2"):
        Guided(conditional, 2.0, x[:2], x)(x, sigma)
    with pytest.raises(ValueError, match="keys"):
        Guided(conditional, 2.0, {"a": x}, {"b": x})(x, sigma)
    with pytest.raises(ValueError, match="cond has 2 parts, uncond 1"):
        Guided(conditional, 2.0, (x, x), (x,))(x, sigma)


def test_far_mean_is_guided_as_denoised_is():
    cond, uncond = randn(3, *SHAPE, seed=2), randn(3, *SHAPE, seed=3)
    scale = torch.tensor([1.0, 3.0, 7.5], dtype=torch.float64)
    far_means = MEAN + cond, MEAN + uncond
    guided = Guided(conditional, scale, cond, uncond, far_means)
    far = guided(randn(3, *SHAPE), torch.full((3,), 1e7, dtype=torch.float64))
    torch.testing.assert_close(guided.far_mean, far, rtol=0, atol=1e-10)
    assert Guided(conditional, scale, cond, uncond).far_mean is None


def naive_threshold(denoised, quantile, limit):
    out = []
    for sample in denoised.numpy():
        s = max(np.quantile(np.abs(sample), quantile), limit)
        out.append(np.clip(sample, -s, s) * limit / s)
    return np.stack(out)


@given(
    quantile=st.floats(0.01, 1),
    limit=st.floats(0.1, 3),
    shape=st.sampled_from([(1,), (2,), (7,), (2, 3), (3, 8, 8)]),
    scale=st.floats(0.1, 10),
)
def test_thresholding_is_imagens_formula_per_sample(quantile, limit, shape, scale):
    x = scale * randn(4, *shape)
    got = Thresholded(lambda x, sigma: x, quantile, limit)(x, torch.ones(4))
    np.testing.assert_allclose(got.numpy(), naive_threshold(x, quantile, limit), atol=1e-12)
    assert got.abs().max() <= limit * (1 + 1e-12)


def test_thresholding_leaves_samples_within_the_limit_alone():
    x = torch.stack([randn(3, 8, 8).clamp(-1, 1), 5 * randn(3, 8, 8, seed=1)])
    got = Thresholded(lambda x, sigma: x)(x, torch.ones(2))
    assert torch.equal(got[0], x[0])
    assert not torch.equal(got[1], x[1].clamp(-1, 1))
    np.testing.assert_allclose(got.numpy(), naive_threshold(x, 0.995, 1.0), atol=1e-12)


def test_clipping_clips():
    x = 3 * randn(4, *SHAPE)
    assert torch.equal(Clipped(gaussian)(x, torch.ones(4)), gaussian(x, torch.ones(4)).clamp(-1, 1))
    got = Clipped(lambda x, sigma: x, 0.0, 0.5)(x, torch.ones(4))
    assert (got.min(), got.max()) == (0, 0.5)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Thresholded(gaussian, quantile=0.0),
        lambda: Thresholded(gaussian, quantile=1.5),
        lambda: Thresholded(gaussian, limit=0.0),
        lambda: Clipped(gaussian, 1.0, -1.0),
    ],
)
def test_impossible_limits_are_refused(build):
    with pytest.raises(ValueError, match="must"):
        build()


class Full:
    """A denoiser with every optional attribute; D and the mean reach far beyond 1."""

    sigma_min, sigma_max = 0.1, 7.0
    schedule = EDM(0.1, 7.0)
    far_mean = 5 * MEAN[None]
    calls_per_eval = 3

    def __call__(self, x, sigma, *condition):
        return 5 * gaussian(x, sigma) + sum(condition)

    def with_features(self, x, sigma, *condition):
        return self(x, sigma, *condition), {"mean": x.mean((1, 2)), "all": (x,)}


# (wrapper of a denoiser, what it does to D)
WRAPPERS = {
    "thresholded": (Thresholded, lambda d: torch.from_numpy(naive_threshold(d, 0.995, 1.0))),
    "clipped": (Clipped, lambda d: d.clamp(-1, 1)),
    "counted": (Counted, lambda d: d),
    "guided": (lambda d: Guided(d, 2.0, MEAN[None], 0 * MEAN[None]), lambda d: d + 2 * MEAN),
    "all": (
        lambda d: Counted(Clipped(Thresholded(Guided(d, 2.0, MEAN[None], 0 * MEAN[None])))),
        lambda d: torch.from_numpy(naive_threshold(d + 2 * MEAN, 0.995, 1.0)),
    ),
}
every_wrapper = pytest.mark.parametrize("name", WRAPPERS)


@every_wrapper
def test_wrappers_hand_on_what_the_inner_denoiser_has(name):
    wrap, change = WRAPPERS[name]
    inner, wrapped = Full(), wrap(Full())
    assert (wrapped.sigma_min, wrapped.sigma_max) == (0.1, 7.0)
    assert wrapped.schedule is Full.schedule
    guided = name in ("guided", "all")
    assert wrapped.calls_per_eval == (6 if guided else 3)
    x, sigma = randn(3, *SHAPE), torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)
    expected = change(inner(x, sigma))
    torch.testing.assert_close(wrapped(x, sigma), expected, rtol=0, atol=1e-12)
    denoised, features = wrapped.with_features(x, sigma)
    assert torch.equal(denoised, wrapped(x, sigma))
    # those of the conditional half: as many rows as samples
    assert torch.equal(features["mean"], x.mean((1, 2)))
    assert torch.equal(features["all"][0], x)
    # guidance does not know how the inner mean depends on the condition, unless it is told
    mean = inner.far_mean - (2 * MEAN if guided else 0)
    torch.testing.assert_close(wrapped.far_mean, change(mean), rtol=0, atol=1e-12)


@every_wrapper
def test_wrappers_lack_what_the_inner_denoiser_lacks(name):
    wrapped = WRAPPERS[name][0](lambda x, sigma, *condition: x)
    for attribute in ("sigma_min", "sigma_max", "schedule", "with_features"):
        assert not hasattr(wrapped, attribute)
    assert getattr(wrapped, "far_mean", None) is None
    with pytest.raises(AttributeError, match="no attribute 'depth'"):
        _ = wrapped.depth


def test_features_of_the_conditional_half_see_the_condition():
    class Inner:
        def __call__(self, x, sigma, condition):
            return x

        def with_features(self, x, sigma, condition):
            return x, condition

    x, cond = randn(3, *SHAPE), randn(3, *SHAPE, seed=2)
    features = Guided(Inner(), 2.0, cond, 0 * cond).with_features(x, torch.ones(3))[1]
    assert torch.equal(features, cond)


def test_a_predicted_denoiser_has_its_networks_features_and_its_schedules_range():
    class Net:
        def __call__(self, x_t, t):
            return network("eps", vp_levels)(x_t, t)

        def with_features(self, x_t, t):
            return self(x_t, t), t

    x, sigma = randn(2, *SHAPE), torch.tensor([0.5, 20.0], dtype=torch.float64)
    denoiser = Predicted(Net(), VP_TABLE, "eps", far_mean=MEAN[None])
    denoised, t = denoiser.with_features(x, sigma)
    assert torch.equal(denoised, denoiser(x, sigma))
    assert torch.equal(t, VP_TABLE.t(sigma))
    assert (denoiser.sigma_min, denoiser.sigma_max) == (VP_TABLE.sigma_min, VP_TABLE.sigma_max)
    assert torch.equal(Counted(denoiser).far_mean, MEAN[None])
    plain = Predicted(network("eps", vp_levels), VP_TABLE, "eps")
    assert not hasattr(plain, "with_features")
    assert Thresholded(plain).far_mean is None


def test_a_conditional_network_is_predicted_and_then_guided():
    def net(x_t, t, condition):
        alpha, sigma_t = vp_levels(t)
        x, sigma = x_t / alpha, (sigma_t / alpha).flatten()
        return (x - conditional(x, sigma, condition)) / column(sigma)

    x, sigma = randn(3, *SHAPE), torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    cond, uncond = randn(3, *SHAPE, seed=2), randn(3, *SHAPE, seed=3)
    predicted = Guided(Predicted(net, VP_TABLE, "eps"), 4.0, cond, uncond)
    exact = Guided(conditional, 4.0, cond, uncond)
    torch.testing.assert_close(predicted(x, sigma), exact(x, sigma), rtol=0, atol=1e-10)


def test_the_counter_counts_evaluations_and_network_calls():
    x, sigma = randn(3, *SHAPE), torch.ones(3)
    plain = Counted(gaussian)
    plain(x, sigma)
    plain(x, sigma)
    assert (plain.evaluations, plain.network_calls) == (2, 2)
    guided = Counted(Thresholded(Guided(conditional, 2.0, x, 0 * x)))
    guided(x, sigma)
    assert (guided.evaluations, guided.network_calls) == (1, 2)
    full = Counted(Full())
    full.with_features(x, sigma)
    assert full.far_mean is not None  # which costs nothing
    assert (full.evaluations, full.network_calls) == (1, 3)


def test_gradients_reach_x_and_sigma_through_all_wrappers():
    cond = randn(2, *SHAPE, seed=2)
    net = network("v", lambda t: (column(torch.cos(t / 999)), column(torch.sin(t / 999))))
    inner = lambda x_t, t, condition: net(x_t, t) + condition  # noqa: E731
    denoiser = Thresholded(Guided(Predicted(inner, VP_TABLE, "v"), 3.0, cond, 0 * cond), 0.8, 0.5)
    x = randn(2, *SHAPE).requires_grad_()
    sigma = torch.tensor([0.7, 4.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(denoiser, (x, sigma))
