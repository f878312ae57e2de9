"""Further numbers that a network is told, besides the noise level and the class.

A distilled network may be told where on a sub-path it stands (gamma), the guidance scale that it
imitates, and in how many segments the path is to be gone. Each number goes in as an index of which
0 stands for the usual value:

    gamma       10 - 10 gamma      gamma = 1, the only value at inference, has index 0
    guidance    w - 1              w = 1, no guidance, has index 0
    phases      log2 K             K = 1, the whole path at once, has index 0

so a caller who knows of none gets the usual network. The first two maps are those of published
latent consistency models, whose pipelines call guidance_scale what is index + 1 here: in a network
that was distilled with gamma in that place, guidance_scale must be 1.

Sources: Luo et al. 2023 (LCM), arXiv:2310.04378, for the embedding of guidance; SPLAM,
arXiv:2404.13903, for gamma in its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.networks.unet_config import TOLD

__all__ = [
    "TOLD",
    "Told",
    "gamma_index",
    "guidance_embedding",
    "guidance_index",
    "indices",
    "phases_index",
]

FREQUENCIES = 16


def gamma_index(gamma: Tensor) -> Tensor:
    """10 - 10 gamma: 0 at gamma = 1."""
    return 10 - 10 * gamma


def guidance_index(scale: Tensor) -> Tensor:
    """w - 1: 0 where there is no guidance."""
    return scale - 1


def phases_index(phases: Tensor) -> Tensor:
    """log2 K: 0 for one segment."""
    return phases.log2()


def indices(names: Sequence[str], gamma: Tensor, guidance: Tensor, phases: Tensor) -> Tensor | None:
    """What a network that is told `names` is to be given, float32 [b, names]; None where there are
    none. Each is [b] or [1]."""
    values = {
        "gamma": gamma_index(gamma),
        "guidance": guidance_index(guidance),
        "phases": phases_index(phases),
    }
    rows = torch.broadcast_tensors(*(values[name].float() for name in names)) if names else ()
    return torch.stack(rows, dim=1) if names else None


def guidance_embedding(index: Tensor, size: int = 256) -> Tensor:
    """The published sinusoidal embedding of an index, for networks that have an input for it.

    Args:
        index: [b]; the frequencies are 1000 * 10^(-4 k / (size/2 - 1)), sines first

    Returns:
        [b, size], float32.
    """
    if size < 4 or size % 2:
        raise ValueError(f"size must be even and at least 4, got {size}")
    k = torch.arange(size // 2, dtype=torch.float64)
    frequencies = 1000 * torch.exp(-math.log(10_000) * k / (size // 2 - 1))
    angles = index.double()[:, None] * frequencies.to(index.device)
    return torch.cat((angles.sin(), angles.cos()), dim=1).float()


class Told(nn.Module):
    """Embeds one index, to be added to a network's other embeddings; zero before training, so that
    a network that gets one is what it was.

    forward: [b] -> [b, embedding]
    """

    def __init__(self, embedding: int) -> None:
        super().__init__()
        # periods from 40 down to 2: smooth over the 10 that gamma spans; on the CPU even where the
        # weights are built on the meta device
        low, high = math.log10(1 / 40), math.log10(1 / 2)
        frequencies = 2 * math.pi * torch.logspace(low, high, FREQUENCIES, device="cpu")
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.first = nn.Linear(2 * FREQUENCIES, embedding)
        self.last = nn.Linear(embedding, embedding)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, index: Tensor) -> Tensor:
        angles = index[:, None] * self.frequencies
        waves = torch.cat((angles.cos(), angles.sin()), dim=1)
        return self.last(F.silu(self.first(waves.to(self.first.weight.dtype))))
