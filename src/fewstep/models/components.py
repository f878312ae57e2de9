"""The components of a pipeline of diffusers, as fewstep calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.models.families import Condition
from fewstep.models.texts import on_leaves
from fewstep.networks.conditioning import guidance_embedding as embedding_of
from fewstep.networks.taps import as_map, hear

__all__ = [
    "Network",
    "Tapped",
    "device_of",
    "dtype_of",
    "guidance_embedding",
    "latent_scale",
    "pixels_per_latent",
    "quiet",
    "roomy",
    "sample_sides",
    "told_guidance",
]


@dataclass(frozen=True, eq=False)
class Network:
    """(x_t, t, condition) -> prediction, of a network of diffusers.

    forward: the network, compiled or not

    A network that also predicts a variance has twice the channels; the first half is meant.
    """

    forward: Callable[..., Any]

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        rows = _rows(condition, x_t.shape[0])
        out = self.forward(x_t, timestep=t, return_dict=False, **rows)[0]
        return out[:, : x_t.shape[1]]


@dataclass(frozen=True, eq=False)
class Tapped:
    """A Network with features: what one of its modules returns, [b, c, h, w].

    net: the network itself, not compiled
    module: the dotted name of that module; tokens come back on their grid, `patch` pixels a token
    """

    inner: Network
    net: Any
    module: str
    patch: int = 1

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.inner(x_t, t, condition)

    def with_features(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        plain = Network(self.net)
        out, features = hear(self.net, self.module, lambda: plain(x_t, t, condition))
        return out, as_map(features, tuple(x_t.shape[2:]), self.patch)


def _rows(condition: Condition, count: int) -> Condition:
    """The condition with one row for each of `count` samples."""

    def rows(leaf: Tensor) -> Tensor:
        if leaf.shape[0] not in (1, count):
            raise ValueError(f"{leaf.shape[0]} prompts do not go with {count} pictures")
        return leaf.expand(count, *leaf.shape[1:])

    return on_leaves(rows, condition)


def guidance_embedding(net: Any, index: Tensor) -> Condition:
    """The condition of a network that is told a number (LCM and its like), [b, k].

    index: guidance - 1, or 10 - 10 gamma; [b]
    """
    told = embedding_of(index, net.config.time_cond_proj_dim)
    return {"timestep_cond": told.to(dtype_of(net))}


def told_guidance(net: Any) -> bool:
    """Whether the network takes the guidance scale as an input."""
    return net.config.get("time_cond_proj_dim") is not None


def sample_sides(net: Any) -> tuple[int, int]:
    """Height and width on which the network was trained, in its own pixels."""
    size = net.config.sample_size
    if size is None:
        raise ValueError(
            "the network's config has no sample_size; load with size=(height, width) in pixels"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def pixels_per_latent(vae: Any) -> int:
    """Pixels to a side of one latent; 1 where there is no autoencoder."""
    return 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)


def latent_scale(vae: Any) -> tuple[Any, Any]:
    """(factor, shift): the network sees (latent - shift) * factor."""
    factor, shift = float(vae.config.scaling_factor), vae.config.get("shift_factor") or 0.0
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return factor, float(shift)
    device = device_of(vae)
    rows = [torch.tensor(values, device=device).reshape(1, -1, 1, 1) for values in (mean, std)]
    return factor / rows[1], rows[0]


@contextmanager
def roomy(vae: Any, upcasts: bool) -> Iterator[None]:
    """Inside, an autoencoder that overflows in float16, and says so, is in float32.

    upcasts: whether its family heeds what it says
    """
    narrow = upcasts and dtype_of(vae) == torch.float16 and vae.config.get("force_upcast")
    if narrow:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if narrow:
            vae.to(torch.float16)


def dtype_of(module: torch.nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def device_of(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, diffusers and transformers say errors only and draw no bars."""
    import diffusers.utils.logging as one
    import transformers.utils.logging as two

    levels = [one.get_verbosity(), two.get_verbosity()]
    bars = [one.is_progress_bar_enabled(), two.is_progress_bar_enabled()]
    for module in (one, two):
        module.set_verbosity_error()
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module, level, bar in zip((one, two), levels, bars, strict=True):
            module.set_verbosity(level)
            if bar:
                module.enable_progress_bar()
