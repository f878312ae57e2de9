"""Processor time of a forward pass of the papers' networks, beside diffusers' UNet2DModel.

ADM is the same architecture in both: residual blocks that halve and double, scale-shift norms,
heads of 64 channels, classes. SongUNet has no counterpart in diffusers. It stands beside a
UNet2DModel of the same widths, blocks and levels of attention, which has fewer parameters (shown)
and takes 0.9 of its arithmetic.
Each round times both, one after the other. The figures are medians over rounds, the ratio the
median of the rounds' ratios.

    python benchmarks/networks_forward.py --rounds 9
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fewstep.networks.adm import ADM
from fewstep.networks.adm_config import ADMConfig
from fewstep.networks.edm import EDMUNet
from fewstep.networks.edm_config import EDMConfig

WIDTHS, BLOCKS, SIZE, BATCH = (64, 128, 192), 2, 32, 4


def theirs(**settings: Any) -> nn.Module:
    """A UNet2DModel of these widths, with attention at the lower two levels."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    return UNet2DModel(
        sample_size=SIZE,
        layers_per_block=BLOCKS,
        block_out_channels=WIDTHS,
        norm_eps=1e-5,
        **settings,
    )


def adm() -> tuple[Callable[..., Any], Callable[..., Any], nn.Module, nn.Module]:
    shape = {"size": SIZE, "width": WIDTHS[0], "widths": WIDTHS, "blocks": BLOCKS}
    ours = ADM(ADMConfig(**shape, attention=(1, 2), head_width=64, classes=10))
    other = theirs(
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=64,
        num_class_embeds=10,
    )
    label = torch.zeros(BATCH, dtype=torch.long)
    return (
        lambda x, t: ours(x, t, label),
        lambda x, t: other(x, t, class_labels=label).sample,
        ours,
        other,
    )


def song() -> tuple[Callable[..., Any], Callable[..., Any], nn.Module, nn.Module]:
    mult = tuple(width // WIDTHS[0] for width in WIDTHS)
    ours = EDMUNet(
        EDMConfig(
            img_resolution=SIZE,
            img_channels=3,
            out_channels=3,
            model_channels=WIDTHS[0],
            channel_mult=mult,
            num_blocks=BLOCKS,
            attn_resolutions=(16, 8),
        )
    )
    other = theirs(
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
    )
    label = torch.zeros(BATCH, dtype=torch.long)
    return lambda x, t: ours(x, t, label), lambda x, t: other(x, t).sample, ours, other


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Seconds of both, and their ratio."""
    torch.manual_seed(0)
    ours, other, net, rival = {"adm": adm, "song": song}[name]()
    for module in (net, rival):
        module.eval().requires_grad_(False)
        if module is net:  # as models are loaded
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for value in module.parameters():  # no zeros: they may be quicker
            value.normal_(std=0.02)
    x, t = torch.randn(BATCH, 3, SIZE, SIZE), torch.full((BATCH,), 100.0)
    times: list[tuple[float, float]] = []
    with torch.inference_mode():
        for _ in range(rounds + 1):
            pair = []
            for call in (ours, other):
                begun = time.process_time()
                call(x, t)
                pair.append(time.process_time() - begun)
            times.append((pair[0], pair[1]))
    kept = times[1:]  # the first ones warm up
    count = {n: sum(p.numel() for p in m.parameters()) for n, m in (("a", net), ("b", rival))}
    return {
        "network": name,
        "ours": statistics.median(a for a, _ in kept),
        "diffusers": statistics.median(b for _, b in kept),
        "ratio": statistics.median(a / b for a, b in kept),
        "parameters": count["a"],
        "parameters_diffusers": count["b"],
    }


def main(rounds: int = 9, threads: int = 1) -> list[dict[str, Any]]:
    """Measure both networks and print a line of JSON for each."""
    torch.set_num_threads(threads)
    rows = [measure(name, rounds) for name in ("song", "adm")]
    for row in rows:
        print(json.dumps(row))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    main(**vars(parser.parse_args()))
