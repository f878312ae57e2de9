"""Preconditioning: a raw network F becomes a denoiser D.

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)

             c_skip                 c_out           c_in                 c_noise
    EDM      sd^2/(sigma^2 + sd^2)  sigma sd c_in   (sigma^2+sd^2)^-1/2  log(sigma)/4
    VP       1                      -sigma          (sigma^2+1)^-1/2     (M - 1) t
    VE       1                      sigma           1                    log(sigma/2)
    iDDPM    1                      -sigma          (sigma^2+1)^-1/2     M - 1 - j

with sd the standard deviation of the data, t the time of VP at which the level is sigma, and j the
index of the level nearest to sigma in iDDPM's table. Source: Karras et al. 2022 (EDM),
arXiv:2206.00364, table 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.denoiser import per_sample

__all__ = ["IDDPM", "VE", "VP", "denoise"]


def denoise(
    net: Callable[..., Tensor],
    x: Tensor,
    sigma: Tensor,
    label: Tensor,
    sigma_data: float = 0.5,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """E[x_0 | x] by the network, net(c_in x, log(sigma) / 4, label).

    Args:
        x: noisy pictures in EDM units, [b, c, h, w]
        sigma: [b], > 0
        label: [b] class indices
        dtype: the network's arithmetic, to which only its input is cast: the state keeps its own
    """

    sigma = sigma.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    total = sigma.square() + sigma_data**2
    c_in, c_out = total.rsqrt(), sigma * sigma_data * total.rsqrt()
    raw = net((c_in * x).to(dtype), sigma.flatten().log().to(torch.float32) / 4, label)
    return torch.addcmul(sigma_data**2 / total * x, c_out, raw.to(x.dtype))


@dataclass(frozen=True)
class VP:
    """D = x - sigma F(x / sqrt(sigma^2 + 1); (M - 1) t), with the time of
    sigma^2 = exp(beta_d t^2 / 2 + beta_min t) - 1. Called as `denoise` is."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    count: int = 1000

    def __call__(
        self,
        net: Callable[..., Tensor],
        x: Tensor,
        sigma: Tensor,
        label: Tensor,
        sigma_data: float = 0.5,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        level = sigma.to(torch.float32)
        root = (self.beta_min**2 + 2 * self.beta_d * (1 + level**2).log()).sqrt()
        t = (root - self.beta_min) / self.beta_d
        return _variance_preserving(net, x, sigma, (self.count - 1) * t, label, dtype)


@dataclass(frozen=True)
class VE:
    """D = x + sigma F(x; log(sigma / 2)). Called as `denoise` is."""

    def __call__(
        self,
        net: Callable[..., Tensor],
        x: Tensor,
        sigma: Tensor,
        label: Tensor,
        sigma_data: float = 0.5,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        raw = net(x.to(dtype), (0.5 * sigma.to(torch.float32)).log(), label)
        return torch.addcmul(x, per_sample(sigma.to(x.dtype), x), raw.to(x.dtype))


@dataclass(frozen=True)
class IDDPM:
    """D = x - sigma F(x / sqrt(sigma^2 + 1); M - 1 - j), j the index of the level nearest to sigma;
    of twice as many channels the first half is meant. Called as `denoise` is.

    levels: M + 1 of them, from the noisiest to 0
    """

    levels: tuple[float, ...]

    def __call__(
        self,
        net: Callable[..., Tensor],
        x: Tensor,
        sigma: Tensor,
        label: Tensor,
        sigma_data: float = 0.5,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        table = torch.tensor(self.levels, dtype=torch.float32, device=x.device)
        nearest = (sigma.to(torch.float32)[:, None] - table).abs().argmin(dim=1)
        index = (len(self.levels) - 2 - nearest).to(torch.float32)
        return _variance_preserving(net, x, sigma, index, label, dtype)


def _variance_preserving(
    net: Callable[..., Tensor],
    x: Tensor,
    sigma: Tensor,
    noise: Tensor,
    label: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    level = per_sample(sigma.to(x.dtype), x)
    raw = net((x / (level**2 + 1).sqrt()).to(dtype), noise, label)[:, : x.shape[1]]
    return torch.addcmul(x, -level, raw.to(x.dtype))
