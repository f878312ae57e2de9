"""A small class-conditional U-Net, the built-in network's backbone.

Pictures enter through a pixel-unshuffle stem (each patch x patch square becomes channels), pass
`blocks` residual blocks at each width on the way down, attention at the lowest resolution, and as
many on the way up, with skip connections by concatenation. The noise level and the class reach
every block as a scale and a shift after its second normalisation.

Sources: Ronneberger et al. 2015 (U-Net), arXiv:1505.04597; Ho et al. 2020 (DDPM), arXiv:2006.11239;
Nichol and Dhariwal 2021 (scale-shift norm), arXiv:2102.09672; Karras et al. 2022 (EDM),
arXiv:2206.00364.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.networks.conditioning import Told
from fewstep.networks.unet_config import NORM_GROUPS, UNetConfig, attention_heads

__all__ = ["UNet", "UNetConfig"]


def start_from_zero(module: nn.Module) -> None:
    """Zero a layer's parameters, so that its branch contributes nothing at first."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


class Block(nn.Module):
    """Residual block: norm, SiLU, conv, norm scaled and shifted by the embedding, SiLU, conv from
    zero."""

    def __init__(self, c_in: int, c_out: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(NORM_GROUPS, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * c_out)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        start_from_zero(self.conv2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulate(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over the pixels of a small map, one head per 64 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = attention_heads(channels)
        self.norm = nn.GroupNorm(NORM_GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        start_from_zero(self.out)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # each [b, heads, pixels, c / heads]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(-1, -2).reshape(b, c, height, width))


class Middle(nn.Module):
    """The lowest resolution: attention and one block. Its output is what feature taps read."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.attention = Attention(channels)
        self.block = Block(channels, channels, embedding)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.block(self.attention(x), emb)


class UNet(nn.Module):
    """The raw network F(c_in x; c_noise, label) of EDM's preconditioning.

    forward(x, c_noise, label, told=None):

    x: [b, c, h, w]
    c_noise: log(sigma) / 4, [b]
    label: integers below classes, or `classes` itself for "no class", [b]
    told: an index for each name in config.told, [b, names] or [1, names]; zeros where left out

    Returns [b, c, h, w]. The output of `middle` is [b, c, h, w] of the lowest resolution.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        emb, widths, stem = config.embedding, config.widths, config.channels * config.patch**2
        # periods from 8 down to 1/4 in c_noise, whose whole range is about 2.7: smooth in sigma,
        # still sharp; on the CPU even where the weights are built on the meta device
        low, high = math.log10(1 / 8), math.log10(4)
        frequencies = 2 * math.pi * torch.logspace(low, high, 32, device="cpu")
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.embed_noise = nn.Sequential(nn.Linear(64, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.embed_label = nn.Embedding(config.classes + 1, emb)
        start_from_zero(self.embed_label)
        self.embed_told = nn.ModuleList(Told(emb) for _ in config.told)

        self.stem = nn.Conv2d(stem, widths[0], 3, padding=1)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, c = [], widths[0]
        for level, width in enumerate(widths):
            if level:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
            for _ in range(config.blocks):
                self.encoder.append(Block(c, width, emb))
                c = width
                skips.append(c)
        self.middle = Middle(c, emb)
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(config.blocks):
                self.decoder.append(Block(c + skips.pop(), width, emb))
                c = width
            if level:
                self.up.append(nn.Conv2d(c, c, 3, padding=1))
        self.norm = nn.GroupNorm(NORM_GROUPS, c)
        self.head = nn.Conv2d(c, stem, 3, padding=1)
        start_from_zero(self.head)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of its pictures."""
        return self.config.channels, self.config.size, self.config.size

    def forward(
        self, x: Tensor, c_noise: Tensor, label: Tensor, told: Tensor | None = None
    ) -> Tensor:
        blocks = self.config.blocks
        angles = c_noise[:, None] * self.frequencies
        emb = self.embed_noise(torch.cat((angles.cos(), angles.sin()), dim=1).to(x.dtype))
        emb = emb + self.embed_label(label)
        if told is None:
            told = c_noise.new_zeros(1, len(self.embed_told))
        for i, embed in enumerate(self.embed_told):
            emb = emb + embed(told[:, i])
        emb = F.silu(emb)

        h = self.stem(F.pixel_unshuffle(x, self.config.patch))
        skips = []
        for i, block in enumerate(self.encoder):
            if i and i % blocks == 0:
                h = self.down[i // blocks - 1](h)
            h = block(h, emb)
            skips.append(h)
        h = self.middle(h, emb)
        for i, block in enumerate(self.decoder):
            if i and i % blocks == 0:
                h = self.up[i // blocks - 1](F.interpolate(h, scale_factor=2.0, mode="nearest"))
            h = block(torch.cat((h, skips.pop()), dim=1), emb)
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), self.config.patch)
