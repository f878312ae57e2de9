"""Pipelines of the published sizes with random weights: what speed depends on, and nothing learned.

Nothing is fetched: the configurations stand here, and the tokenizer has letters for words. "tiny"
is the same code in seconds, for a CPU and for the tests.

Sources of the sizes: the configurations in the folders stable-diffusion-v1-5, stable-diffusion-xl-
base-1.0 and stable-diffusion-3-medium on the Hugging Face hub.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.stable_diffusion import TOKENS, tokenizer

__all__ = ["SIZES", "build", "tiny_decoder"]

TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CLIP_L = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20}
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
ATTENDING = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
PLAIN = ("DownBlock2D", "UpBlock2D")


def build(name: str, device: str, dtype: torch.dtype) -> Any:
    """A pipeline of diffusers on a device.

    Args:
        name: of `SIZES`
        device: where the weights are drawn, so that nothing large is copied
        dtype: of all networks
    """
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            pipe = SIZES[name]()
    finally:
        torch.set_default_dtype(default)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(device, dtype).eval().requires_grad_(False)
    # schedulers keep their tables on the CPU, wherever the networks are
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_decoder(vae: Any) -> Any:
    """The small autoencoder of diffusers (TAESD, 2.4 million parameters) for the same latents.

    Args:
        vae: the autoencoder in whose place it is to stand
    """
    diffusers: Any = importlib.import_module("diffusers")
    weight = next(vae.parameters())
    tiny = diffusers.AutoencoderTiny(latent_channels=vae.config.latent_channels)
    return tiny.to(weight.device, weight.dtype).eval().requires_grad_(False)


def sd15() -> Any:
    """859.5 million parameters in the U-Net, 512 x 512 pixels."""
    levels = (320, 640, 1280, 1280)
    return _stable_diffusion(_unet(levels, [ATTENDING] * 3 + [PLAIN], 768, 64), CLIP_L, 512)


def tiny() -> Any:
    unet = _unet((32, 64), [ATTENDING, PLAIN], 32, 8, attention_head_dim=4)
    return _stable_diffusion(unet, TINY, 64, (16, 16, 32, 32))


def sdxl() -> Any:
    """2.57 billion parameters in the U-Net, 1024 x 1024 pixels."""
    diffusers: Any = importlib.import_module("diffusers")
    unet = _unet(
        (320, 640, 1280),
        [PLAIN, ATTENDING, ATTENDING],
        2048,
        128,
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    words = tokenizer()
    return diffusers.StableDiffusionXLPipeline(
        vae=_autoencoder(1024, scaling_factor=0.13025),
        text_encoder=_text(words, CLIP_L),
        text_encoder_2=_text(words, CLIP_G, projection=True),
        tokenizer=words,
        tokenizer_2=words,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**TABLE, steps_offset=1),
        add_watermarker=False,
    )


def sd3() -> Any:
    """2.03 billion parameters in the transformer, 1024 x 1024 pixels; without its third text
    encoder, which is optional."""
    diffusers: Any = importlib.import_module("diffusers")
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=192,
    )
    words = tokenizer()
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(1024, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=_text(words, CLIP_L, projection=True),
        tokenizer=words,
        text_encoder_2=_text(words, CLIP_G, projection=True),
        tokenizer_2=words,
        text_encoder_3=None,
        tokenizer_3=None,
    )


SIZES: dict[str, Callable[[], Any]] = {"tiny": tiny, "sd15": sd15, "sdxl": sdxl, "sd3": sd3}


def _unet(
    levels: tuple[int, ...], blocks: Sequence[tuple[str, str]], context: int, side: int, **more: Any
) -> Any:
    diffusers: Any = importlib.import_module("diffusers")
    return diffusers.UNet2DConditionModel(
        sample_size=side,
        layers_per_block=2,
        block_out_channels=levels,
        down_block_types=[down for down, _ in blocks],
        up_block_types=[up for _, up in reversed(blocks)],
        cross_attention_dim=context,
        **{"attention_head_dim": 8, **more},
    )


def _autoencoder(side: int, levels: tuple[int, ...] = (128, 256, 512, 512), **options: Any) -> Any:
    diffusers: Any = importlib.import_module("diffusers")
    return diffusers.AutoencoderKL(
        block_out_channels=levels,
        down_block_types=["DownEncoderBlock2D"] * len(levels),
        up_block_types=["UpDecoderBlock2D"] * len(levels),
        layers_per_block=2,
        norm_num_groups=min(32, *levels),
        sample_size=side,
        **{"latent_channels": 4, **options},
    )


def _text(words: Any, shape: dict[str, int], projection: bool = False) -> Any:
    transformers: Any = importlib.import_module("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        intermediate_size=4 * shape["hidden_size"],
        projection_dim=shape["hidden_size"],
        max_position_embeddings=TOKENS,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        **shape,
    )
    kind = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    return getattr(transformers, kind)(config)


def _stable_diffusion(
    unet: Any, text: dict[str, int], side: int, levels: tuple[int, ...] = (128, 256, 512, 512)
) -> Any:
    diffusers: Any = importlib.import_module("diffusers")
    words = tokenizer()
    return diffusers.StableDiffusionPipeline(
        vae=_autoencoder(side, levels),
        text_encoder=_text(words, text),
        tokenizer=words,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(**TABLE, steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
