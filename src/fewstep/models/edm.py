"""EDM preconditioning: a raw network F becomes a denoiser D.

    D(x; sigma) = c_skip x + c_out F(c_in x; log(sigma) / 4)
    c_skip = sd^2 / (sigma^2 + sd^2)    c_out = sigma sd / sqrt(sigma^2 + sd^2)    c_in = 1 / sqrt(sigma^2 + sd^2)

with sd the standard deviation of the data. Source: Karras et al. 2022 (EDM), arXiv:2206.00364, table 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["denoise"]


def denoise(
    net: nn.Module, x: Tensor, sigma: Tensor, label: Tensor, sigma_data: float = 0.5
) -> Tensor:
    """E[x_0 | x] by the network.

    x: noisy pictures in EDM units, [b, c, h, w]; sigma: [b], > 0; label: [b] class indices. The state keeps
    its own dtype; only the network's input is cast to the network's.
    """
    sigma = sigma.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    total = sigma.square() + sigma_data**2
    c_in, c_out = total.rsqrt(), sigma * sigma_data * total.rsqrt()
    dtype = next(net.parameters()).dtype
    raw = net((c_in * x).to(dtype), sigma.flatten().log().to(torch.float32) / 4, label)
    return torch.addcmul(sigma_data**2 / total * x, c_out, raw.to(x.dtype))
