"""Stable Diffusion 3: a transformer on tokens, three text encoders, of which T5 may be left out."""

from __future__ import annotations

from typing import Any

from fewstep.models.families.family import Condition, Family, Sizes

__all__ = ["SD3"]

T5_TOKENS = 256  # diffusers' default for Stable Diffusion 3


def encode(pipe: Any, texts: list[str] | None, sizes: Sizes) -> Condition:
    text, _, summary, _ = pipe.encode_prompt(
        texts or [""],
        None,
        None,
        device=pipe.device,
        do_classifier_free_guidance=False,
        max_sequence_length=T5_TOKENS,
    )
    return conditioned(pipe, text, summary, sizes)


def conditioned(pipe: Any, text: Any, summary: Any, sizes: Sizes) -> Condition:
    return {"encoder_hidden_states": text, "pooled_projections": summary}


SD3 = Family(
    "transformer",
    ("transformer", "vae", "tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
    "vae",
    encode,
    conditioned,
    pooled=True,
    more_prompts=("prompt_2", "prompt_3"),
    optional=("tokenizer_3", "text_encoder_3"),
    tokenizers=(("tokenizer", 0), ("tokenizer_2", 0), ("tokenizer_3", T5_TOKENS)),
    tap=lambda net: f"transformer_blocks.{len(net.transformer_blocks) // 2}",
    patch=lambda net: net.config.patch_size,
)
