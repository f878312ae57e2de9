"""The ADM U-Net: guided-diffusion, consistency models and latent diffusion are settings of it.

    level l has widths[l] channels and `blocks` residual blocks, then is halved (but the last)
    the decoder has blocks + 1 per level, each after concatenation with one skip
    attention at the levels of `attention`, after each block there, and always in the middle

Switches: the embedding scales and shifts the second norm (scale_shift) or is added before it; maps
are halved and doubled inside a residual block (resample_blocks) or by a convolution; classes are
embedded with the time (classes), or a context is attended to (context, depth), as in the spatial
transformers of latent diffusion. The parameters carry the names of the published files. Attention
keeps its rows as [q | k | v], each head after head: readers put other orders in this one.

In float16 and bfloat16 the convolutions and attentions are cast; norms, embeddings and the last
layer stay float32, as in the published runs.

Sources: Dhariwal and Nichol 2021 (ADM), arXiv:2105.05233; Song et al. 2023, arXiv:2303.01469;
Rombach et al. 2022 (latent diffusion), arXiv:2112.10752.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.networks.adm_config import GROUPS, ADMConfig

__all__ = ["ADM", "AttentionPool", "Encoder", "Norm", "cast_torso"]


class Norm(nn.GroupNorm):
    """32 groups, in float32 whatever the input is."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(GROUPS, channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return F.group_norm(x, GROUPS, self.weight, self.bias, self.eps)
        wide = x.to(self.weight.dtype)
        return F.group_norm(wide, GROUPS, self.weight, self.bias, self.eps).to(x.dtype)


class Layer(nn.Module):
    """One layer of a stage; what it does not need of (x, embedding, context) it ignores."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        raise NotImplementedError


class Stage(nn.Sequential):
    """Layers after each other."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        for layer in self:
            x = layer(x, emb, context)
        return x


class First(nn.Conv2d):
    """The convolution that opens the encoder."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, width, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        return super().forward(x)


class Down(Layer):
    """Halves a map by a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        return self.op(x)


class Up(Layer):
    """Doubles a map by repetition and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        return self.conv(_doubled(x))


class Block(Layer):
    """Residual block; resize "down" or "up" resizes both branches before the first convolution."""

    def __init__(
        self, c_in: int, c_out: int, emb: int, scale_shift: bool, resize: str = ""
    ) -> None:
        super().__init__()
        rows = 2 * c_out if scale_shift else c_out
        self.scale_shift = scale_shift
        self.resize = {"": nn.Identity(), "down": nn.AvgPool2d(2), "up": _Doubled()}[resize]
        conv = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.in_layers = nn.Sequential(Norm(c_in), nn.SiLU(), conv)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, rows))
        last = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.out_layers = nn.Sequential(Norm(c_out), nn.SiLU(), nn.Identity(), last)
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        norm, _, conv = self.in_layers
        h = conv(self.resize(F.silu(norm(x))))
        norm, _, _, conv = self.out_layers
        told = self.emb_layers[1](emb).to(h.dtype)[:, :, None, None]  # emb has had its SiLU
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = torch.addcmul(shift, norm(h), 1 + scale)
        else:
            h = norm(h + told)
        return self.skip_connection(self.resize(x)) + conv(F.silu(h))


class _Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _doubled(x)


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Attention(Layer):
    """Self-attention over the pixels of a map; rows of qkv are [q | k | v], head after head."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = Norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [b, pixels, c]
        b, n, c = tokens.shape
        qkv = self.qkv(tokens).view(b, n, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each [b, heads, pixels, c / heads]
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        return x + self.proj_out(h).transpose(1, 2).reshape(x.shape)


class CrossAttention(nn.Module):
    """Attention of tokens [b, n, c] to a context [b, m, d], or to themselves."""

    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:  # [b, heads, tokens, c / heads]
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.to_q(x)), split(self.to_k(context)), split(self.to_v(context))
        h = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(h.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention to itself, attention to the context, and a gated layer, each on a norm."""

    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, heads)
        self.attn2 = CrossAttention(channels, context, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        gated = nn.ModuleDict({"proj": nn.Linear(channels, 8 * channels)})
        self.ff = nn.ModuleDict(
            {"net": nn.ModuleList([gated, nn.Identity(), nn.Linear(4 * channels, channels)])}
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = _wide(self.norm1, x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(_wide(self.norm2, x), context)
        layers: nn.ModuleList = self.ff["net"]  # type: ignore[assignment]
        value, gate = layers[0]["proj"](_wide(self.norm3, x)).chunk(2, dim=-1)  # type: ignore[index]
        return x + layers[2](value * F.gelu(gate))


class Transformer(Layer):
    """Spatial transformer: the pixels of a map attend to each other and to the context."""

    def __init__(self, channels: int, context: int, heads: int, depth: int) -> None:
        super().__init__()
        self.norm = Norm(channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context, heads) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        assert context is not None
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            tokens = block(tokens, context.to(tokens.dtype))
        return x + self.proj_out(tokens).transpose(1, 2).reshape(x.shape)


def _wide(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return norm(x.to(norm.weight.dtype)).to(x.dtype)


class ADM(nn.Module):
    """The raw network.

    forward(x, t, label=None, context=None):

    x: [b, c, h, w], cast to the torso's dtype
    t: the time that the network is told, [b], any real number
    label: rows of the class embedding, or of the table of contexts, [b], where there are any
    context: [b, m, d], where there is one; in place of a row of that table

    Returns float32 [b, outputs, h, w]. The output of `middle_block` is that of the lowest level.
    """

    def __init__(self, config: ADMConfig) -> None:
        super().__init__()
        self.config = config
        emb = 4 * config.width
        # the torso first: the dtype of the first parameter is that of the network's arithmetic
        self.input_blocks, skips = _encoder(config, emb)
        self.middle_block = _middle(config, emb)
        self.output_blocks = _decoder(config, emb, skips)
        self.time_embed = nn.Sequential(
            nn.Linear(config.width, emb), nn.SiLU(), nn.Linear(emb, emb)
        )
        if config.classes:
            self.label_emb = nn.Embedding(config.classes, emb)
        if config.context_rows:
            self.contexts = nn.Embedding(config.context_rows, config.context)
        head = nn.Conv2d(config.widths[0], config.outputs, 3, padding=1)
        self.out = nn.Sequential(Norm(config.widths[0]), nn.SiLU(), head)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of the state."""
        return self.config.channels, self.config.size, self.config.size

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        emb = self.time_embed(time_waves(t, self.config.width))
        if self.config.classes:
            emb = emb + self.label_emb(label)
        if self.config.context_rows and context is None:
            context = self.contexts(label)[:, None]  # [b, 1, d]
        emb = F.silu(emb)
        h = x.to(next(self.input_blocks.parameters()).dtype)
        skips = []
        for stage in self.input_blocks:
            h = stage(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for stage in self.output_blocks:
            h = stage(torch.cat((h, skips.pop()), dim=1), emb, context)
        return self.out(h.float())


def time_waves(t: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of t exp(-ln 10000 k / half), k < half, float32 [b, width]."""
    half = width // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * k / half)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def cast_torso(net: nn.Module, dtype: torch.dtype) -> None:
    """Cast the convolutions and attentions of the torso, and nothing else, in place."""
    for name in ("input_blocks", "middle_block", "output_blocks"):
        torso = getattr(net, name, None)
        for inner, module in torso.named_modules() if torso is not None else ():
            if isinstance(module, nn.Conv2d | nn.Linear) and "emb_layers" not in inner:
                module.to(dtype)


def _attends(config: ADMConfig, channels: int) -> Layer:
    heads = config.heads_of(channels)
    if config.context:
        return Transformer(channels, config.context, heads, config.depth)
    return Attention(channels, heads)


def _level(config: ADMConfig, level: int, c_in: int, emb: int) -> Iterator[Layer]:
    """A residual block of a level and its attention, if any."""
    width = config.widths[level]
    yield Block(c_in, width, emb, config.scale_shift)
    if level in config.attention:
        yield _attends(config, width)


def _encoder(config: ADMConfig, emb: int) -> tuple[nn.ModuleList, list[int]]:
    """The stages, and the channels of their outputs, which become the skips."""
    c = config.widths[0]
    stages, skips = [Stage(First(config.channels, c))], [c]
    for level, width in enumerate(config.widths):
        for _ in range(config.blocks):
            stages.append(Stage(*_level(config, level, c, emb)))
            c = width
            skips.append(c)
        if level < len(config.widths) - 1:
            in_block = config.resample_blocks
            down = Block(c, c, emb, config.scale_shift, "down") if in_block else Down(c)
            stages.append(Stage(down))
            skips.append(c)
    return nn.ModuleList(stages), skips


def _middle(config: ADMConfig, emb: int) -> Stage:
    c = config.widths[-1]
    blocks = [Block(c, c, emb, config.scale_shift) for _ in range(2)]
    return Stage(blocks[0], _attends(config, c), blocks[1])


def _decoder(config: ADMConfig, emb: int, skips: Iterable[int]) -> nn.ModuleList:
    rest, c, stages = list(skips), config.widths[-1], []
    for level, width in reversed(list(enumerate(config.widths))):
        for i in range(config.blocks + 1):
            layers = list(_level(config, level, c + rest.pop(), emb))
            c = width
            if level and i == config.blocks:
                in_block = config.resample_blocks
                layers.append(Block(c, c, emb, config.scale_shift, "up") if in_block else Up(c))
            stages.append(Stage(*layers))
    return nn.ModuleList(stages)


class AttentionPool(nn.Module):
    """One vector of a map: what a token of the mean attends to (Radford et al. 2021)."""

    def __init__(self, pixels: int, channels: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.zeros(channels, pixels + 1))
        self.qkv_proj = nn.Linear(channels, 3 * channels)
        self.c_proj = nn.Linear(channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)  # [b, c, pixels]
        x = torch.cat((x.mean(dim=-1, keepdim=True), x), dim=-1) + self.positional_embedding
        qkv = self.qkv_proj(x.transpose(1, 2)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        first = F.scaled_dot_product_attention(q[:, :, :1], k, v)  # [b, heads, 1, d]
        return self.c_proj(first.flatten(1))


class Encoder(nn.Module):
    """The encoder half with an attention pool: the noisy classifier of guided diffusion.

    forward(x, t) -> logits, float32 [b, config.outputs]; x in network units, alpha_t (x_0 + ...)
    """

    def __init__(self, config: ADMConfig) -> None:
        super().__init__()
        self.config = config
        emb, last = 4 * config.width, config.widths[-1]
        self.input_blocks, _ = _encoder(config, emb)
        self.middle_block = _middle(config, emb)
        self.time_embed = nn.Sequential(
            nn.Linear(config.width, emb), nn.SiLU(), nn.Linear(emb, emb)
        )
        side = config.size // 2 ** (len(config.widths) - 1)
        pool = AttentionPool(side**2, last, config.heads_of(last), config.outputs)
        self.out = nn.Sequential(Norm(last), nn.SiLU(), pool)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = F.silu(self.time_embed(time_waves(t, self.config.width)))
        h = x.to(next(self.input_blocks.parameters()).dtype)
        for stage in self.input_blocks:
            h = stage(h, emb)
        return self.out(self.middle_block(h, emb).float())
