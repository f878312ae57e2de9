"""Stable Diffusion XL: two text encoders, and the sizes of the picture as a condition."""

from __future__ import annotations

from typing import Any

from fewstep.models.families.family import Condition, Family, Sizes

__all__ = ["SDXL"]


def encode(pipe: Any, texts: list[str] | None, sizes: Sizes) -> Condition:
    # its unconditional half is zeros or the empty text, by its configuration
    found = pipe.encode_prompt(
        texts or [""], device=pipe.device, do_classifier_free_guidance=texts is None
    )
    text, summary = (found[0], found[2]) if texts is not None else (found[1], found[3])
    return conditioned(pipe, text, summary, sizes)


def conditioned(pipe: Any, text: Any, summary: Any, sizes: Sizes) -> Condition:
    ids = pipe._get_add_time_ids(
        sizes["original_size"],
        sizes["crops_coords_top_left"],
        sizes["target_size"],
        dtype=text.dtype,
        text_encoder_projection_dim=pipe.text_encoder_2.config.projection_dim,
    ).to(text.device)
    added = {"text_embeds": summary, "time_ids": ids.repeat(len(text), 1)}
    return {"encoder_hidden_states": text, "added_cond_kwargs": added}


SDXL = Family(
    "unet",
    ("unet", "vae", "tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
    "vae",
    encode,
    conditioned,
    pooled=True,
    tokenizers=(("tokenizer", 0), ("tokenizer_2", 0)),
    options={"add_watermarker": False},
    upcasts=True,
)
