"""Test beds with a known answer: data whose denoiser D(x, sigma) = E[x_0 | x] has a closed form.

    Gaussian          N(m, U^T diag(l) U + rest (I - U^T U)), the rows of U orthonormal:
                      D = m + sum_k l_k/(l_k + sigma^2) u_k <u_k, x - m>, and so on with rest
    GaussianMixture   sum_k w_k N(m_k, v_k I):   D = sum_k r_k (v_k x + sigma^2 m_k)/(v_k + sigma^2)
                      r = softmax_k(log w_k + log N(x; m_k, (v_k + sigma^2) I))
    DataSet           sum_n delta(x - y_n)/n:    D = sum_n y_n softmax_n(-|x - y_n|^2 / (2 sigma^2))

The probability flow of a Gaussian is known too; each coordinate of the eigenbasis scales by itself:

    x(sigma') - m = sqrt((l + sigma'^2)/(l + sigma^2)) (x(sigma) - m)

which is also what every model's flow looks like far out: Wang & Vastola 2024, arXiv:2412.09726.
The data set's denoiser stands in Karras et al. 2022, arXiv:2206.00364, appendix B.3.

All are denoisers: x [b, *shape] of any shape, sigma [b] > 0, float64 inside, the answer in the
dtype of x, and differentiable. By the tower rule the mean of D over x is the data's mean at every
sigma, so far_mean is exact.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["Gaussian", "GaussianMixture", "DataSet", "gaussian_flow"]


def gaussian_flow(
    x: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    mean: Tensor,
    basis: Tensor,
    variances: Tensor,
    rest: float | Tensor = 0.0,
) -> Tensor:
    """Carry x from sigma to sigma_next along the exact probability flow of a Gaussian.

    Args:
        x: [b, *shape] in EDM units
        sigma: floats or [b]; in any order, sigma_next may be 0; sigma = 0 needs every variance > 0
        sigma_next: see `sigma`
        mean: [*shape] or [1, *shape]
        basis: orthonormal rows, [k, d] with d the size of a sample; k may be 0
        variances: of the data along these rows, [k]
        rest: the variance along every other direction, one number

    Returns:
        x at sigma_next, [b, *shape], computed in float64, in the dtype of x
    """
    far, near = _column(sigma), _column(sigma_next)
    mean, basis, variances = (v.to(x.device, torch.float64) for v in (mean, basis, variances))
    rest = _column(rest)
    on_basis = ((variances + near**2) / (variances + far**2)) ** 0.5  # [k] or [b, k]
    elsewhere = ((rest + near**2) / (rest + far**2)) ** 0.5  # a float or [b, 1]
    return _scaled(x, mean, basis, on_basis, elsewhere)


class Gaussian:
    """A Gaussian with some directions of their own variance, and one variance for all others.

    Args:
        mean: [*shape]
        basis: orthonormal rows, [k, d] with d the size of a sample; None for k = 0
        variances: of the data along these rows, [k], >= 0; None for k = 0
        rest: the variance along every other direction, >= 0
        sigma_min: the lowest level at which a solver may call it
        sigma_max: the highest one
    """

    def __init__(
        self,
        mean: Tensor,
        basis: Tensor | None = None,
        variances: Tensor | None = None,
        rest: float = 0.0,
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> None:
        size = mean.numel()
        self.mean = mean.double()
        self.basis = mean.new_empty(0, size).double() if basis is None else basis.double()
        self.variances = mean.new_empty(0).double() if variances is None else variances.double()
        self.rest = rest
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        k = self.basis.shape[0]
        if self.basis.shape != (k, size) or self.variances.shape != (k,):
            raise ValueError(
                f"basis must be [k, {size}] and variances [k], got {list(self.basis.shape)} and "
                f"{list(self.variances.shape)}"
            )
        off = (self.basis @ self.basis.T - torch.eye(k).to(self.basis)).abs()
        if (off > 1e-5).any():  # 1e-5: a basis may come from float32
            raise ValueError(f"basis must have orthonormal rows, off by {off.max().item():.2g}")
        if rest < 0 or (self.variances < 0).any():
            raise ValueError(f"variances and rest must be >= 0, got {variances} and {rest}")

    @classmethod
    def from_covariance(cls, mean: Tensor, covariance: Tensor, **range_: float) -> Gaussian:
        """The same by its covariance [d, d], symmetric positive semi-definite up to rounding.

        Args:
            **range_: sigma_min and sigma_max, as in the class
        """
        covariance = covariance.double()
        variances, vectors = torch.linalg.eigh(covariance)
        slack = 1e-6 * covariance.abs().max()  # it may come from float32
        if (covariance - covariance.T).abs().max() > slack or variances[0] < -slack:
            raise ValueError(
                "covariance must be symmetric and have no negative eigenvalue, the smallest is "
                f"{variances[0].item():.3g}"
            )
        return cls(mean, vectors.T, variances.clamp(min=0), **range_)

    @property
    def far_mean(self) -> Tensor:
        """[1, *shape], float64."""
        return self.mean[None]

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        noise = _column(sigma) ** 2
        mean, basis, variances = (v.to(x.device) for v in (self.mean, self.basis, self.variances))
        return _scaled(
            x, mean, basis, variances / (variances + noise), self.rest / (self.rest + noise)
        )

    def exact(self, x: Tensor, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
        """x carried along the probability flow from sigma to sigma_next; see gaussian_flow."""
        return gaussian_flow(x, sigma, sigma_next, self.mean, self.basis, self.variances, self.rest)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Clean samples, [count, *shape], float64."""
        z = _normal([count, *self.mean.shape], generator)
        return _scaled(z + self.mean, self.mean, self.basis, self.variances**0.5, self.rest**0.5)


class GaussianMixture:
    """A mixture of isotropic Gaussians.

    Args:
        weights: [k], > 0; taken relative to their sum
        means: [k, *shape]
        variances: [k], or one for all, >= 0
        sigma_min: the lowest level at which a solver may call it
        sigma_max: the highest one
    """

    def __init__(
        self,
        weights: Tensor,
        means: Tensor,
        variances: Tensor | float,
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> None:
        self.means = means.double()
        count = self.means.shape[0]
        self.weights = weights.double() / weights.double().sum()
        self.variances = torch.as_tensor(variances, dtype=torch.float64).expand(count)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        if weights.shape != (count,) or not (weights > 0).all():
            raise ValueError(f"weights must be {count} numbers > 0, got {weights}")
        if (self.variances < 0).any():
            raise ValueError(f"variances must be >= 0, got {variances}")

    @property
    def far_mean(self) -> Tensor:
        """[1, *shape], float64."""
        return torch.tensordot(self.weights, self.means, 1)[None]

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        rows, noise = _rows(x), _column(sigma) ** 2
        means, variances, weights = (
            v.to(x.device) for v in (_rows(self.means), self.variances, self.weights)
        )
        total = variances + noise  # [b, k]
        square = (rows**2).sum(1, keepdim=True) - 2 * rows @ means.T + (means**2).sum(1)  # [b, k]
        log_density = -square / (2 * total) - rows.shape[1] / 2 * torch.log(total)
        shares = torch.softmax(torch.log(weights) + log_density, dim=1)
        # sum_k r_k (v_k x + sigma^2 m_k)/(v_k + sigma^2)
        own = (shares * variances / total).sum(1, keepdim=True)
        return _like(own * rows + (shares * noise / total) @ means, x)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Clean samples, [count, *shape], float64."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        z = _normal([count, *self.means.shape[1:]], generator)
        spread = self.variances[which].sqrt().reshape(-1, *[1] * (z.ndim - 1))
        return self.means[which] + spread * z


class DataSet:
    """The exact denoiser of a finite data set: that of a network which does not generalise.

    Args:
        points: [n, *shape], kept in their own dtype
        chunk: how many points are looked at together. Without gradients, memory is O(b (chunk + d)
            + chunk d) whatever n is; a graph for gradients keeps all b n weights.
        sigma_min: the lowest level at which a solver may call it
        sigma_max: the highest one
    """

    def __init__(
        self,
        points: Tensor,
        *,
        chunk: int = 4096,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> None:
        if points.shape[0] < 1 or chunk < 1:
            raise ValueError(
                f"need at least one point and chunk >= 1, got {points.shape[0]} and {chunk}"
            )
        self.points = points
        self.chunk = chunk
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        total = torch.stack([part.double().sum(0) for part in points.split(chunk)]).sum(0)
        #: the mean of the points, [1, *shape], float64
        self.far_mean = total[None] / points.shape[0]

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        rows, noise = _rows(x), _column(sigma) ** 2
        # softmax in one pass: the sums are kept relative to the largest logit so far
        largest = rows.new_full((rows.shape[0], 1), -math.inf)
        weight = torch.zeros_like(largest)
        weighted = torch.zeros_like(rows)
        for part in self.points.split(self.chunk):
            points = _rows(part.to(x.device))
            # -|x - y|^2/2 without |x|^2, which all points share
            logits = (rows @ points.T - (points**2).sum(1) / 2) / noise  # [b, chunk]
            new_largest = torch.maximum(largest, logits.detach().amax(1, keepdim=True))
            kept = torch.exp(largest - new_largest)
            shares = torch.exp(logits - new_largest)
            weight = weight * kept + shares.sum(1, keepdim=True)
            weighted = weighted * kept + shares @ points
            largest = new_largest
        return _like(weighted / weight, x)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Points drawn with replacement, [count, *shape], float64."""
        which = torch.randint(self.points.shape[0], (count,), generator=generator)
        return self.points[which.to(self.points.device)].double()


def _scaled(
    x: Tensor, mean: Tensor, basis: Tensor, on_basis: Tensor, elsewhere: Tensor | float
) -> Tensor:
    """x - mean, scaled by one factor per row of the basis and by another across them, plus mean."""
    mean = mean.reshape(-1)
    centred = _rows(x) - mean
    along = ((on_basis - elsewhere) * (centred @ basis.T)) @ basis
    return _like(mean + elsewhere * centred + along, x)


def _rows(x: Tensor) -> Tensor:
    """[b, *shape] -> [b, d], float64."""
    return x.double().reshape(x.shape[0], math.prod(x.shape[1:]))


def _like(rows: Tensor, x: Tensor) -> Tensor:
    return rows.reshape(x.shape).to(x.dtype)


def _column(sigma: float | Tensor) -> Any:
    """A float as it is; [b] -> [b, 1], float64."""
    return sigma.double().reshape(-1, 1) if isinstance(sigma, Tensor) else sigma


def _normal(shape: list[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
