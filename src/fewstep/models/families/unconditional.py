"""Pipelines without text: of pixels (DDPM, DDIM) and of latents (LDM)."""

from __future__ import annotations

from typing import Any

from fewstep.models.families.family import Family

__all__ = ["LATENTS", "PIXELS"]


def halvings(net: Any) -> int:
    """A U-Net without text halves its input before each block but the last, and cannot take odd
    sides there."""
    return 2 ** (len(net.config.block_out_channels) - 1)


PIXELS = Family("unet", ("unet",), step=halvings)
LATENTS = Family("unet", ("unet", "vqvae"), "vqvae", step=halvings)
