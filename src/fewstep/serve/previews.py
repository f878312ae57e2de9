"""What a state on its way looks like: pixels as they are, latents by a linear map.

The map from a latent's channels to red, green and blue is fitted by least squares to smooth
pictures that the autoencoder itself encodes, once for each autoencoder, in seconds; it is kept in
the cache. A tiny autoencoder of diffusers shows more, for a little more time, where one is given.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fewstep.cache import cache_folder, recall
from fewstep.data.bounds import reason
from fewstep.extras import needs
from fewstep.models.components import latent_scale
from fewstep.models.formats.checks import check_part
from fewstep.noise import normal
from fewstep.serve.pictures import to_pixels
from fewstep.text import clean

__all__ = ["Shown", "fit", "read_tiny", "shown_by"]

SIDE, COUNT = 64, 24  # latents a side and pictures of the fit
RIDGE = 1e-3


@dataclass(frozen=True, eq=False)
class Shown:
    """How states become previews.

    Attributes:
        weights: [channels of a picture, channels of a state + 1], the last column a constant;
            None where states are pixels
        tiny: a tiny autoencoder, in place of the weights
    """

    weights: np.ndarray | None = None
    tiny: Any = None

    def pixels(self, state: np.ndarray, picture: tuple[int, int, int]) -> np.ndarray:
        """uint8 [h, w, c] of D, [c, h, w], at the size of the picture."""
        if self.tiny is not None:
            return _fitted(to_pixels(self._decoded(state)), picture)
        if self.weights is None:
            return to_pixels(state)
        mapped = np.einsum("rc,chw->rhw", self.weights[:, :-1], state)
        return _fitted(to_pixels(mapped + self.weights[:, -1, None, None]), picture)

    @torch.no_grad()
    def _decoded(self, state: np.ndarray) -> np.ndarray:
        """[c, h, w] in about [-1, 1]; a tiny autoencoder decodes latents as the pipeline has them,
        up to a factor and a shift of its own."""
        factor, shift = latent_scale(self.tiny)
        latents = torch.from_numpy(state)[None] / factor + shift
        return self.tiny.decode(latents).sample[0].float().numpy()


def _fitted(pixels: np.ndarray, picture: tuple[int, int, int]) -> np.ndarray:
    """At the size of the picture."""
    height, width, channels = picture
    if pixels.shape[:2] == (height, width):
        return pixels
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    large = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(large).reshape(height, width, channels)


def read_tiny(folder: Path | str) -> Any:
    """A tiny autoencoder (AutoencoderTiny of diffusers), on the CPU.

    Raises:
        ValueError: the folder holds none.
    """
    with needs("diffusers", "a tiny autoencoder"):
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    try:
        check_part(Path(folder))
        net: Any = AutoencoderTiny.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True
        )
    except Exception as error:  # of diffusers, for files that are missing or damaged
        raise ValueError(
            f"preview_decoder must be a folder of AutoencoderTiny with config.json and "
            f"safetensors, and {clean(folder)} is not ({reason(error)})"
        ) from None
    return net.eval().requires_grad_(False)


def shown_by(model: Any, tiny: Any = None) -> Shown:
    """How this model's states are shown.

    Args:
        model: loaded
        tiny: a tiny autoencoder for latents, see `read_tiny`

    Raises:
        ValueError: it has other channels.
    """
    autoencoder = getattr(model, "autoencoder", None)
    if autoencoder is None:
        return Shown()
    if tiny is not None:
        own = (int(tiny.config.latent_channels), int(tiny.config.out_channels))
        wanted = (model.shape[0], model.picture[2])
        if own != wanted:
            raise ValueError(
                f"preview_decoder must take {wanted[0]} channels and give {wanted[1]} for "
                f"{model.card.name}, got {own[0]} and {own[1]}"
            )
        return Shown(tiny=tiny)
    channels, out = model.shape[0], model.picture[2]
    key = {"latents": _digest(autoencoder), "channels": channels}
    shape = (out, channels + 1)
    weights = recall(cache_folder() / "previews", key, shape, lambda: fit(model))
    return Shown(weights.numpy())


@torch.no_grad()
def fit(model: Any) -> Tensor:
    """The linear map from latents to pixels, [c of pictures, c of latents + 1]."""
    scale = model.scale
    step = max(1, SIDE // max(1, scale // 8))
    small = model.with_size(*_size(model, step * scale))
    height, width, channels = small.picture
    rows, targets = [], []
    for i in range(COUNT):
        picture = _smooth(i, channels, height, width)
        pixels = ((picture + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        latents = small.encode(pixels.permute(1, 2, 0)[None].numpy())[0].cpu()
        shrunk = F.adaptive_avg_pool2d(picture[None], tuple(latents.shape[1:]))[0]
        rows.append(latents.flatten(1).T)
        targets.append(shrunk.flatten(1).T)
    a, b = torch.cat(rows).double(), torch.cat(targets).double()
    a = torch.cat([a, torch.ones(len(a), 1, dtype=torch.float64)], dim=1)
    gram = a.T @ a + RIDGE * torch.eye(a.shape[1], dtype=torch.float64)
    return torch.linalg.solve(gram, a.T @ b).T.float()


def _size(model: Any, wanted: int) -> tuple[int, int]:
    """A size that the model takes, near the wanted one."""
    height, width, _ = model.picture
    return (height, width) if height * width <= wanted**2 else (wanted, wanted)


def _smooth(seed: int, channels: int, height: int, width: int) -> Tensor:
    """A picture in [-1, 1] of soft patches of colour, coarse or fine, with edges or without."""
    side = 2 ** (1 + seed % 4)
    field = normal([seed], (channels, side, side), "patches")
    mode = "nearest" if seed % 3 == 0 else "bilinear"
    corners = None if mode == "nearest" else False
    field = F.interpolate(field, (height, width), mode=mode, align_corners=corners)[0]
    return torch.tanh(field * 1.2)


def _digest(autoencoder: Any) -> str:
    """A hash of the weights: of their names, shapes and a few numbers of each."""
    digest = hashlib.sha256()
    for name, value in autoencoder.state_dict().items():
        flat = value.detach().flatten()
        part = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy()
        digest.update(f"{name} {tuple(value.shape)}".encode() + part.tobytes())
    return digest.hexdigest()
