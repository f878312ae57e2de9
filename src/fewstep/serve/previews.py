"""What a state on its way looks like: pixels as they are, latents by a linear map.

The map from a latent's channels to red, green and blue is fitted by least squares to smooth
pictures that the autoencoder itself encodes, once for each autoencoder, in seconds; it is kept in
the cache. A tiny decoder is not needed for a preview of a few dozen pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fewstep.cache import cache_folder, recall
from fewstep.noise import normal
from fewstep.serve.pictures import to_pixels

__all__ = ["Shown", "fit", "shown_by"]

SIDE, COUNT = 64, 24  # latents a side and pictures of the fit
RIDGE = 1e-3


@dataclass(frozen=True, eq=False)
class Shown:
    """How states become previews.

    Attributes:
        weights: [channels of a picture, channels of a state + 1], the last column a constant;
            None where states are pixels
    """

    weights: np.ndarray | None = None

    def pixels(self, state: np.ndarray, picture: tuple[int, int, int]) -> np.ndarray:
        """uint8 [h, w, c] of D, [c, h, w], at the size of the picture."""
        if self.weights is None:
            return to_pixels(state)
        mapped = np.einsum("rc,chw->rhw", self.weights[:, :-1], state)
        small = to_pixels(mapped + self.weights[:, -1, None, None])
        height, width, channels = picture
        image = Image.fromarray(small[..., 0] if channels == 1 else small)
        large = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(large).reshape(height, width, channels)


def shown_by(model: Any) -> Shown:
    """How this model's states are shown."""
    autoencoder = getattr(model, "autoencoder", None)
    if autoencoder is None:
        return Shown()
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
