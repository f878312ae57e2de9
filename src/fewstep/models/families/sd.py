"""Stable Diffusion 1 and 2, and latent consistency models of them: one text encoder."""

from __future__ import annotations

from typing import Any

from fewstep.models.families.family import Condition, Family, Sizes

__all__ = ["SD"]


def encode(pipe: Any, texts: list[str] | None, sizes: Sizes) -> Condition:
    text, _ = pipe.encode_prompt(texts or [""], pipe.device, 1, False)
    return conditioned(pipe, text, None, sizes)


def conditioned(pipe: Any, text: Any, summary: Any, sizes: Sizes) -> Condition:
    return {"encoder_hidden_states": text}


SD = Family(
    "unet",
    ("unet", "vae", "tokenizer", "text_encoder"),
    "vae",
    encode,
    conditioned,
    tokenizers=(("tokenizer", 0),),
)
