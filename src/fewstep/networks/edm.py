"""The U-Nets of EDM: SongUNet (DDPM++ and NCSN++) and DhariwalUNet (ADM).

Both are levels of residual blocks, halved in between; the decoder has one block more per level, and
each of these follows the concatenation with a skip. What differs is data:

                  SongUNet                              DhariwalUNet
    embedding     two layers, then silu; [sin | cos]    two layers, classes after them; [cos | sin]
    in a block    added before the second norm          scale and shift after it
    residual sum  times sqrt(1/2)                       as it is
    attention     one head; in the decoder at a         one head per 64 channels; at every block of
                  level's last block                    the decoder's level
    shortcut      1 x 1 convolution where resized       resized alone
    norms         eps 1e-6                              eps 1e-5

NCSN++ carries the picture down beside the network (encoder residual or skip), or up (decoder skip).
Parameters have the names of the published files. Rows of qkv are (head, channel, q/k/v).

In float16 and bfloat16 the convolutions compute in that type, and embeddings in float32, as in the
published runs.

Sources: Karras et al. 2022 (EDM), arXiv:2206.00364, appendix F; Song et al. 2021, arXiv:2011.13456;
Dhariwal and Nichol 2021, arXiv:2105.05233.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.networks.edm_config import EDMConfig
from fewstep.networks.maps import double, grid_of, halve, is_box, pointwise

__all__ = ["EDMUNet", "narrow"]

FLOAT32 = ("map_", "affine.", "freqs", "emb_")  # names of what stays float32
HEAD = 64  # channels of one head of a DhariwalUNet


class GroupNorm(nn.GroupNorm):
    """At most 32 groups, of at least 4 channels."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(max(1, min(32, channels // 4)), channels, eps=eps)


class Resampled(nn.Module):
    """A convolution of a map that is halved or doubled by a filter on the way; kernel 0 has no
    weights.

    fused: halves after the convolution, not before it
    """

    resample_filter: Tensor

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        step: int = 0,
        taps: tuple[float, ...] = (1.0, 1.0),
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.step, self.fused = c_in, step, fused
        if kernel:
            self.weight = nn.Parameter(torch.empty(c_out, c_in, kernel, kernel))
            self.bias = nn.Parameter(torch.empty(c_out))
        else:
            self.weight = self.bias = None
        if step:
            self.register_buffer("resample_filter", grid_of(taps))
            self.pad, self.box = (len(taps) - 1) // 2, is_box(taps)

    def forward(self, x: Tensor) -> Tensor:
        inner = 0 if self.weight is None else self.weight.shape[-1] // 2
        if self.step > 0 and inner == 0 and self.box and self.weight is not None:
            x = pointwise(x, self.weight, self.bias)  # the same, on a quarter of the map
            return double(x, self.resample_filter, self.pad, self.box)
        if self.step > 0:
            x = double(x, self.resample_filter, self.pad, self.box)
        elif self.step < 0 and not self.fused:
            x = halve(x, self.resample_filter, self.pad, self.box)
        if self.weight is None:
            return x
        if self.fused and self.step < 0:
            whole = F.conv2d(x, self.weight, None, padding=inner + self.pad)
            y = halve(whole, self.resample_filter, 0, self.box)
            return y if self.bias is None else y + self.bias[:, None, None]
        if inner == 0:
            return pointwise(x, self.weight, self.bias)
        return F.conv2d(x, self.weight, self.bias, padding=inner)


class Positional(nn.Module):
    """Waves of a level: frequencies from 1 down to 1/10000, the end included or not."""

    freqs: Tensor

    def __init__(self, width: int, endpoint: bool) -> None:
        super().__init__()
        # on the CPU even where the weights are built on the meta device; in float32, as published:
        # its rounding is multiplied by times of up to 1000
        half = width // 2
        k = torch.arange(half, dtype=torch.float32, device="cpu") / (half - endpoint)
        self.register_buffer("freqs", (1 / 10_000) ** k, persistent=False)

    def forward(self, level: Tensor) -> Tensor:
        angles = level[:, None] * self.freqs
        return torch.cat((angles.cos(), angles.sin()), dim=1)


class Fourier(nn.Module):
    """Waves of a level, of stored random frequencies."""

    freqs: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.empty(width // 2))

    def forward(self, level: Tensor) -> Tensor:
        angles = level[:, None] * (2 * math.pi * self.freqs)
        return torch.cat((angles.cos(), angles.sin()), dim=1)


class Block(nn.Module):
    """A residual block, with attention where heads > 0.

    step: 1 doubles the map, -1 halves it
    """

    def __init__(
        self, c_in: int, c_out: int, config: EDMConfig, step: int = 0, attention: bool = False
    ) -> None:
        super().__init__()
        song, taps = config.song, config.resample_filter if config.song else (1.0, 1.0)
        eps = 1e-6 if song else 1e-5
        self.in_channels, self.out_channels, self.film = c_in, c_out, not song
        self.scale = math.sqrt(0.5) if song else 1.0
        self.heads = (1 if song else c_out // HEAD) if attention else 0
        self.norm0 = GroupNorm(c_in, eps)
        self.conv0 = Resampled(c_in, c_out, 3, step, taps)
        embedding = config.model_channels * config.channel_mult_emb
        self.affine = nn.Linear(embedding, c_out * (1 if song else 2))
        self.norm1 = GroupNorm(c_out, eps)
        self.conv1 = Resampled(c_out, c_out, 3)
        self.skip: Resampled | None = None
        if c_in != c_out or step:
            kernel = 1 if song or c_in != c_out else 0
            self.skip = Resampled(c_in, c_out, kernel, step, taps)
        if self.heads:
            self.norm2 = GroupNorm(c_out, eps)
            self.qkv = Resampled(c_out, 3 * c_out, 1)
            self.proj = Resampled(c_out, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        # in place is what no gradient needs: the output of a norm, or of a convolution
        h = self.conv0(F.silu(self.norm0(x), inplace=True))
        told = self.affine(emb)[:, :, None, None].to(h.dtype)
        if self.film:
            scale, shift = told.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1), inplace=True)
        else:
            h = F.silu(self.norm1(h.add_(told)), inplace=True)
        h = self.conv1(h).add_(x if self.skip is None else self.skip(x))
        h = h.mul_(self.scale) if self.scale != 1 else h
        if not self.heads:
            return h
        h = self._attend(self.norm2(h)).add_(h)
        return h.mul_(self.scale) if self.scale != 1 else h

    def _attend(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        qkv, offset, mixing = self.qkv.weight, self.qkv.bias, self.proj.weight
        assert qkv is not None
        assert offset is not None
        assert mixing is not None
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)  # [b, pixels, c]
        # rows of the file are (head, channel, q/k/v): here q, k and v are apart, as kernels want it
        order = (self.heads, c // self.heads, 3)
        weight = qkv.reshape(*order, c).movedim(2, 0).flatten(0, 2)
        bias = offset.reshape(order).movedim(2, 0).flatten()
        rows = F.linear(tokens, weight, bias).unflatten(2, (3, *order[:2]))
        q, k, v = rows.permute(2, 0, 3, 1, 4).unbind(0)  # [b, heads, pixels, channels]
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = F.linear(out, mixing.flatten(1), self.proj.bias)
        return out.transpose(1, 2).unflatten(2, (height, width))


class EDMUNet(nn.Module):
    """The raw network F of a configuration.

    forward: (x [b, c, h, w], noise level as the preconditioning tells it [b], label [b]) -> raw
    output; label is a class's index, or label_dim for none
    """

    def __init__(self, config: EDMConfig) -> None:
        super().__init__()
        self.config = config
        width = config.model_channels * (config.channel_mult_noise if config.song else 1)
        embedding = config.model_channels * config.channel_mult_emb
        if config.song and config.embedding_type == "fourier":
            self.map_noise: nn.Module = Fourier(width)
        else:
            self.map_noise = Positional(width, endpoint=config.song)
        if config.label_dim:
            into = width if config.song else embedding
            self.map_label = nn.Linear(config.label_dim, into, bias=config.song)
        if config.augment_dim:  # for training alone: nothing is augmented here
            self.map_augment = nn.Linear(config.augment_dim, width, bias=False)
        self.map_layer0 = nn.Linear(width, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        skips, channels = self._encoder(config)
        self._decoder(config, skips, channels)

    def _encoder(self, config: EDMConfig) -> tuple[list[int], int]:
        """Build it; (channels of the skips, channels at its end)."""
        self.enc = nn.ModuleDict()
        levels, taps = config.levels, config.resample_filter
        aux = config.img_channels
        channels = config.model_channels if config.song else levels[0][1]
        self.enc[f"{levels[0][0]}x{levels[0][0]}_conv"] = Resampled(aux, channels, 3)
        skips = [channels]
        for level, (side, wide) in enumerate(levels):
            if level:
                self.enc[f"{side}x{side}_down"] = Block(channels, channels, config, step=-1)
                skips.append(channels)
            if level and config.song and config.encoder_type == "skip":
                self.enc[f"{side}x{side}_aux_down"] = Resampled(aux, aux, 0, -1, taps)
                self.enc[f"{side}x{side}_aux_skip"] = Resampled(aux, channels, 1)
            if level and config.song and config.encoder_type == "residual":
                down = Resampled(aux, channels, 3, -1, taps, fused=True)
                self.enc[f"{side}x{side}_aux_residual"] = down
                aux = channels
            for i in range(config.num_blocks):
                attention = side in config.attn_resolutions
                block = Block(channels, wide, config, attention=attention)
                self.enc[f"{side}x{side}_block{i}"] = block
                channels = wide
                skips.append(channels)
        return skips, channels

    def _decoder(self, config: EDMConfig, skips: list[int], channels: int) -> None:
        self.dec = nn.ModuleDict()
        out, last = config.out_channels, len(config.levels) - 1
        for level, (side, wide) in reversed(list(enumerate(config.levels))):
            name = f"{side}x{side}"
            if level == last:
                self.dec[f"{name}_in0"] = Block(channels, channels, config, attention=True)
                self.dec[f"{name}_in1"] = Block(channels, channels, config)
            else:
                self.dec[f"{name}_up"] = Block(channels, channels, config, step=1)
            for i in range(config.num_blocks + 1):
                here = side in config.attn_resolutions
                attention = here and (not config.song or i == config.num_blocks)
                c_in = channels + skips.pop()
                self.dec[f"{name}_block{i}"] = Block(c_in, wide, config, attention=attention)
                channels = wide
            if config.song and (config.decoder_type == "skip" or level == 0):
                if level < last and config.decoder_type == "skip":
                    taps = config.resample_filter
                    self.dec[f"{name}_aux_up"] = Resampled(out, out, 0, 1, taps)
                self.dec[f"{name}_aux_norm"] = GroupNorm(channels, 1e-6)
                self.dec[f"{name}_aux_conv"] = Resampled(channels, out, 3)
        if not config.song:
            self.out_norm = GroupNorm(channels, 1e-5)
            self.out_conv = Resampled(channels, out, 3)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of the state."""
        config = self.config
        return config.img_channels, config.img_resolution, config.img_resolution

    def embed(self, level: Tensor, label: Tensor) -> Tensor:
        """What the blocks are told, [b, embedding]."""
        config, emb = self.config, self.map_noise(level.float())
        one_hot = None
        if config.label_dim:
            one_hot = F.one_hot(label, config.label_dim + 1)[:, :-1].to(emb)
        if config.song:
            emb = emb.unflatten(1, (2, -1)).flip(1).flatten(1)  # [sin | cos]
            if one_hot is not None:
                emb = emb + self.map_label(one_hot * math.sqrt(config.label_dim))
            emb = F.silu(self.map_layer0(emb))
            return F.silu(self.map_layer1(emb))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if one_hot is not None:
            emb = emb + self.map_label(one_hot)
        return F.silu(emb)

    def forward(self, x: Tensor, level: Tensor, label: Tensor) -> Tensor:
        emb = self.embed(level, label)
        first = next(iter(self.enc.values()))
        x = x.to(first.weight.dtype)  # type: ignore[union-attr]
        skips: list[Tensor] = []
        aux = x
        for name, block in self.enc.items():
            if "aux_down" in name:
                aux = block(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + block(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + block(aux)) / math.sqrt(2)
            else:
                x = block(x, emb) if isinstance(block, Block) else block(x)
                skips.append(x)
        picture: Tensor | None = None
        for name, block in self.dec.items():
            if "aux_up" in name:
                picture = block(picture)
            elif "aux_norm" in name:
                aux = F.silu(block(x))
            elif "aux_conv" in name:
                picture = block(aux) if picture is None else picture + block(aux)
            else:
                x = block(torch.cat((x, skips.pop()), dim=1) if "_block" in name else x, emb)
        if picture is not None:
            return picture
        return self.out_conv(F.silu(self.out_norm(x)))


def narrow(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network with its convolutions in `dtype`; embeddings stay float32."""
    for name, value in [*net.named_parameters(), *net.named_buffers()]:
        if not any(part in name for part in FLOAT32) and value.is_floating_point():
            value.data = value.data.to(dtype)
    return net
