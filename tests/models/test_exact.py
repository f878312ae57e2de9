"""Laws of the exact test beds: Bayes, Tweedie, the probability flow, and the data behind them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch import distributions

from fewstep.models.exact import DataSet, Gaussian, GaussianMixture, gaussian_flow

SHAPE = (2, 3)  # of one sample
DIM = 6


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MEAN = randn(*SHAPE, seed=1)
BASIS = torch.linalg.qr(randn(DIM, DIM, seed=2)).Q.T[:2]  # [2, 6]
VARIANCES = torch.tensor([2.0, 0.3], dtype=torch.float64)
REST = 0.05
COVARIANCE = BASIS.T @ VARIANCES.diag() @ BASIS + REST * (torch.eye(DIM).double() - BASIS.T @ BASIS)

MEANS = randn(3, *SHAPE, seed=3)
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
SPREADS = torch.tensor([0.3, 0.01, 1.0], dtype=torch.float64)
POINTS = randn(11, *SHAPE, seed=4)

BEDS = {
    "gaussian": Gaussian(MEAN, BASIS, VARIANCES, REST),
    "mixture": GaussianMixture(WEIGHTS, MEANS, SPREADS),
    "data-set": DataSet(POINTS, chunk=4),
}
every_bed = pytest.mark.parametrize("name", BEDS)


def log_density(name, x, sigma):
    """log p(x; sigma) of one flat x, by torch.distributions."""
    eye = torch.eye(DIM, dtype=torch.float64)
    normal = distributions.MultivariateNormal
    if name == "gaussian":
        return normal(MEAN.flatten(), COVARIANCE + sigma**2 * eye).log_prob(x)
    weights, means, spreads = {
        "mixture": (WEIGHTS, MEANS, SPREADS),
        "data-set": (torch.ones(11) / 11, POINTS, torch.zeros(11).double()),
    }[name]
    parts = normal(means.flatten(1), (spreads + sigma**2)[:, None, None] * eye)
    return distributions.MixtureSameFamily(distributions.Categorical(weights), parts).log_prob(x)


@every_bed
@given(log_sigma=st.floats(math.log(0.05), math.log(80)), seed=st.integers(0, 1000))
def test_denoised_is_the_score_of_the_log_density(name, log_sigma, seed):
    sigma = torch.tensor([math.exp(log_sigma)], dtype=torch.float64)
    x = BEDS[name].far_mean + (1 + sigma) * randn(1, *SHAPE, seed=seed)
    flat = x.flatten().requires_grad_()
    (score,) = torch.autograd.grad(log_density(name, flat, sigma[0]), flat)
    tweedie = x + sigma**2 * score.reshape(x.shape)
    # sigma^2 times a score that double precision knows to 1e-15 of its size
    torch.testing.assert_close(BEDS[name](x, sigma), tweedie, rtol=1e-8, atol=1e-8)


@every_bed
def test_far_mean_is_denoised_at_huge_sigma(name):
    x = randn(4, *SHAPE)
    denoised = BEDS[name](x, torch.full((4,), 1e6, dtype=torch.float64))
    torch.testing.assert_close(BEDS[name].far_mean.expand(4, *SHAPE), denoised, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 80.0])
@pytest.mark.parametrize(
    "bed, weights, means, spreads",
    [
        (Gaussian(torch.tensor(0.75), rest=0.4), [1], [0.75], [0.4]),
        (
            GaussianMixture(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 2.0]), 0.25),
            [0.25, 0.75],
            [-1.0, 2.0],
            [0.25, 0.25],
        ),
        (DataSet(torch.tensor([-1.0, 0.5, 2.0])), [1 / 3] * 3, [-1.0, 0.5, 2.0], [0, 0, 0]),
    ],
    ids=["gaussian", "mixture", "data-set"],
)
def test_the_mean_of_denoised_is_far_mean_at_every_sigma(bed, weights, means, spreads, sigma):
    """The tower rule E[E[x_0 | x]] = E[x_0], by quadrature in one dimension."""
    x = torch.linspace(-12 - 10 * sigma, 12 + 10 * sigma, 4001, dtype=torch.float64)
    density = torch.zeros_like(x)
    for weight, mean, spread in zip(weights, means, spreads, strict=True):
        total = spread + sigma**2
        bell = torch.exp(-((x - mean) ** 2) / (2 * total)) / math.sqrt(2 * math.pi * total)
        density += weight * bell
    denoised = bed(x, torch.full_like(x, sigma))
    mean = torch.trapezoid(density * denoised, x)
    assert mean.item() == pytest.approx(bed.far_mean.item(), abs=1e-9)


@pytest.mark.parametrize("sigma, sigma_next", [(80.0, 0.002), (3.0, 0.5), (0.1, 20.0)])
def test_exact_equals_a_fine_integration(sigma, sigma_next):
    covariance, mean = COVARIANCE.numpy(), MEAN.flatten().numpy()
    x = MEAN[None] + sigma * randn(1, *SHAPE)

    def slope(log_sigma, x):  # dx / dlog sigma = x - D, with D by Bayes' rule
        noise = math.exp(2 * log_sigma) * np.eye(DIM)
        return x - mean - covariance @ np.linalg.solve(covariance + noise, x - mean)

    ends = math.log(sigma), math.log(sigma_next)
    fine = solve_ivp(slope, ends, x.flatten().numpy(), rtol=1e-11, atol=1e-12, method="DOP853")
    exact = BEDS["gaussian"].exact(x, sigma, sigma_next).flatten().numpy()
    np.testing.assert_allclose(exact, fine.y[:, -1], rtol=1e-8, atol=1e-9)


def test_exact_carries_the_covariance_along():
    """From C + sigma^2 I to C + sigma'^2 I, down to sigma' = 0."""
    eye = torch.eye(DIM, dtype=torch.float64)
    root = torch.linalg.cholesky(COVARIANCE + 80.0**2 * eye)
    for sigma_next in (1.0, 0.0):
        columns = BEDS["gaussian"].exact(MEAN + root.T.reshape(DIM, *SHAPE), 80.0, sigma_next)
        carried = (columns - MEAN).flatten(1).T
        expected = COVARIANCE + sigma_next**2 * eye
        torch.testing.assert_close(carried @ carried.T, expected, rtol=0, atol=1e-11)


def test_flow_takes_one_sigma_per_sample_and_returns():
    x, bed = randn(3, *SHAPE), BEDS["gaussian"]
    sigma, sigma_next = torch.tensor([80.0, 2.0, 0.1]), torch.tensor([0.5, 1.0, 0.1])
    together = bed.exact(x, sigma, sigma_next)
    for i in range(3):
        alone = bed.exact(x[i : i + 1], sigma[i].item(), sigma_next[i].item())
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-13)
    torch.testing.assert_close(together[2], x[2], rtol=0, atol=1e-13)
    torch.testing.assert_close(bed.exact(together, sigma_next, sigma), x, rtol=0, atol=1e-11)


def test_flow_without_a_basis_or_a_variance_is_known():
    x, none = 5 + randn(2, *SHAPE), torch.empty(0)
    point = gaussian_flow(x, 4.0, 1.0, MEAN, torch.empty(0, DIM), none)  # of a single point
    torch.testing.assert_close(point, MEAN + (x - MEAN) / 4, rtol=0, atol=1e-14)
    round_ = gaussian_flow(x, 4.0, 0.0, MEAN[None], torch.empty(0, DIM), none, torch.tensor(9.0))
    torch.testing.assert_close(round_, MEAN + (x - MEAN) * 0.6, rtol=0, atol=1e-14)


def test_flow_computes_in_float64_whatever_it_is_given():
    x = 80 * randn(2, *SHAPE).float()
    given_ = [v.float() for v in (MEAN, BASIS, VARIANCES, torch.tensor(REST))]
    low = gaussian_flow(x, 80.0, 0.002, *given_)
    high = gaussian_flow(x.double(), 80.0, 0.002, *(v.double() for v in given_))
    assert low.dtype == torch.float32
    assert torch.equal(low, high.float())


def test_gaussian_has_three_equal_constructions():
    x, sigma = randn(4, *SHAPE), torch.tensor([0.01, 0.3, 2.0, 80.0], dtype=torch.float64)
    by_covariance = Gaussian.from_covariance(MEAN, COVARIANCE, sigma_min=0.1)
    torch.testing.assert_close(BEDS["gaussian"](x, sigma), by_covariance(x, sigma))
    assert (by_covariance.sigma_min, by_covariance.sigma_max) == (0.1, 80.0)
    round_ = Gaussian(MEAN, rest=0.7)
    as_mixture = GaussianMixture(torch.ones(1), MEAN[None], 0.7)
    torch.testing.assert_close(round_(x, sigma), as_mixture(x, sigma))


def test_a_data_set_is_a_mixture_without_variance():
    x, sigma = randn(4, *SHAPE), torch.tensor([0.1, 0.3, 2.0, 80.0], dtype=torch.float64)
    as_mixture = GaussianMixture(torch.ones(11), POINTS, 0.0)
    torch.testing.assert_close(DataSet(POINTS)(x, sigma), as_mixture(x, sigma), rtol=0, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 3, 11, 4096])
def test_chunks_do_not_matter(chunk):
    x, sigma = 3 * randn(5, *SHAPE), torch.tensor([0.002, 0.1, 1.0, 9.0, 80.0]).double()
    square = ((x[:, None] - POINTS) ** 2).sum((2, 3))
    shares = torch.softmax(-square / (2 * sigma[:, None] ** 2), dim=1)
    expected = torch.einsum("bn,nij->bij", shares, POINTS)
    bed = DataSet(POINTS, chunk=chunk)
    torch.testing.assert_close(bed(x, sigma), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(bed.far_mean[0], POINTS.mean(0), rtol=0, atol=1e-14)


def test_a_data_set_at_low_noise_returns_its_nearest_point():
    noisy = POINTS + 0.01 * randn(11, *SHAPE)
    denoised = DataSet(POINTS)(noisy, torch.full((11,), 0.01))
    torch.testing.assert_close(denoised, POINTS, rtol=0, atol=1e-12)


@every_bed
def test_every_sample_is_denoised_by_itself_in_its_own_dtype(name):
    bed, x = BEDS[name], randn(5, *SHAPE)
    sigma = torch.tensor([0.01, 0.2, 1.0, 7.0, 80.0])
    together = bed(x, sigma)
    for i in range(5):
        alone = bed(x[i : i + 1], sigma[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-10)
    single = bed(x.float(), sigma)
    assert single.dtype == torch.float32
    assert torch.equal(single, bed(x.float().double(), sigma).float())
    assert bed(x[:0], sigma[:0]).shape == (0, *SHAPE)


@every_bed
def test_gradients_reach_x_and_sigma(name):
    x = randn(2, *SHAPE).requires_grad_()
    sigma = torch.tensor([0.8, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(BEDS[name], (x, sigma))


@every_bed
def test_samples_have_the_mean_and_covariance_of_the_data(name):
    count = 20_000
    samples = BEDS[name].sample(count, torch.Generator().manual_seed(0)).flatten(1)
    again = BEDS[name].sample(count, torch.Generator().manual_seed(0)).flatten(1)
    assert torch.equal(samples, again)
    if name == "gaussian":
        covariance = COVARIANCE
    else:
        weights, means, spreads = {
            "mixture": (WEIGHTS, MEANS, SPREADS),
            "data-set": (torch.ones(11).double() / 11, POINTS, torch.zeros(11).double()),
        }[name]
        covariance = torch.cov(means.flatten(1).T, correction=0, aweights=weights)
        covariance = covariance + (weights * spreads).sum() * torch.eye(DIM)
    mean = BEDS[name].far_mean.flatten()
    # 5 standard errors; the largest variance is near 2, that of a product near 2 * 2^2
    torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=5 * math.sqrt(2 / count))
    torch.testing.assert_close(
        torch.cov(samples.T), covariance, rtol=0, atol=5 * math.sqrt(8 / count)
    )


@pytest.mark.parametrize(
    "build, rule",
    [
        (lambda: Gaussian(MEAN, BASIS), "basis must be"),
        (lambda: Gaussian(MEAN, BASIS[:, :5], VARIANCES), r"basis must be \[k, 6\]"),
        (lambda: Gaussian(MEAN, 2 * BASIS, VARIANCES), "orthonormal rows"),
        (lambda: Gaussian(MEAN, BASIS, -VARIANCES), "must be >= 0"),
        (lambda: Gaussian(MEAN, rest=-1.0), "must be >= 0"),
        (lambda: Gaussian.from_covariance(MEAN, -COVARIANCE), "no negative eigenvalue"),
        (lambda: Gaussian.from_covariance(MEAN, COVARIANCE.triu()), "symmetric"),
        (lambda: GaussianMixture(WEIGHTS[:2], MEANS, 1.0), "3 numbers > 0"),
        (lambda: GaussianMixture(-WEIGHTS, MEANS, 1.0), "3 numbers > 0"),
        (lambda: GaussianMixture(WEIGHTS, MEANS, -1.0), "must be >= 0"),
        (lambda: DataSet(POINTS[:0]), "at least one point"),
        (lambda: DataSet(POINTS, chunk=0), "chunk >= 1"),
    ],
)
def test_impossible_data_are_refused(build, rule):
    with pytest.raises(ValueError, match=rule):
        build()
