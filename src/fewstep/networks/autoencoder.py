"""First stages of latent diffusion: VQ and KL autoencoders, told apart by whether there are codes.

    encode    encoder, quant_conv; of a KL one the mean
    decode    nearest code (VQ), post_quant_conv, decoder

Encoding does not quantise and decoding does, so that the diffusion runs on smooth latents. The
parameters carry the names of the published files.

Source: Rombach et al. 2022 (latent diffusion), arXiv:2112.10752; Esser et al. 2021 (VQGAN),
arXiv:2012.09841.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.networks.adm_config import GROUPS, AutoencoderConfig

__all__ = ["Autoencoder"]

EPS = 1e-6


class _Norm(nn.GroupNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels, EPS)


class _Block(nn.Module):
    """Residual block: norm, SiLU, conv, twice."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _Norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = _Norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)
        self.same = c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.same else self.nin_shortcut(x)) + h


class _Attention(nn.Module):
    """Attention of the pixels of a map, one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _Norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class _Level(nn.Module):
    """The blocks of one level, each with an attention or without."""

    def __init__(self, c_in: int, c_out: int, blocks: int, attends: bool) -> None:
        super().__init__()
        inputs = [c_in, *[c_out] * (blocks - 1)]
        self.block = nn.ModuleList(_Block(c, c_out) for c in inputs)
        self.attn = nn.ModuleList(_Attention(c_out) for _ in inputs if attends)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        return x


class _Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.attn_1 = _Block(channels, channels), _Attention(channels)
        self.block_2 = _Block(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


def _resampler(channels: int, stride: int) -> nn.Module:
    """A module with one convolution, `conv`."""
    pad = 0 if stride == 2 else 1
    return nn.ModuleDict({"conv": nn.Conv2d(channels, channels, 3, stride, pad)})


class _Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.channels, widths[0], 3, padding=1)
        self.down, c = nn.ModuleList(), widths[0]
        for i, width in enumerate(widths):
            level = _Level(c, width, config.blocks, i in config.encoder_attention)
            if i < len(widths) - 1:
                level.downsample = _resampler(width, stride=2)
            self.down.append(level)
            c = width
        self.mid, self.norm_out = _Middle(c), _Norm(c)
        outputs = config.latent * (1 if config.codes else 2)  # mean and log variance
        self.conv_out = nn.Conv2d(c, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for i, level in enumerate(self.down):
            h = level(h)
            if i < len(self.down) - 1:
                h = level.downsample["conv"](F.pad(h, (0, 1, 0, 1)))  # type: ignore[index]
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class _Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, c = config.widths, config.widths[-1]
        self.conv_in = nn.Conv2d(config.latent, c, 3, padding=1)
        self.mid = _Middle(c)
        levels: list[nn.Module] = []
        for i, width in reversed(list(enumerate(widths))):
            level = _Level(c, width, config.blocks + 1, i in config.decoder_attention)
            if i:
                level.upsample = _resampler(width, stride=1)
            levels.insert(0, level)
            c = width
        self.up = nn.ModuleList(levels)  # by level: 0 is the full size
        self.norm_out = _Norm(c)
        self.conv_out = nn.Conv2d(c, config.channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for i in range(len(self.up) - 1, -1, -1):
            level = self.up[i]
            h = level(h)
            if i:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
                h = level.upsample["conv"](h)  # type: ignore[index,operator]
        return self.conv_out(F.silu(self.norm_out(h)))


class Autoencoder(nn.Module):
    """Pictures [b, c, h, w] in about [-1, 1] to states [b, embedded, h / factor, w / factor]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = _Encoder(config), _Decoder(config)
        twice = 1 if config.codes else 2
        self.quant_conv = nn.Conv2d(twice * config.latent, twice * config.embedded, 1)
        self.post_quant_conv = nn.Conv2d(config.embedded, config.latent, 1)
        if config.codes:
            codes = nn.Embedding(config.codes, config.embedded)
            self.quantize = nn.ModuleDict({"embedding": codes})

    def encode(self, pictures: Tensor) -> Tensor:
        """States, unscaled; not quantised, and without noise."""
        return self.quant_conv(self.encoder(pictures))[:, : self.config.embedded]

    def decode(self, z: Tensor) -> Tensor:
        """Pictures of unscaled states, not held in any range."""
        if self.config.codes:
            z = self.nearest(z)
        return self.decoder(self.post_quant_conv(z))

    def codes(self, z: Tensor) -> Tensor:
        """Index of the nearest code of each place, [b, h, w]."""
        table: Tensor = self.quantize["embedding"].weight  # type: ignore[attr-defined]
        half = table.square().sum(1) / 2  # the rest of the squared distance is the same for all
        rows = [(half - one.flatten(1).T @ table.T).argmin(1) for one in z]  # one picture at a time
        return torch.stack(rows).reshape(len(z), *z.shape[2:])

    def nearest(self, z: Tensor) -> Tensor:
        """The nearest code at each place."""
        table: Tensor = self.quantize["embedding"].weight  # type: ignore[attr-defined]
        return table[self.codes(z)].permute(0, 3, 1, 2).contiguous()
