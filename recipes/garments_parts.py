"""The parts of `garments`, and how they are written as a pipeline of diffusers.

Its tokenizer is a CLIPTokenizer of which every word of the captions is one token. Its scheduler is
Stable Diffusion's: DDIM, 1000 times, beta linear in its root.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.garments import BACKGROUNDS, COLOURS, KINDS, SIZE, WORDS
from fewstep.files import file_hash, write_json
from fewstep.models import load
from fewstep.models.card import CARD_FILE, Card
from fewstep.models.components import quiet
from fewstep.tensors import load_tensors
from fewstep.train.checkpoint import CHECKPOINT

START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-'!?&"
EXTRA = "a an and on in of to by two one photo picture image side next each other front wall "
EXTRA += "background plain"
TIMES, BETA_FIRST, BETA_LAST = 1000, 0.00085, 0.012  # of Stable Diffusion's schedule

AUTOENCODER: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [16, 32, 64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": SIZE,
    "mid_block_add_attention": False,
}
TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "projection_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": WORDS,
}
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [64, 128],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "attention_head_dim": 4,
    "cross_attention_dim": 128,
    "norm_num_groups": 16,
}


def library(name: str) -> Any:
    """diffusers or transformers, whose names are not typed for use outside."""
    return importlib.import_module(name)


def merges() -> list[tuple[str, str]]:
    """Byte-pair merges after which every word of the captions is one token.

    The most frequent pair of neighbours is joined everywhere, until no word has two parts; so the
    merges are in an order in which no word is led astray by those of another.
    """
    names = [name for kind in KINDS.values() for pair in kind.names for name in pair]
    names += [name for table in (COLOURS, BACKGROUNDS) for c in table.values() for name in c.names]
    names.append(EXTRA)
    words = {word for name in names for word in name.replace("-", " - ").split()}
    parts = {word: [*word[:-1], f"{word[-1]}</w>"] for word in sorted(words)}
    made: list[tuple[str, str]] = []
    while True:
        count: dict[tuple[str, str], int] = {}
        for some in parts.values():
            for two in pairwise(some):
                count[two] = count.get(two, 0) + 1
        if not count:
            return made
        best = min(count, key=lambda two: (-count[two], two))
        made.append(best)
        for word, some in parts.items():
            joined: list[str] = []
            for part in some:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts[word] = joined


def make_tokenizer() -> Any:
    """A CLIPTokenizer whose words are those of the captions; others fall into pieces."""
    pairs = merges()
    tokens = [*LETTERS, *(f"{c}</w>" for c in LETTERS), *(a + b for a, b in pairs)]
    vocab = {token: i for i, token in enumerate([*tokens, START, END])}
    return library("transformers").CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=WORDS)


def tokens_of(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """int64 [n, WORDS], as the pipeline makes them."""
    padded = tokenizer(list(texts), padding="max_length", truncation=True, max_length=WORDS)
    return torch.tensor(padded.input_ids)


def make_autoencoder(config: Mapping[str, Any]) -> Any:
    return library("diffusers").AutoencoderKL(**config).to(memory_format=torch.channels_last)


class Conditioned(nn.Module):
    """The U-Net and its text encoder, trained together."""

    def __init__(self, config: Mapping[str, Any], tokenizer: Any) -> None:
        super().__init__()
        transformers = library("transformers")
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        text = transformers.CLIPTextConfig(
            **config["text"],
            vocab_size=len(tokenizer),
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=end,
        )
        self.text: Any = transformers.CLIPTextModel(text)
        unet: Any = library("diffusers").UNet2DConditionModel(**config["unet"])
        self.unet: Any = unet.to(memory_format=torch.channels_last)

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        words = self.text(tokens).last_hidden_state
        return self.unet(x_t, t, words).sample


def averaged_autoencoder(folder: Path, config: Mapping[str, Any]) -> Any:
    """From the checkpoint of its run. Raises: ValueError, OSError."""
    net = make_autoencoder(config)
    return with_averages(net, folder / CHECKPOINT)


def with_averages(net: Any, checkpoint: Path) -> Any:
    """A network with the averaged weights of a run's checkpoint. Raises: ValueError, OSError."""
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint} is missing; run the part before this one first")
    tensors = load_tensors(checkpoint)
    averages = {n.removeprefix("ema."): w for n, w in tensors.items() if n.startswith("ema.")}
    try:
        net.load_state_dict(averages)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{checkpoint} is not of this network: {reason}") from None
    return net.eval().requires_grad_(False)


def fast(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class Decoder(nn.Module):
    """The half of an autoencoder that makes pictures."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = net.post_quant_conv, net.decoder

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


def write_pipeline(
    networks: Conditioned, autoencoder: Any, factor: float, out: Path, about: Mapping[str, Any]
) -> Card:
    """Write the pipeline's folder, float16, and its card.

    factor: of the latents
    about: recipe, data and licence
    """
    diffusers = library("diffusers")
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=TIMES,
        beta_start=BETA_FIRST,
        beta_end=BETA_LAST,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    autoencoder.register_to_config(scaling_factor=factor)
    with quiet():
        pipe = diffusers.StableDiffusionPipeline(
            vae=autoencoder.half(),
            text_encoder=networks.text.half(),
            tokenizer=make_tokenizer(),
            unet=networks.unet.half(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.save_pretrained(out)
    path = out / "text_encoder" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = "float32"  # else transformers keeps the file's, and diffusers does not
    write_json(path, config)
    parts = {"unet": pipe.unet, "vae": pipe.vae, "text_encoder": pipe.text_encoder}
    (out / CARD_FILE).unlink(missing_ok=True)  # an earlier one is of other weights
    known = load(out).card
    card = Card(
        name="garments",
        sigma_min=known.sigma_min,
        sigma_max=known.sigma_max,
        grid=known.grid,
        end=known.end,
        feature_module=known.feature_module,
        network={"class": "UNet2DConditionModel", "size": SIZE, "channels": 3},
        summary="Stable Diffusion of coloured clothes, 32x32, by text",
        weights_sha256=file_hash(out / "unet" / "diffusion_pytorch_model.safetensors"),
        kind="pipeline",
        about={
            "parameters": {n: sum(w.numel() for w in p.parameters()) for n, p in parts.items()},
            **about,
        },
    )
    write_json(out / CARD_FILE, card.to_dict())
    return card
