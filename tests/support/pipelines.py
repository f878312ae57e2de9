"""Tiny real pipelines of diffusers, made on the spot from configurations; nothing is fetched.

Their weights are random, their files are those of the real ones: model_index.json, one folder per
component, tokenizers included. `original_keys` renames the weights of a Stable Diffusion pipeline
as its authors' single file names them.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep

diffusers: Any = pytest.importorskip("diffusers")
transformers: Any = pytest.importorskip("transformers")
huggingface_hub.constants.HF_HUB_OFFLINE = True  # where a test before us imported it

SD_TABLE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
PIXELS, LATENTS = 16, 8  # sides


def clip_tokenizer(length: int = 12) -> Any:
    """CLIP's byte-level tokenizer with a few merges; `length` tokens at most."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    symbols = [*letters.values(), *(letter + "</w>" for letter in letters.values())]
    merges = [("c", "a"), ("ca", "t</w>"), ("a", "t</w>"), ("s", "at</w>"), ("m", "at</w>")]
    tokens = [*symbols, *(one + two for one, two in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def t5_tokenizer(length: int = 12) -> Any:
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    vocabulary += [(letter, -3.0) for letter in letters] + [("▁cat", -1.0), ("▁mat", -1.0)]
    return transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=length)


def clip_encoder(tokenizer: Any, hidden: int = 32, projection: bool = False) -> Any:
    torch.manual_seed(1)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=37,
        projection_dim=hidden,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config).eval()


def autoencoder(**options: Any) -> Any:
    torch.manual_seed(2)
    fields = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": PIXELS,
    }
    return diffusers.AutoencoderKL(**{**fields, **options}).eval()


def pixel_unet(channels: int = 3, size: int = PIXELS, **options: Any) -> Any:
    torch.manual_seed(3)
    fields = {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return diffusers.UNet2DModel(**{**fields, **options}).eval()


def text_unet(context: int = 32, **options: Any) -> Any:
    torch.manual_seed(4)
    fields = {
        "sample_size": LATENTS,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": context,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return diffusers.UNet2DConditionModel(**{**fields, **options}).eval()


def ddpm(**scheduler: Any) -> Any:
    options = {"clip_sample": True, **scheduler}
    return diffusers.DDPMPipeline(unet=pixel_unet(), scheduler=diffusers.DDPMScheduler(**options))


def ddim(**scheduler: Any) -> Any:
    options = {"clip_sample": False, **scheduler}
    return diffusers.DDIMPipeline(unet=pixel_unet(), scheduler=diffusers.DDIMScheduler(**options))


def ldm(**scheduler: Any) -> Any:
    torch.manual_seed(5)
    vqvae = diffusers.VQModel(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        norm_num_groups=8,
        num_vq_embeddings=64,
        sample_size=PIXELS,
        scaling_factor=0.8,
    ).eval()
    options = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
    options |= {"clip_sample": False, **scheduler}
    return diffusers.LDMPipeline(
        vqvae=vqvae, unet=pixel_unet(3, LATENTS), scheduler=diffusers.DDIMScheduler(**options)
    )


def sd(unet: dict[str, Any] | None = None, **scheduler: Any) -> Any:
    """Stable Diffusion 1.x, or 2.x with prediction_type="v_prediction"."""
    tokenizer = clip_tokenizer()
    options = {**SD_TABLE, "steps_offset": 1, "clip_sample": False, **scheduler}
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=clip_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=text_unet(**(unet or {})),
        scheduler=diffusers.DDIMScheduler(**options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def lcm(**scheduler: Any) -> Any:
    """A latent consistency model as published: told the guidance, with a scheduler of its own."""
    tokenizer = clip_tokenizer()
    return diffusers.LatentConsistencyModelPipeline(
        vae=autoencoder(),
        text_encoder=clip_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=text_unet(time_cond_proj_dim=16),
        scheduler=diffusers.LCMScheduler(**{**SD_TABLE, **scheduler}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(**scheduler: Any) -> Any:
    one, two = clip_tokenizer(), clip_tokenizer()
    unet = text_unet(
        64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip_encoder(one),
        text_encoder_2=clip_encoder(two, projection=True),
        tokenizer=one,
        tokenizer_2=two,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**{**SD_TABLE, "steps_offset": 1, **scheduler}),
        add_watermarker=False,
    )


def sd3(t5: bool = True, **scheduler: Any) -> Any:
    torch.manual_seed(6)
    one, two, three = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=LATENTS,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=8,
    ).eval()
    torch.manual_seed(7)
    words = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(three), d_model=64, d_kv=8, d_ff=37, num_layers=2, num_heads=4
        )
    ).eval()
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=autoencoder(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip_encoder(one, projection=True),
        tokenizer=one,
        text_encoder_2=clip_encoder(two, projection=True),
        tokenizer_2=two,
        text_encoder_3=words if t5 else None,
        tokenizer_3=three if t5 else None,
    )


# one for each class that fewstep runs; a new family has its line here, and the tests take it up
MAKERS: dict[str, Callable[..., Any]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "ldm": ldm,
    "sd": sd,
    "sdxl": sdxl,
    "sd3": sd3,
    "lcm": lcm,
}
TEXT = ["sd", "sdxl", "sd3"]  # those that take one, and guidance by two calls
STUDENTS = ["lcm"]  # those that take one, and are told their guidance


def original_keys(pipe: Any) -> dict[str, Tensor]:
    """The weights under the names of the single file that Stable Diffusion 1 was published as."""
    names: dict[str, Tensor] = {}
    for key, value in pipe.unet.state_dict().items():
        names["model.diffusion_model." + _unet_key(key, pipe.unet.config)] = value
    for key, value in pipe.vae.state_dict().items():
        name = _vae_key(key, len(pipe.vae.config.block_out_channels))
        attention = "mid.attn_1" in name and value.ndim == 2
        names["first_stage_model." + name] = value[:, :, None, None] if attention else value
    for key, value in pipe.text_encoder.state_dict().items():
        key = key if key.startswith("text_model.") else f"text_model.{key}"
        names["cond_stage_model.transformer." + key] = value
    return {name: value.clone().contiguous() for name, value in names.items()}


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _unet_key(key: str, config: Any) -> str:
    plain = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for old, new in plain.items():
        if key.startswith(old + "."):
            return new + key.removeprefix(old)
    parts, layers = key.split("."), config.layers_per_block
    if parts[0] == "mid_block":
        place = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}[".".join(parts[1:3])]
        return f"middle_block.{place}." + _inner(parts[1], parts[3:])
    block, what, index = int(parts[1]), parts[2], int(parts[3])
    if parts[0] == "down_blocks":
        if what == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{parts[-1]}"
        return (
            f"input_blocks.{1 + block * (layers + 1) + index}.{int(what == 'attentions')}."
            + _inner(what, parts[4:])
        )
    if what == "upsamplers":
        attends = "CrossAttn" in config.up_block_types[block]
        return f"output_blocks.{block * (layers + 1) + layers}.{1 + attends}.conv.{parts[-1]}"
    return f"output_blocks.{block * (layers + 1) + index}.{int(what == 'attentions')}." + _inner(
        what, parts[4:]
    )


def _inner(what: str, rest: list[str]) -> str:
    return ".".join([RESNET[rest[0]], *rest[1:]] if what == "resnets" else rest)


def _vae_key(key: str, blocks: int) -> str:
    parts = key.split(".")
    if parts[0] in ("quant_conv", "post_quant_conv") or parts[1] in ("conv_in", "conv_out"):
        return key
    if parts[1] == "conv_norm_out":
        return f"{parts[0]}.norm_out.{parts[-1]}"
    tail = [{"conv_shortcut": "nin_shortcut"}.get(part, part) for part in parts]
    if parts[1] == "mid_block":
        if parts[2] == "resnets":
            return ".".join([parts[0], "mid", f"block_{int(parts[3]) + 1}", *tail[4:]])
        names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
        return f"{parts[0]}.mid.attn_1.{names[parts[4]]}.{parts[-1]}"
    side = {"down_blocks": "down", "up_blocks": "up"}[parts[1]]
    place = int(parts[2]) if side == "down" else blocks - 1 - int(parts[2])
    if parts[3] == "resnets":
        return ".".join([parts[0], side, str(place), "block", parts[4], *tail[5:]])
    return f"{parts[0]}.{side}.{place}.{side}sample.conv.{parts[-1]}"


def saved(name: str, folder: Path, **options: Any) -> Path:
    """A pipeline's folder, as diffusers writes it."""
    made = MAKERS[name](**options)
    made.save_pretrained(folder, safe_serialization=True)
    return folder


def load(path: Any, **options: Any) -> Any:
    """`fewstep.load`, of what is known to be a pipeline."""
    return fewstep.load(path, **options)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()
