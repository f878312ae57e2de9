"""Small files of the ADM family, written from the published layout, and their network once more.

`tensors` writes a state dict under the published names, every parameter random; `forward` computes
the network from it by functional calls, with the published order of the attention's rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = 32


class Writer:
    """Random parameters by name."""

    def __init__(self, seed: int) -> None:
        self.gen = torch.Generator().manual_seed(seed)
        self.found: dict[str, Tensor] = {}

    def layer(self, name: str, *shape: int, bias: bool = True) -> None:
        fan = math.prod(shape[1:])
        self.found[f"{name}.weight"] = torch.randn(shape, generator=self.gen) / fan**0.5
        if bias:
            self.found[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=self.gen)

    def norm(self, name: str, channels: int) -> None:
        self.found[f"{name}.weight"] = 1 + 0.2 * torch.randn(channels, generator=self.gen)
        self.found[f"{name}.bias"] = 0.2 * torch.randn(channels, generator=self.gen)


def _block(out: Writer, name: str, c_in: int, c_out: int, emb: int, film: bool) -> None:
    out.norm(f"{name}.in_layers.0", c_in)
    out.layer(f"{name}.in_layers.2", c_out, c_in, 3, 3)
    out.layer(f"{name}.emb_layers.1", 2 * c_out if film else c_out, emb)
    out.norm(f"{name}.out_layers.0", c_out)
    out.layer(f"{name}.out_layers.3", c_out, c_out, 3, 3)
    if c_in != c_out:
        out.layer(f"{name}.skip_connection", c_out, c_in, 1, 1)


def _attention(out: Writer, name: str, c: int, s: dict[str, Any]) -> None:
    out.norm(f"{name}.norm", c)
    if context := s.get("context_dim"):
        out.layer(f"{name}.proj_in", c, c, 1, 1)
        inner = f"{name}.transformer_blocks.0"
        for part, width in (("attn1", c), ("attn2", context)):
            out.layer(f"{inner}.{part}.to_q", c, c, bias=False)
            out.layer(f"{inner}.{part}.to_k", c, width, bias=False)
            out.layer(f"{inner}.{part}.to_v", c, width, bias=False)
            out.layer(f"{inner}.{part}.to_out.0", c, c)
        out.layer(f"{inner}.ff.net.0.proj", 8 * c, c)
        out.layer(f"{inner}.ff.net.2", c, 4 * c)
        for i in (1, 2, 3):
            out.norm(f"{inner}.norm{i}", c)
        out.layer(f"{name}.proj_out", c, c, 1, 1)
        return
    ones = (1, 1) if s.get("four_dimensions") else (1,)
    out.layer(f"{name}.qkv", 3 * c, c, *ones)
    out.layer(f"{name}.proj_out", c, c, *ones)


def tensors(s: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """A state dict. s: num_channels, channel_mult, num_res_blocks, attention (levels), and where
    they are not the usual ones num_classes, use_scale_shift_norm, resblock_updown, outputs,
    context_dim, four_dimensions, pooled (a classifier, of so many classes), image_size."""
    out, base, mult = Writer(seed), s["num_channels"], s["channel_mult"]
    widths = [int(m * base) for m in mult]
    emb, film = 4 * base, s.get("use_scale_shift_norm", True)
    inside, blocks = s.get("resblock_updown", True), s["num_res_blocks"]
    channels = s.get("in_channels", 3)
    out.layer("time_embed.0", emb, base)
    out.layer("time_embed.2", emb, emb)
    if s.get("num_classes"):
        out.found["label_emb.weight"] = torch.randn(s["num_classes"], emb, generator=out.gen)
    out.layer("input_blocks.0.0", widths[0], channels, 3, 3)
    i, c, skips = 1, widths[0], [widths[0]]
    for level, width in enumerate(widths):
        for _ in range(blocks):
            _block(out, f"input_blocks.{i}.0", c, width, emb, film)
            if level in s["attention"]:
                _attention(out, f"input_blocks.{i}.1", width, s)
            i, c = i + 1, width
            skips.append(c)
        if level < len(widths) - 1:
            if inside:
                _block(out, f"input_blocks.{i}.0", c, c, emb, film)
            else:
                out.layer(f"input_blocks.{i}.0.op", c, c, 3, 3)
            i += 1
            skips.append(c)
    _block(out, "middle_block.0", c, c, emb, film)
    _attention(out, "middle_block.1", c, s)
    _block(out, "middle_block.2", c, c, emb, film)
    if pooled := s.get("pooled"):
        out.norm("out.0", c)
        places = (s["image_size"] // 2 ** (len(widths) - 1)) ** 2 + 1
        out.found["out.2.positional_embedding"] = torch.randn(c, places, generator=out.gen)
        out.layer("out.2.qkv_proj", 3 * c, c, 1)
        out.layer("out.2.c_proj", pooled, c, 1)
        return out.found
    j = 0
    for level, width in reversed(list(enumerate(widths))):
        for k in range(blocks + 1):
            _block(out, f"output_blocks.{j}.0", c + skips.pop(), width, emb, film)
            c, last = width, 1
            if level in s["attention"]:
                _attention(out, f"output_blocks.{j}.1", width, s)
                last = 2
            if level and k == blocks:
                if inside:
                    _block(out, f"output_blocks.{j}.{last}", c, c, emb, film)
                else:
                    out.layer(f"output_blocks.{j}.{last}.conv", c, c, 3, 3)
            j += 1
    out.norm("out.0", c)
    out.layer("out.2", s.get("outputs", 3), c, 3, 3)
    return out.found


def _convolve(w: dict[str, Tensor], name: str, x: Tensor, **more: Any) -> Tensor:
    weight = w[f"{name}.weight"]
    more = more or {"padding": weight.shape[-1] // 2}
    return F.conv2d(x, weight, w[f"{name}.bias"], **more)


def _group(w: dict[str, Tensor], name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return F.group_norm(x, GROUPS, w[f"{name}.weight"], w[f"{name}.bias"], eps)


def _residual(w: Any, name: str, x: Tensor, emb: Tensor, film: bool, resize: Any = None) -> Tensor:
    h = F.silu(_group(w, f"{name}.in_layers.0", x))
    if resize is not None:
        h, x = resize(h), resize(x)
    h = _convolve(w, f"{name}.in_layers.2", h)
    told = F.linear(F.silu(emb), w[f"{name}.emb_layers.1.weight"], w[f"{name}.emb_layers.1.bias"])
    told = told[:, :, None, None]
    if film:
        scale, shift = told.chunk(2, dim=1)
        h = _group(w, f"{name}.out_layers.0", h) * (1 + scale) + shift
    else:
        h = _group(w, f"{name}.out_layers.0", h + told)
    h = _convolve(w, f"{name}.out_layers.3", F.silu(h))
    skip = f"{name}.skip_connection"
    return h + (_convolve(w, skip, x) if f"{skip}.weight" in w else x)


def _attend(w: Any, name: str, x: Tensor, width: int, legacy: bool) -> Tensor:
    """Attention with the rows of qkv in the published order, written out."""
    b, c, height, across = x.shape
    h = _group(w, f"{name}.norm", x).flatten(2)
    weight = w[f"{name}.qkv.weight"].flatten(1)
    qkv = weight @ h + w[f"{name}.qkv.bias"][:, None]
    rows = []
    for head in range(c // width):
        if legacy:
            part = qkv[:, 3 * width * head : 3 * width * (head + 1)]
            q, k, v = part[:, :width], part[:, width : 2 * width], part[:, 2 * width :]
        else:
            span = slice(width * head, width * (head + 1))
            q, k, v = (qkv[:, i * c : (i + 1) * c][:, span] for i in range(3))
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / width**0.5, dim=-1)
        rows.append(torch.einsum("bts,bcs->bct", weights, v))
    out = w[f"{name}.proj_out.weight"].flatten(1) @ torch.cat(rows, 1)
    out = out + w[f"{name}.proj_out.bias"][:, None]
    return x + out.reshape(b, c, height, across)


def embedding(t: Tensor, width: int) -> Tensor:
    half = width // 2
    freqs = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32) / half)
    angles = t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def forward(
    w: dict[str, Tensor], s: dict[str, Any], x: Tensor, t: Tensor, label: Tensor | None = None
) -> Tensor:
    """The raw output. s: as for `tensors`, with head_width and legacy."""
    film, inside = s.get("use_scale_shift_norm", True), s.get("resblock_updown", True)
    legacy, width, levels = s["legacy"], s["head_width"], len(s["channel_mult"])
    emb = embedding(t, s["num_channels"]).to(w["time_embed.0.weight"])
    emb = F.linear(emb, w["time_embed.0.weight"], w["time_embed.0.bias"])
    emb = F.linear(F.silu(emb), w["time_embed.2.weight"], w["time_embed.2.bias"])
    if label is not None:
        emb = emb + w["label_emb.weight"][label]
    h = _convolve(w, "input_blocks.0.0", x)
    skips, i = [h], 1
    for level in range(levels):
        for _ in range(s["num_res_blocks"]):
            h = _residual(w, f"input_blocks.{i}.0", h, emb, film)
            if level in s["attention"]:
                h = _attend(w, f"input_blocks.{i}.1", h, width, legacy)
            skips.append(h)
            i += 1
        if level < levels - 1:
            if inside:
                h = _residual(w, f"input_blocks.{i}.0", h, emb, film, lambda y: F.avg_pool2d(y, 2))
            else:
                h = _convolve(w, f"input_blocks.{i}.0.op", h, stride=2, padding=1)
            skips.append(h)
            i += 1
    h = _residual(w, "middle_block.0", h, emb, film)
    h = _attend(w, "middle_block.1", h, width, legacy)
    h = _residual(w, "middle_block.2", h, emb, film)
    if s.get("pooled"):
        return _pool(w, F.silu(_group(w, "out.0", h)), width)

    def twice(y: Tensor) -> Tensor:
        return y.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    j = 0
    for level in reversed(range(levels)):
        for k in range(s["num_res_blocks"] + 1):
            h = _residual(w, f"output_blocks.{j}.0", torch.cat([h, skips.pop()], 1), emb, film)
            last = 1
            if level in s["attention"]:
                h = _attend(w, f"output_blocks.{j}.1", h, width, legacy)
                last = 2
            if level and k == s["num_res_blocks"]:
                name = f"output_blocks.{j}.{last}"
                h = (
                    _residual(w, name, h, emb, film, twice)
                    if inside
                    else _convolve(w, f"{name}.conv", twice(h))
                )
            j += 1
    return _convolve(w, "out.2", F.silu(_group(w, "out.0", h)))


def _pool(w: dict[str, Tensor], h: Tensor, width: int) -> Tensor:
    h = h.flatten(2)
    h = torch.cat([h.mean(-1, keepdim=True), h], -1) + w["out.2.positional_embedding"]
    qkv = w["out.2.qkv_proj.weight"].flatten(1) @ h + w["out.2.qkv_proj.bias"][:, None]
    q, k, v = qkv.chunk(3, dim=1)
    rows = []
    for head in range(q.shape[1] // width):
        span = slice(width * head, width * (head + 1))
        scores = torch.einsum("bct,bcs->bts", q[:, span], k[:, span]) / width**0.5
        rows.append(torch.einsum("bts,bcs->bct", torch.softmax(scores, -1), v[:, span]))
    out = w["out.2.c_proj.weight"].flatten(1) @ torch.cat(rows, 1)
    return (out + w["out.2.c_proj.bias"][:, None])[:, :, 0]
