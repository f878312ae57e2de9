"""What fewstep has to know of one class of pipeline, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Condition", "Family", "Sizes"]

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
        None for the negative prompt where no text says it. None: it takes no text.
        sizes: original_size, crops_coords_top_left and target_size, (height, width) each, for SDXL
    conditioned: (pipeline, text, summary, sizes) -> the condition, of what `encode_prompt` returns;
        `encode` and given embeddings end in it
    pooled: whether its text encoders give a summary too (pooled_prompt_embeds)
    more_prompts: arguments of its `encode_prompt` that stand for the prompt of a further encoder
    tokenizers: components that read the prompt, with how many tokens are read (0: as many as the
        tokenizer's own model_max_length)
    tap: the module of the network whose output is its features, given the network
    patch: side of a token of the network, in its own pixels
    step: the network halves its input so often that sides must be multiples of this, in its own
        pixels, given the network; 1 where it takes any size
    options: what its class in diffusers is told besides its components
    upcasts: its class in diffusers takes an autoencoder in float16 to float32 where the
        autoencoder's config says `force_upcast`, which stands in every config by default
    """

    network: str
    needs: tuple[str, ...]
    autoencoder: str | None = None
    encode: Callable[[Any, list[str] | None, Sizes], Condition] | None = None
    conditioned: Callable[[Any, Any, Any, Sizes], Condition] | None = None
    pooled: bool = False
    more_prompts: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    tokenizers: tuple[tuple[str, int], ...] = ()
    tap: Callable[[Any], str] = lambda net: "mid_block"
    patch: Callable[[Any], int] = lambda net: 1
    step: Callable[[Any], int] = lambda net: 1
    options: Mapping[str, Any] = field(default_factory=dict)
    upcasts: bool = False
