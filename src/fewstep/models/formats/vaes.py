"""Stable Diffusion's autoencoder in a folder of diffusers: its configuration and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.models.formats.checks import check_part
from fewstep.text import clean

__all__ = ["read_autoencoder"]

PLAIN = (str, int, float, bool, type(None), list, tuple)


def read_autoencoder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the weights of an autoencoder, float32.

    Args:
        folder: of the autoencoder, or of a pipeline that has one

    Raises:
        OSError: where it cannot be read.
        ValueError: where the folder holds no AutoencoderKL, or what `check_part` refuses.
    """
    place = folder / "vae" if (folder / "vae").is_dir() else folder
    if not (place / "config.json").is_file():
        raise ValueError(
            f"{clean(folder)} is no folder of diffusers with an autoencoder (config.json); give "
            "that of sd-vae-ft-mse"
        )
    check_part(place)
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError as error:
        raise ValueError(f"vae needs diffusers: {error}") from None
    try:
        net: Any = AutoencoderKL.from_pretrained(place, local_files_only=True)
    except Exception as error:  # of many libraries
        reason = clean(" ".join(str(error).split()), 200)
        raise ValueError(
            f"{clean(place)} is no autoencoder of Stable Diffusion: {reason}"
        ) from None
    config = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in net.config.items()
        if not name.startswith("_") and isinstance(value, PLAIN)
    }
    return config, {name: value.float() for name, value in net.state_dict().items()}
