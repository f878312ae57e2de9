"""EDM preconditioning: a raw network F becomes a denoiser D.

    D(x; sigma) = c_skip x + c_out F(c_in x; log(sigma) / 4)
    c_skip = sd^2 / (sigma^2 + sd^2)
    c_out  = sigma sd / sqrt(sigma^2 + sd^2)
    c_in   = 1 / sqrt(sigma^2 + sd^2)

with sd the standard deviation of the data. Source: Karras et al. 2022 (EDM), arXiv:2206.00364,
table 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["denoise"]


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
