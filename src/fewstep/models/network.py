"""A trained network as a model: its folder, its denoisers, its prior, its pixels.

A folder holds `card.json` and `model.safetensors`; the latter has the network's weights, and for
each class, and last for no class, what solvers may use that costs no evaluation:

    stats.far_mean     mean of D(sigma_max z; sigma_max) over z          [classes + 1, c, h, w]
    stats.mean         mean of the data                                  [classes + 1, c h w]
    stats.basis        leading principal directions of the data, rows    [classes + 1, k, c h w]
    stats.variances    variances along them                              [classes + 1, k]
    stats.rest         mean of the other variances                       [classes + 1]
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fewstep.data.idx import to_pixels, to_unit
from fewstep.denoiser import Bound, Guided, Wrapper
from fewstep.files import file_hash, write_json, write_whole
from fewstep.models.card import CARD_FILE, WEIGHTS_FILE, Card
from fewstep.models.exact import gaussian_flow
from fewstep.networks.conditioning import indices
from fewstep.networks.preconditioning import denoise, denoise_with_features
from fewstep.networks.unet import UNet, UNetConfig
from fewstep.noise import generator, normal

__all__ = [
    "NetworkModel",
    "check_device",
    "data_statistics",
    "far_means",
    "load_folder",
    "save_folder",
]

Label = int | np.integer | str | Sequence[Any] | Tensor | np.ndarray | None
DIRECTIONS = 16  # principal directions kept per class
FAR_DRAWS = 512  # draws behind far_mean: its error is the spread of D at sigma_max over 22


@dataclass(frozen=True, eq=False)
class Conditional:
    """D(x, sigma, label) of a network under EDM's preconditioning; label [b], or [1] for all."""

    net: UNet
    card: Card
    forward: Callable[..., Any]

    @property
    def sigma_min(self) -> float:
        return self.card.sigma_min

    @property
    def sigma_max(self) -> float:
        return self.card.sigma_max

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        return denoise(self.forward, x, sigma, *self._rest(x, label))

    def with_features(self, x: Tensor, sigma: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """(D, the output of the network's middle [b, c, h, w])."""
        forward = partial(self.forward, features=True)
        return denoise_with_features(forward, x, sigma, *self._rest(x, label))

    def _rest(self, x: Tensor, label: Tensor) -> tuple[Tensor, float, torch.dtype]:
        dtype = next(self.net.parameters()).dtype
        return label.expand(len(x)), self.card.sigma_data, dtype


@dataclass(frozen=True, eq=False)
class NetworkModel:
    """A trained `UNet` with its card and statistics: everything from noise to pixels but the
    solver.

    stats: the tensors named stats.* of the weights file, without that prefix, float32 on the device
    dtype: the network's arithmetic
    forward: the network, compiled or not
    """

    card: Card
    net: UNet
    stats: dict[str, Tensor]
    forward: Callable[..., Any]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.net.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one sample, (c, h, w)."""
        config = self.net.config
        return config.channels, config.size, config.size

    @property
    def picture(self) -> tuple[int, int, int]:
        """Shape of one picture, (h, w, c)."""
        channels, height, width = self.shape
        return height, width, channels

    def denoiser(
        self,
        label: Label = None,
        prompt: str | None = None,
        guidance: float | Sequence[float] | Tensor | None = None,
        *,
        negative: str | None = None,
        encoded: object = None,
    ) -> Wrapper:
        """D(x, sigma) for one label for all pictures, or one per picture; None is the network
        without class.

        label: text that is a class's name means that class, other text of digits an index; a number
            is always an index
        guidance: scale of classifier-free guidance, >= 0, one or one per picture, needs a label;
            None or 1 is none. A network that is told the scale takes it in, at no second pass.

        Errors: ValueError for a text, an unknown label, a guidance that is negative or not finite,
        guidance without a label, or one that a student was not distilled for.
        """
        for name, text in (("prompt", prompt), ("negative", negative)):
            if text is not None:
                raise ValueError(f"{self.card.name} has no text input; use label instead of {name}")
        scale = torch.as_tensor(1.0 if guidance is None else guidance, dtype=torch.float64)
        if not ((scale >= 0) & (scale < math.inf)).all():
            raise ValueError(f"guidance must be finite and at least 0, got {guidance}")
        if scale.ndim > 1:
            raise ValueError(f"guidance must be one number, or one per picture, got {guidance}")
        if self.card.built_in_guidance is not None and guidance is not None:
            raise ValueError(
                f"{self.card.name} has guidance {self.card.built_in_guidance:g} built in, in one "
                "pass; leave guidance out"
            )
        rows, far = self._rows(label), self.stats["far_mean"]
        if "guidance" in self.net.config.told:
            return self._told(rows, label, guidance, scale)
        base = Conditional(self.net, self.card, self.forward)
        if scale.ndim == 0 and scale == 1:
            return Bound(base, rows, far[rows])
        if label is None:
            raise ValueError("guidance needs a label to guide towards; give label too")
        none = torch.full_like(rows, len(self.card.classes))
        strength = scale.item() if scale.ndim == 0 else scale.float().to(self.device)
        return Guided(base, strength, rows, none, (far[rows], far[none]))

    def _told(self, rows: Tensor, label: Label, guidance: Any, scale: Tensor) -> Wrapper:
        """D of a network that is told the guidance scale, which it knows on a range; without a
        class the scale means nothing, and is one of that range."""
        low, high = self._span()
        if label is None:
            if guidance is not None:
                raise ValueError("guidance needs a label to guide towards; give label too")
            scale = scale.clamp(low, high)
        if not ((scale >= low) & (scale <= high)).all():
            raise ValueError(
                f"{self.card.name} was distilled for guidance from {low:g} to {high:g}, got "
                f"{'none' if guidance is None else guidance}"
            )
        told = indices(self.net.config.told, torch.ones(scale.numel()), scale.reshape(-1))
        assert told is not None  # it is told the guidance at least
        forward = partial(self.forward, told=told.to(self.device))
        return Bound(Conditional(self.net, self.card, forward), rows, self.stats["far_mean"][rows])

    def _span(self) -> tuple[float, float]:
        """The ends of the range of guidance that the network was distilled for."""
        known = self.card.distilled.guidance if self.card.distilled else None
        return known if isinstance(known, tuple) else (0.0, math.inf)

    def _rows(self, label: Label) -> Tensor:
        """Rows of the label table, [1] or [b]."""
        names = self.card.classes
        if label is None:
            return torch.tensor([len(names)], device=self.device)
        plain: Any = label.tolist() if isinstance(label, Tensor | np.ndarray) else label
        rows = []
        for one in [plain] if isinstance(plain, str) or np.ndim(plain) == 0 else plain:
            text = str(one)
            index = names.index(one) if one in names else int(text) if text.isdecimal() else -1
            if not 0 <= index < len(names):
                have = ", ".join(f"{i} {name}" for i, name in enumerate(names)) or "none"
                lower = {name.lower(): name for name in names}
                near = difflib.get_close_matches(text.lower(), lower, n=1)
                hint = f" (did you mean {lower[near[0]]}?)" if near else ""
                raise ValueError(f"there is no label {one!r}{hint}; this model has: {have}")
            rows.append(index)
        return torch.tensor(rows, device=self.device)

    def prior(
        self,
        seeds: Sequence[int],
        sigma: float | None = None,
        label: Label = None,
    ) -> Tensor:
        """The start of sampling, float32 [n, c, h, w]: sigma_max z, z keyed by seed.

        sigma: a lower level to carry it to along the flow of a Gaussian with the data's mean and
        leading covariance (those of the label), in closed form and without an evaluation.
        """
        x = self.card.sigma_max * normal(seeds, self.shape, "prior").to(self.device)
        if sigma is None:
            return x
        if not self.card.sigma_min < sigma <= self.card.sigma_max:
            span = f"({self.card.sigma_min}, {self.card.sigma_max}]"
            raise ValueError(f"head_start must lie in {span}, got {sigma}")
        rows = self._rows(label).expand(len(seeds))
        flat = x.flatten(1)
        for row in rows.unique().tolist():
            chosen = rows == row
            flat[chosen] = gaussian_flow(
                flat[chosen],
                self.card.sigma_max,
                sigma,
                *(self.stats[name][row] for name in ("mean", "basis", "variances", "rest")),
            ).to(flat)
        return flat.reshape(x.shape)

    def level(self, strength: float) -> float:
        """The noise level at which `start` puts a picture: strength is the share of the Karras grid
        that is gone through again. Errors: ValueError where it is not in (0, 1]."""
        if not 0 < strength <= 1:
            raise ValueError(f"strength must lie in (0, 1], got {strength}")
        low, high = self.card.sigma_min ** (1 / 7), self.card.sigma_max ** (1 / 7)
        return (low + strength * (high - low)) ** 7 if strength < 1 else self.card.sigma_max

    def start(
        self, images: np.ndarray | Tensor, seeds: Sequence[int], strength: float
    ) -> tuple[Tensor, float]:
        """Where image-to-image starts: (x, sigma), pictures uint8 [n, h, w, c], one for all seeds
        or one per seed, with noise up to sigma."""
        sigma = self.level(strength)
        clean = to_unit(torch.as_tensor(images).permute(0, 3, 1, 2))
        return (clean + sigma * normal(seeds, self.shape, "prior")).to(self.device), sigma

    def decode(self, x: Tensor) -> np.ndarray:
        """Pictures uint8 [n, h, w, c] from clean states in [-1, 1]."""
        return to_pixels(x).permute(0, 2, 3, 1).cpu().numpy()


def check_device(name: str | torch.device) -> torch.device:
    """The device of that name, tried out. Errors: ValueError where it is unknown, absent, or holds
    no numbers (meta)."""
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        raise ValueError(
            f"device {str(name)!r} is not to be had: {str(error).partition(chr(10))[0]}"
        ) from None
    return device


def load_folder(
    folder: Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    compile: bool = False,
) -> NetworkModel:
    """Read a model folder of the kind unet. Nothing in it is executed: JSON and safetensors only.

    Errors: ValueError where a file is missing, cut short, or does not go with the card.
    """
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    place = check_device(device)
    card = Card.read(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has a card but no {WEIGHTS_FILE}; fetch it again")
    if card.weights_sha256 and file_hash(path) != card.weights_sha256:
        raise ValueError(
            f"{path} is not the file that its card names (SHA-256 differs); fetch it again"
        )
    try:
        tensors = {name: t.float() for name, t in safetensors.torch.load_file(path).items()}
        config = UNetConfig(**card.network)
        with torch.device("meta"):  # takes no memory and draws no random numbers
            net = UNet(config)
        kind = getattr(torch, dtype)  # for the weights; the table of frequencies stays float32
        weights = {n: t.to(kind) for n, t in tensors.items() if not n.startswith("stats.")}
        net.load_state_dict(weights, assign=True)
        stats = _statistics(tensors, config)
        if len(card.classes) != config.classes:
            raise ValueError(f"{len(card.classes)} class names for {config.classes} classes")
        if card.feature_module != "middle":
            raise ValueError(f"feature_module must be middle, got {card.feature_module!r}")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); fetch it again") from None
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not go with its card: {reason}") from None
    net = net.to(place).eval().requires_grad_(False)
    # float16 in the file: orthonormal again
    stats["basis"] = torch.linalg.qr(stats["basis"].mT).Q.mT.contiguous()
    stats = {name: t.to(place) for name, t in stats.items()}
    return NetworkModel(card, net, stats, torch.compile(net) if compile else net)


def _statistics(tensors: dict[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """The tensors named stats.*, without that prefix. Errors: ValueError where one is missing or of
    another shape than the module's docstring says."""
    stats = {n.removeprefix("stats."): t for n, t in tensors.items() if n.startswith("stats.")}
    rows, picture = config.classes + 1, (config.channels, config.size, config.size)
    pixels = math.prod(picture)
    k = stats["variances"].shape[-1] if "variances" in stats and stats["variances"].ndim else 0
    shapes = {
        "far_mean": (rows, *picture),
        "mean": (rows, pixels),
        "basis": (rows, min(k, pixels), pixels),
        "variances": (rows, min(k, pixels)),
        "rest": (rows,),
    }
    for name, shape in shapes.items():
        found = tuple(stats[name].shape) if name in stats else None
        if found != shape:
            raise ValueError(f"stats.{name} must have shape {shape}, got {found or 'none'}")
    return {name: stats[name] for name in shapes}


def save_folder(folder: Path, card: Card, net: UNet, stats: dict[str, Tensor]) -> Card:
    """Write weights as float16 and the card, each whole; returns the card with the weights'
    hash."""
    tensors = {
        name: value.detach().half().contiguous().cpu() for name, value in net.state_dict().items()
    }
    tensors |= {f"stats.{name}": value.half().contiguous().cpu() for name, value in stats.items()}
    write_whole(folder / WEIGHTS_FILE, safetensors.torch.save(tensors))
    card = replace(card, weights_sha256=file_hash(folder / WEIGHTS_FILE), folder=folder)
    write_json(folder / CARD_FILE, card.to_dict())
    return card


@torch.no_grad()
def far_means(net: UNet, sigma_max: float, sigma_data: float, draws: int = FAR_DRAWS) -> Tensor:
    """Mean over z of D(sigma_max z; sigma_max), for each class and for none, [classes + 1, c, h,
    w]."""
    config, device = net.config, next(net.parameters()).device
    shape = (config.channels, config.size, config.size)
    z = torch.randn(draws, *shape, generator=generator("far means")).to(device)
    means = []
    for row in range(config.classes + 1):
        total = torch.zeros(shape, dtype=torch.float64, device=device)
        for part in z.split(256):
            sigma = part.new_full((len(part),), sigma_max)
            label = torch.full((len(part),), row, device=device)
            total += denoise(net, sigma_max * part, sigma, label, sigma_data).double().sum(0)
        means.append(total / draws)
    return torch.stack(means).float()


def data_statistics(images: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
    """Mean, leading principal directions and variances of the data, for each class and for all
    together.

    images: uint8 [n, c, h, w]
    labels: [n]

    Keys mean, basis, variances, rest, as in the module's docstring.
    """
    rows: dict[str, list[Tensor]] = {"mean": [], "basis": [], "variances": [], "rest": []}
    for row in range(classes + 1):
        chosen = images if row == classes else images[labels == row]
        x = to_unit(chosen).flatten(1).double()
        values, vectors = torch.linalg.eigh(torch.cov(x.T))
        rows["mean"].append(x.mean(0))
        rows["basis"].append(vectors[:, -DIRECTIONS:].T.flip(0))
        rows["variances"].append(values[-DIRECTIONS:].flip(0))
        rows["rest"].append(values[:-DIRECTIONS].mean())
    return {name: torch.stack(parts).float() for name, parts in rows.items()}
