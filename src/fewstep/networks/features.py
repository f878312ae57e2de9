"""The built-in feature networks, for 32x32 pictures of clothes: `fashion-a` and `fashion-b` for
grey ones, `garments-a` and `garments-b` for coloured ones.

    f(x) = (h(x) - shift) * scale

All have 128 features with mean 0 and standard deviation 1 over their training pictures; a
picture's features are not normalised. The two of a pair differ in kind:

    fashion-a   residual convolutions on 16x16, 8x8, 4x4 points, SiLU, then the mean over all
                places; trained on labels
    fashion-b   4x4 patches, residual convolutions on 8x8 of them, GELU, then a linear layer that
                tells every place apart; trained without labels (VICReg)

    garments-a  as fashion-a, but with every place apart; its head tells garments, colours and
                background (`fewstep.evaluate.agreement`)
    garments-b  as fashion-b

so a result that holds in both is not a habit of one network. The first can be used as a training
loss; the second is the judge. recipes/fashion_features.py and recipes/garments_features.py train
them, docs/feature-networks.md says what they see.

Sources: He et al. 2016, arXiv:1512.03385 (residual blocks); Bardes et al. 2022, arXiv:2105.04906
(VICReg).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fewstep.files import file_hash
from fewstep.networks.device import check_device
from fewstep.records import Digest, Slug, read_json, record, shown
from fewstep.tensors import load_tensors

__all__ = [
    "Clamped",
    "FeatureNetwork",
    "feature_networks",
    "load_feature_folder",
    "load_feature_network",
    "make_trunk",
    "reference_path",
]

FORMAT = "fewstep-features/1"
CARD_FILE, WEIGHTS_FILE, REFERENCE_FILE = "card.json", "model.safetensors", "reference.npz"
BUILTIN = Path(__file__).parent / "builtin"
SIZE, CLASSES = 32, 10

Conv = Callable[..., nn.Module]


def plain_conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Module:
    """A convolution that keeps the size, or cuts it into patches where stride = kernel."""
    padding = 0 if stride == kernel else kernel // 2
    return nn.Conv2d(c_in, c_out, kernel, stride, padding)


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(x))), then SiLU."""

    def __init__(self, width: int, conv: Conv) -> None:
        super().__init__()
        self.first, self.second = conv(width, width, 3), conv(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.second(F.silu(self.first(x))))


class Residual(nn.Module):
    """2x2 pixels to channels, then levels of residual blocks, halving the size by averaging.

    inputs: channels of a picture
    dim: of a linear layer that sees every place apart; 0 for the mean over all places
    """

    def __init__(
        self, conv: Conv, widths: Sequence[int], blocks: int, inputs: int = 1, dim: int = 0
    ) -> None:
        super().__init__()
        self.inputs, self.dim = inputs, dim or widths[-1]
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), conv(4 * inputs, widths[0], 3), nn.SiLU()]
        for level, width in enumerate(widths):
            if level:
                layers += [nn.AvgPool2d(2), conv(widths[level - 1], width, 1), nn.SiLU()]
            layers += [ResidualBlock(width, conv) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers)
        places = (SIZE >> len(widths)) ** 2
        self.last = nn.Linear(widths[-1] * places, dim) if dim else None

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.layers(x))

    def finish(self, h: Tensor) -> Tensor:
        return h.mean(dim=(2, 3)) if self.last is None else self.last(h.flatten(1))

    def scales(self, x: Tensor) -> list[Tensor]:
        """Maps [n, c, h, w] at the end of each level, and what forward returns."""
        found: list[Tensor] = []
        for layer in self.layers:
            if isinstance(layer, nn.AvgPool2d):
                found.append(x)
            x = layer(x)
        return [*found, x, self.finish(x)]


class PatchBlock(nn.Module):
    """x + conv(gelu(conv(x)))."""

    def __init__(self, width: int, conv: Conv) -> None:
        super().__init__()
        self.first, self.second = conv(width, width, 3), conv(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.gelu(self.first(x)))


class Patches(nn.Module):
    """Patches to channels, residual blocks at that one resolution, and a linear layer that sees
    every place apart: nothing is averaged."""

    def __init__(
        self,
        conv: Conv,
        patch: int,
        width: int,
        blocks: int,
        channels: int,
        dim: int,
        inputs: int = 1,
    ) -> None:
        super().__init__()
        self.inputs, self.dim = inputs, dim
        self.layers = nn.Sequential(
            conv(inputs, width, patch, stride=patch),
            nn.GELU(),
            *(PatchBlock(width, conv) for _ in range(blocks)),
            conv(width, channels, 1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(channels * (SIZE // patch) ** 2, dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def scales(self, x: Tensor) -> list[Tensor]:
        """Maps [n, c, h, w] after each block, and what forward returns."""
        found: list[Tensor] = []
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, PatchBlock):
                found.append(x)
        return [*found, x]


LARGEST = {"blocks": 64, "patch": SIZE}  # other sizes are up to 4096
TRUNKS: dict[str, Callable[..., Residual | Patches]] = {"residual": Residual, "patches": Patches}


def make_trunk(network: dict[str, Any], conv: Conv = plain_conv) -> Residual | Patches:
    """h(x) of an architecture as a card describes it: `kind`, and that kind's options.

    Args:
        conv: makes the convolutions that training puts a batch norm behind, which export folds away

    Raises:
        ValueError: for an unknown kind, or sizes out of bounds.
        TypeError: for options that do not go with it.
    """
    options = dict(network)
    kind = options.pop("kind", None)
    if kind not in tuple(TRUNKS):
        raise ValueError(f"network kind must be one of {', '.join(TRUNKS)}, got {shown(kind)}")
    for name, value in options.items():
        sizes = value if isinstance(value, list | tuple) else [value]
        most = LARGEST.get(name, 4096)
        if len(sizes) > 8 or not all(type(n) is int and 0 < n <= most for n in sizes):
            raise ValueError(f"{name} must be integers from 1 to {most}, got {shown(value)}")
    return TRUNKS[kind](conv, **options)


@record
class FeatureCard:
    """Facts about a feature network.

    network: its architecture, for `make_trunk`
    weights_sha256: hash of the weights file
    outputs: of its head
    about: recipe, data, licence and figures, for people; in the file they stand beside the others
    """

    name: Slug
    network: dict[str, Any]
    weights_sha256: Digest
    outputs: Annotated[int, Field(ge=1, le=4096)] = CLASSES
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> FeatureCard:
        """From its file.

        Raises:
            ValueError: it is not one, or a newer one.
        """
        values = read_json(path, "a card of a feature network")
        if (found := values.pop("format", None)) != FORMAT:
            raise ValueError(
                f"{path} has format {shown(found)}, this version reads {FORMAT!r}; update fewstep"
            )
        own = {name: values.pop(name) for name in tuple(values) if name in OWN}
        try:
            return cls(**own, about=values)
        except ValueError as error:
            raise ValueError(f"{path} is not a card of a feature network: {error}") from None


OWN = ("name", "network", "weights_sha256", "outputs")


class FeatureNetwork(nn.Module):
    """x float [n, inputs, 32, 32] in [-1, 1] -> features [n, dim], smooth in x.

    card: what its folder says about it
    shift, scale: of the features, [dim]
    head: classes from features; trained with the first of a pair, a linear probe on the second

    Differentiable with respect to x; its own parameters take no gradient. It has no norm and no
    dropout, so it is the same function in training mode, and picture i does not depend on its
    batch. Pictures outside [-1, 1] are seen as they are: clamp what is not yet decoded.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, card: FeatureCard) -> None:
        super().__init__()
        self.card = card
        self.trunk = make_trunk(card.network)
        self.head = nn.Linear(self.trunk.dim, card.outputs)
        self.register_buffer("shift", torch.zeros(self.trunk.dim))
        self.register_buffer("scale", torch.ones(self.trunk.dim))

    @property
    def name(self) -> str:
        return self.card.name

    @property
    def full_name(self) -> str:
        """What statistics in its space are known by: a network of other weights is another one,
        whatever it is called."""
        return f"{self.name}-{self.card.weights_sha256[:8]} native"

    @property
    def dim(self) -> int:
        return self.trunk.dim

    @property
    def inputs(self) -> int:
        """Channels of a picture."""
        return self.trunk.inputs

    def forward(self, x: Tensor) -> Tensor:
        wanted = (self.inputs, SIZE, SIZE)
        if not x.is_floating_point() or x.ndim != 4 or tuple(x.shape[1:]) != wanted:
            raise ValueError(
                f"{self.name} takes float pictures [n, {self.inputs}, {SIZE}, {SIZE}] in [-1, 1], "
                f"got {x.dtype} of shape {tuple(x.shape)}; scale uint8 by x / 127.5 - 1"
            )
        return (self.trunk(x) - self.shift) * self.scale

    def scales(self, x: Tensor) -> list[Tensor]:
        """Maps [n, c, h, w] inside the network, from fine to coarse, and last the features."""
        *maps, last = self.trunk.scales(x)
        return [*maps, (last - self.shift) * self.scale]

    def logits(self, x: Tensor) -> Tensor:
        """Scores [n, outputs]: of Fashion-MNIST's classes in their order, or of what the card's
        `heads` name."""
        return self.head(self(x))


@dataclass(frozen=True)
class Clamped:
    """A feature network on endpoints, of which it sees what a picture will show of them: pixels
    are clamped to [-1, 1]."""

    network: FeatureNetwork

    @property
    def name(self) -> str:
        return self.network.name

    def __call__(self, x: Tensor) -> Tensor:
        return self.network(x.clamp(-1, 1))


def feature_networks() -> list[str]:
    """Names of the built-in feature networks."""
    return sorted(path.parent.name for path in BUILTIN.glob(f"*/{CARD_FILE}"))


def load_feature_network(name: str, device: str | torch.device = "cpu") -> FeatureNetwork:
    """A built-in feature network, float32, in evaluation mode, without gradients of its own.

    Raises:
        ValueError: for an unknown name or a file that is not the one its card names.
    """
    return load_feature_folder(_folder(name), device)


def reference_path(name: str) -> Path:
    """The .npz with `mu` [dim], `sigma` [dim, dim], `count` and `extractor`: mean and covariance of
    the network's features over the pictures that the card names."""
    return _folder(name) / REFERENCE_FILE


def _folder(name: str) -> Path:
    if name not in feature_networks():
        have = ", ".join(feature_networks())
        raise ValueError(f"there is no feature network {name!r}; there are: {have}")
    return BUILTIN / name


def load_feature_folder(folder: Path | str, device: str | torch.device = "cpu") -> FeatureNetwork:
    """`load_feature_network` from a folder, as the training recipe writes it.

    Nothing in it is executed: JSON and safetensors only.

    Raises:
        ValueError: a file is missing, cut short, or does not go with the card.
    """
    path, card = Path(folder) / WEIGHTS_FILE, FeatureCard.read(Path(folder) / CARD_FILE)
    place = check_device(device)
    if not path.is_file():
        raise ValueError(f"{folder} has a card but no {WEIGHTS_FILE}; fetch it again")
    if file_hash(path) != card.weights_sha256:
        raise ValueError(
            f"{path} is not the file that its card names (SHA-256 differs); fetch it again"
        )
    tensors = load_tensors(path)
    try:
        with torch.device("meta"):  # takes no memory and draws no random numbers
            net = FeatureNetwork(card)
        net.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not go with its card: {reason}") from None
    return net.to(place).eval().requires_grad_(False)
