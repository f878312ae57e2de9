"""The magnitude-preserving U-Net of EDM2.

Activations keep their size by construction, so there are no norms and no biases:

    weight     each output row divided by 1e-4 + its rms, and by sqrt(fan in); at inference too
    silu       divided by 0.596, its rms on a standard normal
    sum        lerp(a, b, t) / sqrt((1 - t)^2 + t^2); t = 0.3 for residuals and attention
    concat     both parts scaled so that each has its share of the magnitude
    embedding  sqrt(2) cos(x freqs + phases), of stored random numbers
    input      one channel of ones besides

Encoder blocks start with their shortcut and a norm over channels; decoder blocks have it at their
sum. Activations are held in [-256, 256]. Parameters have the names of the published files, where
they are float16; a gain is divided by sqrt(fan in) in the type that it is stored in.

Source: Karras et al. 2024 (EDM2), arXiv:2312.02696, configuration G.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.networks.edm_config import EDM2Config
from fewstep.networks.maps import double, grid_of, halve, is_box, pointwise

__all__ = ["EDM2UNet"]

EPS = 1e-4
SILU = 0.596


def size(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """1e-4 + rms over some dimensions, which stay as 1; float32."""
    count = math.prod(x.shape[dim] for dim in dims)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    return torch.add(EPS, norm, alpha=1 / math.sqrt(count))


def normalize(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x divided by its size over some dimensions."""
    return x / size(x, dims).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """SiLU that keeps the magnitude."""
    return F.silu(x) / SILU


def mix(a: Tensor, b: Tensor, t: float) -> Tensor:
    """A sum that keeps the magnitude, t the share of b."""
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def concat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """A concatenation in which b has the share t of the magnitude."""
    c_a, c_b = a.shape[1], b.shape[1]
    scale = math.sqrt((c_a + c_b) / ((1 - t) ** 2 + t**2))
    return torch.cat(
        (a * (scale / math.sqrt(c_a) * (1 - t)), b * (scale / math.sqrt(c_b) * t)), dim=1
    )


class Conv(nn.Module):
    """A convolution or, with kernel (), a matrix, of normalised rows.

    sizes: of the rows, once the weight is divided by them and by sqrt(fan in) for good
    """

    sizes: Tensor | None

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c_out, c_in, *kernel))
        self.register_buffer("sizes", None, persistent=False)

    @property
    def ready(self) -> bool:
        """Whether the weight is as inference wants it."""
        return self.sizes is not None

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        w = self.weight
        if not self.ready:
            w = normalize(w.float(), tuple(range(1, w.ndim)))
            scale = math.sqrt(w[0].numel())
            w = w / scale if gain is None else w * (gain / scale)
        elif gain is not None:
            w = w * gain
        w = w.to(x.dtype)
        if w.ndim == 2:
            return x @ w.T
        side = w.shape[-1]
        return F.conv2d(x, w, padding=side // 2) if side > 1 else pointwise(x, w, None)

    def prepare(self, dtype: torch.dtype) -> None:
        """Normalise the weight once, for inference; matrices stay float32."""
        w = self.weight.data.float()
        self.sizes = size(w, tuple(range(1, w.ndim)))
        w = (w / self.sizes).div_(math.sqrt(w[0].numel()))
        self.weight.data = w if w.ndim == 2 else w.to(dtype)

    def restore(self) -> None:
        """Take back what `prepare` did: x / (1e-4 + rms) twice is not the same as once."""
        if self.sizes is not None:
            w = self.weight.data.float()
            self.weight.data, self.sizes = w * math.sqrt(w[0].numel()) * self.sizes, None


class Fourier(nn.Module):
    """sqrt(2) cos(x freqs + phases), [b, channels]."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.empty(channels))
        self.register_buffer("phases", torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        angles = x.float()[:, None] * self.freqs.float() + self.phases.float()
        return (angles.cos() * math.sqrt(2)).to(x.dtype)


class Block(nn.Module):
    """A residual block, with attention where heads > 0.

    step: 1 doubles the map first, -1 halves it
    encoder: where the shortcut and the norm over channels are
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        config: EDM2Config,
        encoder: bool,
        step: int = 0,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.out_channels, self.encoder, self.step = c_out, encoder, step
        with torch.device("cpu"):  # even where the weights are built on the meta device
            taps = grid_of(config.resample_filter)
        self.taps: Tensor
        self.register_buffer("taps", taps, persistent=False)
        self.box = is_box(config.resample_filter)
        self.res, self.attn, self.clip = config.res_balance, config.attn_balance, config.clip_act
        self.heads = c_out // config.channels_per_head if attention else 0
        self.emb_gain = nn.Parameter(torch.empty(()))
        self.conv_res0 = Conv(c_out if encoder else c_in, c_out, (3, 3))
        self.emb_linear = Conv(config.embedding, c_out, ())
        self.conv_res1 = Conv(c_out, c_out, (3, 3))
        self.conv_skip = Conv(c_in, c_out, (1, 1)) if c_in != c_out else None
        if self.heads:
            self.attn_qkv = Conv(c_out, 3 * c_out, (1, 1))
            self.attn_proj = Conv(c_out, c_out, (1, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.step:
            resize = double if self.step > 0 else halve
            x = resize(x, self.taps, (self.taps.shape[-1] - 1) // 2, self.box)
        if self.encoder:
            x = x if self.conv_skip is None else self.conv_skip(x)
            x = normalize(x, (1,))
        h = self.conv_res0(silu(x))
        told = self.emb_linear(emb, gain=self.emb_gain) + 1
        h = silu(h * told[:, :, None, None].to(h.dtype))
        h = self.conv_res1(h)
        if not self.encoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mix(x, h, self.res)
        if self.heads:
            x = mix(x, self.attn_proj(self._attend(self.attn_qkv(x))), self.attn)
        return x.clamp(-self.clip, self.clip) if self.clip else x

    def _attend(self, rows: Tensor) -> Tensor:
        b, c, height, width = rows.shape
        parts = rows.reshape(b, self.heads, c // (3 * self.heads), 3, height * width)
        q, k, v = normalize(parts, (2,)).permute(3, 0, 1, 4, 2).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(2, 3).reshape(b, c // 3, height, width)


class UNet(nn.Module):
    """The network without the part that only training used; see `EDM2UNet`."""

    def __init__(self, config: EDM2Config) -> None:
        super().__init__()
        self.out_gain = nn.Parameter(torch.empty(()))
        self.emb_fourier = Fourier(config.noise)
        self.emb_noise = Conv(config.noise, config.embedding, ())
        if config.label_dim:
            self.emb_label = Conv(config.label_dim, config.embedding, ())
        channels, skips, levels = config.img_channels + 1, [], config.levels
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        for level, (side, wide) in enumerate(levels):
            if level:
                self.enc[f"{side}x{side}_down"] = Block(channels, channels, config, True, step=-1)
            else:
                self.enc[f"{side}x{side}_conv"] = Conv(channels, wide, (3, 3))
                channels = wide
            skips.append(channels)
            for i in range(config.num_blocks):
                here = side in config.attn_resolutions
                self.enc[f"{side}x{side}_block{i}"] = Block(
                    channels, wide, config, True, attention=here
                )
                channels = wide
                skips.append(channels)
        for level, (side, wide) in reversed(list(enumerate(levels))):
            name = f"{side}x{side}"
            if level == len(levels) - 1:
                self.dec[f"{name}_in0"] = Block(channels, channels, config, False, attention=True)
                self.dec[f"{name}_in1"] = Block(channels, channels, config, False)
            else:
                self.dec[f"{name}_up"] = Block(channels, channels, config, False, step=1)
            for i in range(config.num_blocks + 1):
                here = side in config.attn_resolutions
                self.dec[f"{name}_block{i}"] = Block(
                    channels + skips.pop(), wide, config, False, attention=here
                )
                channels = wide
        self.out_conv = Conv(channels, config.img_channels, (3, 3))
        self.label_balance, self.concat_balance = config.label_balance, config.concat_balance
        self.label_dim = config.label_dim

    def forward(self, x: Tensor, level: Tensor, label: Tensor) -> Tensor:
        emb = self.emb_noise(self.emb_fourier(level.float()))
        if self.label_dim:
            one_hot = F.one_hot(label, self.label_dim + 1)[:, :-1].to(emb)
            told = self.emb_label(one_hot * math.sqrt(self.label_dim))
            emb = mix(emb, told, self.label_balance)
        emb = silu(emb)
        first = next(iter(self.enc.values()))
        x = x.to(first.weight.dtype) if first.ready else x  # type: ignore[union-attr, arg-type]
        x = torch.cat((x, torch.ones_like(x[:, :1])), dim=1)
        skips: list[Tensor] = []
        for name, block in self.enc.items():
            x = block(x) if "conv" in name else block(x, emb)
            skips.append(x)
        for name, block in self.dec.items():
            if "block" in name:
                x = concat(x, skips.pop(), self.concat_balance)
            x = block(x, emb)
        return self.out_conv(x, gain=self.out_gain)


class EDM2UNet(nn.Module):
    """The raw network F of a configuration, with what the published files have beside it.

    forward: (x [b, c, h, w], log(sigma) / 4 [b], label [b]) -> raw output; label is a class's
    index, or label_dim for none
    """

    def __init__(self, config: EDM2Config) -> None:
        super().__init__()
        self.config = config
        self.unet = UNet(config)
        self.logvar_fourier = Fourier(config.logvar_channels)
        self.logvar_linear = Conv(config.logvar_channels, 1, ())

    def prepare(self, dtype: torch.dtype) -> EDM2UNet:
        """Ready the weights for inference in `dtype`, in place; embeddings stay float32."""
        for module in self.modules():
            if isinstance(module, Conv):
                module.prepare(dtype)
        return self

    def restore(self) -> EDM2UNet:
        """Weights that can be trained and stored, in place."""
        for module in self.modules():
            if isinstance(module, Conv):
                module.restore()
        return self

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of the state."""
        config = self.config
        return config.img_channels, config.img_resolution, config.img_resolution

    def forward(self, x: Tensor, level: Tensor, label: Tensor) -> Tensor:
        return self.unet(x, level, label)

    def log_variance(self, level: Tensor) -> Tensor:
        """The uncertainty that training weighed a level by, [b]."""
        return self.logvar_linear(self.logvar_fourier(level.float())).flatten()
