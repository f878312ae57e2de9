"""A Stable Diffusion pipeline made from its configuration, weights random, in any size.

For the figures that depend on what a pipeline is made of and not on what it has learned. Nothing is
fetched, the tokenizer included.
"""

from __future__ import annotations

import importlib
import string
from typing import Any

TOKENS, HIDDEN = 77, 256


def tokenizer() -> Any:
    """CLIP's, with letters for words."""
    transformers: Any = importlib.import_module("transformers")
    symbols = [*string.printable.strip(), *(f"{letter}</w>" for letter in string.printable.strip())]
    names = [*symbols, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: i for i, name in enumerate(names)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)


def stable_diffusion(channels: tuple[int, ...], side: int) -> Any:
    """A StableDiffusionPipeline.

    channels: of the U-Net's levels; the last one has no attention, as in the real one
    side: of the latents
    """
    diffusers: Any = importlib.import_module("diffusers")
    transformers: Any = importlib.import_module("transformers")
    words = tokenizer()
    text = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    attending = len(channels) - 1
    unet = diffusers.UNet2DConditionModel(
        sample_size=side,
        layers_per_block=2,
        block_out_channels=channels,
        down_block_types=(*["CrossAttnDownBlock2D"] * attending, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * attending),
        cross_attention_dim=HIDDEN,
        attention_head_dim=8,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=8 * side,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=transformers.CLIPTextModel(text).eval(),
        tokenizer=words,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def weight_bytes(pipe: Any) -> int:
    """Of all its networks."""
    import torch

    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return sum(w.numel() * w.element_size() for net in networks for w in net.parameters())
