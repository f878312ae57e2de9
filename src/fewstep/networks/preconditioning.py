"""Preconditioning: a raw network F becomes a denoiser D.

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)

             c_skip                 c_out           c_in                 c_noise
    EDM      sd^2/(sigma^2 + sd^2)  sigma sd c_in   (sigma^2+sd^2)^-1/2  log(sigma)/4
    VP       1                      -sigma          (sigma^2+1)^-1/2     (M - 1) t
    VE       1                      sigma           1                    log(sigma/2)
    iDDPM    1                      -sigma          (sigma^2+1)^-1/2     M - 1 - j

with sd the standard deviation of the data, t the time of VP at which the level is sigma, and j the
index of the level nearest to sigma in iDDPM's table. Consistency models have sigma - sigma_min in
EDM's c_skip and c_out, so that D(x; sigma_min) = x.

Sources: Karras et al. 2022 (EDM), arXiv:2206.00364, table 1; Song et al. 2023 (consistency models),
arXiv:2303.01469, appendix C.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.denoiser import per_sample

__all__ = ["EDM", "IDDPM", "VE", "VP", "Preconditioned", "denoise"]

# (sigma [b, 1, ...], sigma_data) -> c_skip, c_out, c_in for x; c_noise [b], float32
Scalings = Callable[[Tensor, float], tuple[Tensor | float, Tensor, Tensor | float, Tensor]]


@dataclass(frozen=True)
class Preconditioned:
    """D of a raw network, by one line of the table."""

    scalings: Scalings

    def __call__(
        self,
        net: Callable[..., Tensor],
        x: Tensor,
        sigma: Tensor,
        label: Tensor,
        sigma_data: float = 0.5,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """E[x_0 | x] by the network, net(c_in x, c_noise, label); of further channels of its
        output, such as a learned variance, nothing is used.

        Args:
            x: noisy pictures in EDM units, [b, c, h, w]
            sigma: [b], > 0
            label: [b] class indices
            dtype: the network's arithmetic, to which only its input is cast: the state keeps its
                own
        """
        level = per_sample(sigma.to(x.dtype), x)
        c_skip, c_out, c_in, c_noise = self.scalings(level, sigma_data)
        raw = net((c_in * x).to(dtype), c_noise, label)[:, : x.shape[1]]
        return torch.addcmul(c_skip * x, c_out, raw.to(x.dtype))


@dataclass(frozen=True)
class EDM:
    """Scalings of EDM.

    sigma_min: of a consistency model, at which D is x itself
    time_scale: multiplies the time that the network is told
    """

    sigma_min: float = 0.0
    time_scale: float = 1.0

    def __call__(self, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        above = sigma - self.sigma_min
        c_in = (sigma.square() + sigma_data**2).rsqrt()
        c_skip = sigma_data**2 / (above.square() + sigma_data**2)
        c_noise = self.time_scale * (sigma.flatten().log().to(torch.float32) / 4)
        return c_skip, above * sigma_data * c_in, c_in, c_noise


@dataclass(frozen=True)
class VP:
    """Scalings of VP, with the time of sigma^2 = exp(beta_d t^2 / 2 + beta_min t) - 1."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    count: int = 1000

    def __call__(self, sigma: Tensor, sigma_data: float) -> tuple[float, Tensor, Tensor, Tensor]:
        level = sigma.flatten().to(torch.float32)
        root = (self.beta_min**2 + 2 * self.beta_d * (1 + level**2).log()).sqrt()
        t = (root - self.beta_min) / self.beta_d
        return 1.0, -sigma, (sigma**2 + 1).rsqrt(), (self.count - 1) * t


@dataclass(frozen=True)
class VE:
    """Scalings of VE."""

    def __call__(self, sigma: Tensor, sigma_data: float) -> tuple[float, Tensor, float, Tensor]:
        return 1.0, sigma, 1.0, (0.5 * sigma.flatten().to(torch.float32)).log()


@dataclass(frozen=True)
class IDDPM:
    """Scalings of iDDPM.

    levels: M + 1 of them, from the noisiest to 0
    """

    levels: tuple[float, ...]

    def __call__(self, sigma: Tensor, sigma_data: float) -> tuple[float, Tensor, Tensor, Tensor]:
        table = torch.tensor(self.levels, dtype=torch.float32, device=sigma.device)
        nearest = (sigma.flatten().to(torch.float32)[:, None] - table).abs().argmin(dim=1)
        index = (len(self.levels) - 2 - nearest).to(torch.float32)
        return 1.0, -sigma, (sigma**2 + 1).rsqrt(), index


denoise = Preconditioned(EDM())
