"""The pipelines that fewstep runs, one line of data each: their parts, and how text becomes a
condition.

A condition is what the network is given besides x_t and t, as a tree of tensors with one row, or
one row per picture: the keyword arguments of its forward call. Text goes through the pipeline's
own `encode_prompt`, so a condition is what diffusers would have given the same network.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.models.texts import on_leaves

__all__ = [
    "FAMILIES",
    "Condition",
    "Family",
    "Network",
    "Tapped",
    "cut_texts",
]

Condition = dict[str, Any]
Sizes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Family:
    """One class of pipeline.

    network: the component that denoises
    needs: the components without which it cannot run, the scheduler aside
    autoencoder: the component that makes pictures of latents; None where the network works on
        pixels
    optional: components that it does without where the folder lacks them
    encode: (pipeline, texts, sizes) -> a condition with one row per text, or one for all; texts are
        None for what guidance leads away from where no text says it. None: it takes no text.
        sizes: original_size, crops_coords_top_left and target_size, (height, width) each, for SDXL
    tokenizers: components that read the prompt, with how many tokens are read (0: as many as the
        tokenizer's own model_max_length)
    tap: the module of the network whose output is its features, given the network
    patch: side of a token of the network, in its own pixels
    """

    network: str
    needs: tuple[str, ...]
    autoencoder: str | None = None
    encode: Callable[[Any, list[str] | None, Sizes], Condition] | None = None
    optional: tuple[str, ...] = ()
    tokenizers: tuple[tuple[str, int], ...] = ()
    tap: Callable[[Any], str] = lambda net: "mid_block"
    patch: Callable[[Any], int] = lambda net: 1


def _encode_sd(pipe: Any, texts: list[str] | None, sizes: Sizes) -> Condition:
    text, _ = pipe.encode_prompt(texts or [""], pipe.device, 1, False)
    return {"encoder_hidden_states": text}


def _encode_sdxl(pipe: Any, texts: list[str] | None, sizes: Sizes) -> Condition:
    # its unconditional half is zeros or the empty text, by its configuration
    found = pipe.encode_prompt(
        texts or [""], device=pipe.device, do_classifier_free_guidance=texts is None
    )
    text, summary = (found[0], found[2]) if texts is not None else (found[1], found[3])
    ids = pipe._get_add_time_ids(
        sizes["original_size"],
        sizes["crops_coords_top_left"],
        sizes["target_size"],
        dtype=text.dtype,
        text_encoder_projection_dim=pipe.text_encoder_2.config.projection_dim,
    ).to(pipe.device)
    added = {"text_embeds": summary, "time_ids": ids}
    return {"encoder_hidden_states": text, "added_cond_kwargs": added}


def _encode_sd3(pipe: Any, texts: list[str] | None, sizes: Sizes) -> Condition:
    text, _, summary, _ = pipe.encode_prompt(
        texts or [""],
        None,
        None,
        device=pipe.device,
        do_classifier_free_guidance=False,
        max_sequence_length=T5_TOKENS,
    )
    return {"encoder_hidden_states": text, "pooled_projections": summary}


T5_TOKENS = 256  # diffusers' default for Stable Diffusion 3
SHOWN = 40  # characters by which a warning names a text
PIXELS = Family("unet", ("unet",))
CLIP = ("tokenizer", "text_encoder")
CLIPS = (*CLIP, "tokenizer_2", "text_encoder_2")

FAMILIES: dict[str, Family] = {
    "DDPMPipeline": PIXELS,
    "DDIMPipeline": PIXELS,
    "LDMPipeline": Family("unet", ("unet", "vqvae"), "vqvae"),
    "StableDiffusionPipeline": Family(
        "unet", ("unet", "vae", *CLIP), "vae", _encode_sd, tokenizers=(("tokenizer", 0),)
    ),
    "StableDiffusionXLPipeline": Family(
        "unet",
        ("unet", "vae", *CLIPS),
        "vae",
        _encode_sdxl,
        tokenizers=(("tokenizer", 0), ("tokenizer_2", 0)),
    ),
    "StableDiffusion3Pipeline": Family(
        "transformer",
        ("transformer", "vae", *CLIPS),
        "vae",
        _encode_sd3,
        ("tokenizer_3", "text_encoder_3"),
        (("tokenizer", 0), ("tokenizer_2", 0), ("tokenizer_3", T5_TOKENS)),
        tap=lambda net: f"transformer_blocks.{len(net.transformer_blocks) // 2}",
        patch=lambda net: net.config.patch_size,
    ),
}


def cut_texts(tokenizer: Any, limit: int, texts: Sequence[str]) -> list[str]:
    """What a tokenizer leaves out of each text that is longer than it reads; "" where nothing."""
    limit = limit or tokenizer.model_max_length
    cut = []
    for text in texts:
        ids = tokenizer(text, truncation=False, verbose=False).input_ids
        # the last token read is the mark of the end
        cut.append(tokenizer.decode(ids[limit - 1 : -1]).strip() if len(ids) > limit else "")
    return cut


def warn_of_cuts(pipe: Any, family: Family, texts: Sequence[str]) -> None:
    """One warning for each text that some text encoder does not read to the end."""
    cuts: dict[tuple[str, str], list[str]] = {}
    for name, limit in family.tokenizers:
        if (tokenizer := getattr(pipe, name)) is None:
            continue
        for text, cut in zip(texts, cut_texts(tokenizer, limit, texts), strict=True):
            if cut:
                read = f"{name} ({limit or tokenizer.model_max_length} tokens)"
                cuts.setdefault((text, cut), []).append(read)
    for (text, cut), names in cuts.items():
        start = text if len(text) <= SHOWN else text[:SHOWN] + "..."
        warnings.warn(
            f"the prompt {start!r} is too long for {' and '.join(names)}: it does not see {cut!r}",
            stacklevel=4,
        )


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

    net: the network itself, not compiled, for a compiled one does not look at hooks
    module: the dotted name of that module; tokens come back on their grid, `patch` pixels a token

    The hook is set inside the call alone, and hears the calling thread alone.
    """

    inner: Network
    net: Any
    module: str
    patch: int = 1

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.inner(x_t, t, condition)

    def with_features(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        seen: list[Any] = []
        caller = threading.get_ident()

        def hear(module: Any, inputs: Any, output: Any) -> None:
            if threading.get_ident() == caller:
                seen.append(output)

        handle = self.net.get_submodule(self.module).register_forward_hook(hear)
        try:
            out = Network(self.net)(x_t, t, condition)
        finally:
            handle.remove()
        features = seen[-1][-1] if isinstance(seen[-1], tuple) else seen[-1]
        if features.ndim == 3:  # [b, tokens, c]
            h, w = (side // self.patch for side in x_t.shape[2:])
            features = features.transpose(1, 2).reshape(len(features), -1, h, w)
        return out, features


def _rows(condition: Condition, count: int) -> Condition:
    """The condition with one row for each of `count` samples."""

    def rows(leaf: Tensor) -> Tensor:
        if leaf.shape[0] not in (1, count):
            raise ValueError(f"{leaf.shape[0]} prompts do not go with {count} pictures")
        return leaf.expand(count, *leaf.shape[1:])

    return on_leaves(rows, condition)


def guidance_embedding(pipe: Any, net: Any, guidance: Tensor) -> Condition:
    """The condition of a network that is told its guidance (LCM and its like), [b, k]."""
    size = net.config.time_cond_proj_dim
    told = pipe.get_guidance_scale_embedding(guidance.cpu().float() - 1, embedding_dim=size)
    dtype = next(net.parameters()).dtype
    return {"timestep_cond": told.to(device=guidance.device, dtype=dtype)}


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


def module_exists(net: torch.nn.Module, name: str) -> bool:
    """Whether a network has a module of that dotted name."""
    try:
        return net.get_submodule(name) is not None
    except AttributeError:
        return False
