"""What a model's pictures depend on besides its files: weights as they are in memory, and settings.

Hashes of files do not know of adapters, fused or changed weights, nor of a component that was
exchanged. A checksum of the weights in memory does. It reads each weight once, as one evaluation
of the network does, on the device where the weights are. On one core of a CPU that is 3 s for the
860 million of Stable Diffusion 1; SHA-256 takes 7 s for them in float32.

It tells changes, not attacks: for each 2^16 words w_i of 32 bits, sum_i (w_i r_i mod 2^32) with
odd r_i, and SHA-256 of these sums with the names and shapes. So it is the same on all devices.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["checksum", "checksums", "differ", "digest_of", "of_component"]

PERIOD = 2**16  # words with a factor of their own
AT_ONCE = {"cpu": 1}  # of these on a CPU, where they stay in its cache; 2^6 on other devices
# by width: a checksum can be compared with that of a cast to the same or a narrower one
NARROWER = {
    torch.float32: (torch.float32, torch.float16, torch.bfloat16),
    torch.float16: (torch.float16,),
    torch.bfloat16: (torch.bfloat16,),
}
ADAPTERS = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")  # of peft's layers
FREE_U = ("s1", "s2", "b1", "b2")  # of blocks, once diffusers' enable_freeu was called


@torch.no_grad()
def checksum(module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """16 hexadecimal digits of names, shapes and values of all weights and buffers, and of what
    adapters add to them; "" where they are not in memory (offloaded to a file).

    Args:
        module: compiled or not
        dtype: what floats are cast to before; as they are where left out
    """
    head, sums = [], []
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, Tensor):
            continue
        if value.is_meta:
            return ""
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        kind = str(value.dtype).removeprefix("torch.")
        head.append(f"{name.replace('_orig_mod.', '')} {kind} {list(value.shape)}")
        sums += [*_sums(value)]
    digest = hashlib.sha256("\n".join([*head, *_beside(module)]).encode())
    places: dict[torch.device, list[Tensor]] = {}
    for one in sums:
        places.setdefault(one.device, []).append(one)
    if len(places) > 1:  # its parts are on several devices
        sums = [one.cpu() for one in sums]
    if sums:
        digest.update(torch.cat(sums).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def checksums(module: nn.Module, dtype: torch.dtype) -> dict[str, str]:
    """By dtype: of the weights as they are, and of casts to narrower ones.

    Args:
        module: the network
        dtype: of its arithmetic
    """
    found = {_name(kind): checksum(module, kind) for kind in NARROWER.get(dtype, ())}
    return {name: digest for name, digest in found.items() if digest}


def differ(known: Any, module: nn.Module, dtype: torch.dtype) -> bool | None:
    """Whether weights in memory are others than those of some `checksums`; None where these say
    nothing of any dtype that they can be cast to."""
    kinds = NARROWER.get(dtype, ())
    kind = next((one for one in kinds if isinstance(known, Mapping) and _name(one) in known), None)
    found = "" if kind is None else checksum(module, kind)
    return known[_name(kind)] != found if kind is not None and found else None


def of_component(part: Any) -> str:
    """16 hexadecimal digits of a component of a pipeline: configuration and weights of a network,
    vocabulary of a tokenizer."""
    if isinstance(part, nn.Module):
        config = getattr(part, "config", None)
        values = config.to_dict() if hasattr(config, "to_dict") else config  # type: ignore[union-attr]
        known = _plain(values) if isinstance(values, Mapping) else {}
        return digest_of([known, checksum(part)])
    if hasattr(part, "get_vocab"):
        fast = getattr(part, "backend_tokenizer", None)
        words = part.get_vocab() if fast is None else _without_state(json.loads(fast.to_str()))
        return digest_of([type(part).__name__, part.model_max_length, words])
    return type(part).__name__


def _without_state(words: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer without what its last call has left in it."""
    return {name: value for name, value in words.items() if name not in ("truncation", "padding")}


def digest_of(values: Any) -> str:
    """16 hexadecimal digits of something JSON-ready; what is not stands as its text."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without where it came from, by which library's version."""
    notes = ("transformers_version", "torch_dtype", "dtype")
    return {n: v for n, v in config.items() if not n.startswith("_") and n not in notes}


def _sums(value: Tensor) -> Iterator[Tensor]:
    """int64, one for each PERIOD words."""
    flat = value.detach().contiguous().reshape(-1)
    if flat.storage_offset() * flat.element_size() % 4:
        flat = flat.clone()  # 32-bit words begin at multiples of 4 bytes
    data = flat.view(torch.uint8)
    tail = len(data) % 4
    words = data[: len(data) - tail].view(torch.int32)
    factors = (torch.arange(PERIOD, device=words.device) * 2654435761 % 2**31 | 1).int()
    whole = len(words) // PERIOD
    for rows in words[: whole * PERIOD].view(-1, PERIOD).split(AT_ONCE.get(value.device.type, 64)):
        yield (rows * factors).sum(1)
    rest = words[whole * PERIOD :]
    yield (rest * factors[: len(rest)]).sum().reshape(1)
    yield data[len(data) - tail :].long()


def _beside(module: nn.Module) -> Iterator[str]:
    """Numbers of modules that act on the pictures and are no weights."""
    for name, part in module.named_modules():
        for field in ADAPTERS + FREE_U:
            value = getattr(part, field, None)
            if isinstance(value, int | float | list | tuple | dict) and value not in ({}, [], ()):
                yield f"{name}.{field} {value}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
