"""Small files of NVlabs' EDM and EDM2 with random weights, and what their networks must say.

The references go by the names of the weights, in float64, in the plainest form of the mathematics:
they share no code with the package.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.nvlabs import Persistent, write

ORDER = {"enc": 0, "dec": 1}


def persistent(net: nn.Module, class_name: str, arguments: dict[str, Any]) -> Persistent:
    """A module as a snapshot holds it: nested persistent objects, named by their classes."""
    state: dict[str, Any] = {
        "training": False,
        "_parameters": {name: value.data for name, value in net.named_parameters(recurse=False)},
        "_buffers": dict(net.named_buffers(recurse=False)),
        "_modules": {
            name: persistent(child, type(child).__name__, {})
            for name, child in net.named_children()
        },
        "_init_args": (),
        "_init_kwargs": arguments,
    }
    kept = net.state_dict().keys()
    state["_buffers"] = {name: value for name, value in state["_buffers"].items() if name in kept}
    return Persistent(class_name, state)


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of a size that keeps the activations' size."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in net.state_dict().items():
        if name.endswith("resample_filter"):
            continue
        noise = torch.randn(value.shape, generator=generator)
        fan = math.prod(value.shape[1:]) if value.ndim > 1 else 25
        value.copy_(noise / math.sqrt(fan) + (name.split(".")[-2].startswith("norm")))
    return net


def write_edm(
    path: Path, outer: str = "EDMPrecond", seed: int = 0, key: str = "ema", **settings: Any
) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """(the file, the weights in it by name, the settings of its network)."""
    from fewstep.networks.edm import EDMUNet
    from fewstep.networks.edm_config import EDMConfig

    given = {"img_resolution": 8, "img_channels": 3, "model_channels": 8, "channel_mult": [1, 2]}
    given |= {"num_blocks": 1, "attn_resolutions": [4], **settings}
    given.setdefault("model_type", "SongUNet")
    own = {k: v for k, v in given.items() if k in EDMConfig.__dataclass_fields__}
    own: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in own.items()}
    own["out_channels"] = own["img_channels"] * (2 if outer == "iDDPMPrecond" else 1)
    if "resample_filter" in own:
        own["resample_filter"] = tuple(map(float, own["resample_filter"]))
    net = randomise(EDMUNet(EDMConfig(**own)), seed)
    inner = persistent(net, given["model_type"], {})
    whole = Persistent(outer, {"_init_args": (), "_init_kwargs": given, "_parameters": {}})
    whole.state |= {"_buffers": {}, "_modules": {"model": inner}}
    if outer == "iDDPMPrecond":
        whole.state["_buffers"]["u"] = torch.tensor([80.0, 20.0, 5.0, 1.0, 0.1, 0.01, 0.0])
    loss = Persistent("EDMLoss", {"P_mean": -1.2})
    write(path, {key: whole, "loss_fn": loss, "augment_pipe": None, "dataset_kwargs": {}})
    return path, dict(net.state_dict()), own


def write_edm2(
    path: Path, seed: int = 0, encoder: str = "StandardRGBEncoder", **settings: Any
) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The same of EDM2, whose weights are float16."""
    from fewstep.networks.edm2 import EDM2UNet
    from fewstep.networks.edm_config import EDM2Config

    given = {"img_resolution": 8, "img_channels": 3, "model_channels": 8, "channel_mult": [1, 2]}
    given |= {"num_blocks": 1, "attn_resolutions": [4], "channels_per_head": 8}
    given |= {"logvar_channels": 4, **settings}
    own: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    net = randomise(EDM2UNet(EDM2Config(**own)), seed).half()
    whole = persistent(net, "Precond", {**given, "use_fp16": True})
    whole.state["_modules"]["unet"].state["_init_kwargs"] = {}
    coder = Persistent(encoder, {"_init_args": (), "_init_kwargs": {}})
    write(path, {"encoder": coder, "dataset_kwargs": {}, "loss_fn": None, "ema": whole})
    return path, {k: v.float() for k, v in net.state_dict().items()}, own


# -- references ---------------------------------------------------------------------------------


def _filtered(x: Tensor, taps: Tensor, step: int, pad: int) -> Tensor:
    """Zeros between the pixels (up), or every second one (down), after a plain convolution."""
    k = taps.shape[-1]
    kernel = taps.double().reshape(1, 1, k, k).repeat(x.shape[1], 1, 1, 1)
    if step < 0:
        return F.conv2d(F.pad(x, [pad] * 4), kernel, groups=x.shape[1])[:, :, ::2, ::2]
    b, c, h, w = x.shape
    wide = x.new_zeros(b, c, 2 * h - 1, 2 * w - 1)
    wide[:, :, ::2, ::2] = 4 * x
    out = F.conv2d(F.pad(wide, [k - 1 - pad] * 4), kernel.flip(2, 3), groups=c)
    return out


class Reference:
    """The raw network of EDM by its weights, a function of (x, level, one-hot classes)."""

    def __init__(self, weights: dict[str, Tensor], settings: dict[str, Any]) -> None:
        self.w = {name: value.double() for name, value in weights.items()}
        self.s = settings
        self.song = settings["model_type"] == "SongUNet"
        # Dhariwal's resizing has no weights, and its filter is stored like all others
        self.names = {part: self._blocks(part) for part in ("enc", "dec")}

    def _blocks(self, part: str) -> list[str]:
        names = [name.split(".")[1] for name in self.w if name.startswith(f"{part}.")]
        return list(dict.fromkeys(names))

    def conv(self, name: str, x: Tensor, step: int = 0, fused: bool = False) -> Tensor:
        w, bias = self.w.get(f"{name}.weight"), self.w.get(f"{name}.bias")
        taps = self.w.get(f"{name}.resample_filter")
        pad = 0 if taps is None else (taps.shape[-1] - 1) // 2
        if taps is not None and not (fused and step < 0):
            x = _filtered(x, taps, step, pad)
        if w is not None:
            around = w.shape[-1] // 2 + (pad if fused else 0)
            x = F.conv2d(F.pad(x, [around] * 4), w)
            if fused and taps is not None:
                x = _filtered(x, taps, step, 0)
            x = x + bias[None, :, None, None]  # type: ignore[index]
        return x

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        b, c, h, wide = x.shape
        groups = x.reshape(b, min(32, c // 4), -1)
        mean, var = groups.mean(-1, keepdim=True), groups.var(-1, keepdim=True, unbiased=False)
        flat = ((groups - mean) / (var + eps).sqrt()).reshape(b, c, h, wide)
        return (
            flat * self.w[f"{name}.weight"][:, None, None] + self.w[f"{name}.bias"][:, None, None]
        )

    def linear(self, name: str, x: Tensor) -> Tensor:
        out = x @ self.w[f"{name}.weight"].T
        return out + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else out

    def block(self, name: str, x: Tensor, emb: Tensor) -> Tensor:
        step = -1 if name.endswith("_down") else 1 if name.endswith("_up") else 0
        eps, scale = (1e-6, 0.5**0.5) if self.song else (1e-5, 1.0)
        h = self.conv(f"{name}.conv0", F.silu(self.norm(f"{name}.norm0", x, eps)), step)
        told = self.linear(f"{name}.affine", emb)[:, :, None, None]
        if self.song:
            h = self.norm(f"{name}.norm1", h + told, eps)
        else:
            c = h.shape[1]
            h = self.norm(f"{name}.norm1", h, eps) * (1 + told[:, :c]) + told[:, c:]
        h = self.conv(f"{name}.conv1", F.silu(h))
        skip = any(key.startswith(f"{name}.skip.") for key in self.w)
        x = scale * (h + (self.conv(f"{name}.skip", x, step) if skip else x))
        if f"{name}.qkv.weight" not in self.w:
            return x
        rows = self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", x, eps))
        b, c, side, _ = x.shape
        heads = 1 if self.song else c // 64
        rows = rows.reshape(b, heads, c // heads, 3, side * side)
        q, k, v = rows[..., 0, :], rows[..., 1, :], rows[..., 2, :]
        share = torch.einsum("bncq,bnck->bnqk", q, k / math.sqrt(c // heads)).softmax(-1)
        seen = torch.einsum("bnqk,bnck->bncq", share, v).reshape(b, c, side, side)
        return scale * (self.conv(f"{name}.proj", seen) + x)

    def embed(self, level: Tensor, one_hot: Tensor | None) -> Tensor:
        width = self.s["model_channels"] * (self.s.get("channel_mult_noise", 1))
        if (freqs := self.w.get("map_noise.freqs")) is not None:
            angles = torch.outer(level, 2 * math.pi * freqs)
        else:
            half = width // 2
            k = torch.arange(half, dtype=torch.float32) / (half - self.song)
            angles = torch.outer(level, ((1 / 10_000) ** k).double())
        cos, sin = angles.cos(), angles.sin()
        emb = torch.cat((sin, cos) if self.song else (cos, sin), dim=1)
        if "map_label.weight" not in self.w:
            one_hot = None
        if self.song and one_hot is not None:
            emb = emb + self.linear("map_label", one_hot * math.sqrt(one_hot.shape[1]))
        emb = self.linear("map_layer1", F.silu(self.linear("map_layer0", emb)))
        if not self.song and one_hot is not None:
            emb = emb + self.linear("map_label", one_hot)
        return F.silu(emb)

    def __call__(self, x: Tensor, level: Tensor, one_hot: Tensor | None = None) -> Tensor:
        emb, aux, skips = self.embed(level, one_hot), x, []
        for name in self.names["enc"]:
            if "_aux_down" in name:
                aux = self.conv(f"enc.{name}", aux, -1)
            elif "_aux_skip" in name:
                x = skips[-1] = x + self.conv(f"enc.{name}", aux)
            elif "_aux_residual" in name:
                x = (x + self.conv(f"enc.{name}", aux, -1, fused=True)) / math.sqrt(2)
                skips[-1] = aux = x
            else:
                plain = name.endswith("_conv")
                x = self.conv(f"enc.{name}", x) if plain else self.block(f"enc.{name}", x, emb)
                skips.append(x)
        picture: Any = 0
        for name in self.names["dec"]:
            if "_aux_up" in name:
                picture = self.conv(f"dec.{name}", picture, 1)
            elif "_aux_norm" in name:
                last = F.silu(self.norm(f"dec.{name}", x, 1e-6))
            elif "_aux_conv" in name:
                picture = picture + self.conv(f"dec.{name}", last)
            else:
                if x.shape[1] != self.w[f"dec.{name}.norm0.weight"].numel():
                    x = torch.cat((x, skips.pop()), dim=1)
                x = self.block(f"dec.{name}", x, emb)
        if self.song:
            return picture
        return self.conv("out_conv", F.silu(self.norm("out_norm", x, 1e-5)))
