"""The peak of memory of distilling adapters, beside one pass of the same network and back.

    python -m benchmarks.lora_memory              # as large as Stable Diffusion 1.5, 64x64 latents
    python -m benchmarks.lora_memory --small      # a small network, to try the script

Each part runs in a process of its own, with random weights, activations computed again in the
backward pass, and one picture at a time:

    passes        the adapter-trained network: one forward and one backward pass
    distillation  steps with teacher under guidance, target, student, Adam and averages

A CPU's figure is the process's largest resident memory less what it had before the network was
built; a GPU's is that of its allocator.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
}
SMALL = {
    "sample_size": 16,
    "cross_attention_dim": 64,
    "block_out_channels": (64, 128),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 8,
}


def build(config: dict[str, Any], device: str) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    torch.manual_seed(0)
    kind: Any = UNet2DConditionModel
    return kind(**config).eval().requires_grad_(False).to(device)


class Conditions:
    """Random latents and texts, one by one."""

    digest = "random"

    def __init__(self, config: dict[str, Any]) -> None:
        self.size, self.width = config["sample_size"], config["cross_attention_dim"]

    def __len__(self) -> int:
        return 4

    def batch(self, chosen: torch.Tensor, /) -> tuple[torch.Tensor, Any]:
        gen = torch.Generator().manual_seed(int(chosen[0]))
        x = torch.randn(len(chosen), 4, self.size, self.size, generator=gen)
        text = torch.randn(len(chosen), 77, self.width, generator=gen)
        return x, {"encoder_hidden_states": text}


def measure(part: str, config: dict[str, Any], rank: int, device: str) -> dict[str, float]:
    """The peak in MiB, and the seconds of the last step."""
    from fewstep.networks.lora import TARGETS, Adapters

    data, before = Conditions(config), resident()
    net = build(config, device)
    if part == "passes":
        adapters = Adapters(net, rank, TARGETS, 0)
        net.enable_gradient_checkpointing(adapters.checkpointed)
        x, condition = data.batch(torch.zeros(1, dtype=torch.int64))
        inputs = {name: value.to(device) for name, value in condition.items()}
        times = torch.full((1,), 500.0, device=device)
        for _ in range(2):
            begun = time.perf_counter()
            adapters(x.to(device), timestep=times, **inputs, return_dict=False)[0].mean().backward()
            seconds = time.perf_counter() - begun
    else:
        seconds = distil(net, data, rank)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident() - before
    return {"peak_mib": round(peak / MIB, 1), "seconds": round(seconds, 2)}


def distil(net: Any, data: Conditions, rank: int) -> float:
    """Two steps of adapters in memory; seconds of the last."""
    from fewstep.distillation import Recipe
    from fewstep.distillation.pipelines import subject
    from fewstep.distillation.subject import Training
    from fewstep.distillation.teacher import stepper
    from fewstep.distillation.training import Distillation

    recipe = Recipe(
        train="lora", rank=rank, checkpointing=True, batch=1, pictures=2, guidance=8.0,
        teacher="ddim", substeps=1, dtype="float32", lr=1e-4,
    )  # fmt: skip
    known = subject(bare_model(net), (), 0, Training("lora", rank, None, True))
    step = stepper(
        "ddim", known.sigma_max, known.sigma_min, known.schedule, substeps=1, usual=known.usual
    )
    task, seconds = Distillation(recipe, known, step, data), 0.0
    for number in range(2):
        begun = time.perf_counter()
        task.update(number)
        seconds = time.perf_counter() - begun
    return seconds


def bare_model(net: Any) -> Any:
    """A Stable Diffusion whose autoencoder and text encoder are as small as they can be, since the
    cache does without them."""
    import transformers
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    from fewstep.models import from_pipe

    words = {"a": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}
    tokenizer = transformers.CLIPTokenizer(vocab=words, merges=[], model_max_length=77)
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=3, hidden_size=net.config.cross_attention_dim, intermediate_size=8,
            num_hidden_layers=1, num_attention_heads=4, bos_token_id=1, eos_token_id=2,
            pad_token_id=2,
        )
    )  # fmt: skip
    autoencoder: Any = AutoencoderKL
    vae = autoencoder(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
    )
    table = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    whole: Any = StableDiffusionPipeline
    pipe = whole(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=net,
        scheduler=DDIMScheduler(**table, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return from_pipe(pipe.to(net.device))


def resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Peak of memory of distilling adapters.")
    parser.add_argument("--small", action="store_true", help="a small network")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", choices=("passes", "distillation"), help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.part:
        config = SMALL if options.small else SD15
        found = measure(options.part, config, options.rank, options.device)
        options.to.write_text(json.dumps(found))
        return 0
    given = ["--small"] if options.small else []
    given += ["--rank", str(options.rank), "--device", options.device]
    given += ["--threads", str(options.threads)]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in ("passes", "distillation"):
            to = Path(folder) / part
            more = [*given, "--part", part, "--to", str(to)]
            subprocess.run([sys.executable, "-m", "benchmarks.lora_memory", *more], check=True)
            found[part] = json.loads(to.read_text())
            print(
                f"{part}: {found[part]['peak_mib']:,} MiB, {found[part]['seconds']} s", flush=True
            )
    ratio = found["distillation"]["peak_mib"] / found["passes"]["peak_mib"]
    print(f"distillation over passes: {ratio:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
