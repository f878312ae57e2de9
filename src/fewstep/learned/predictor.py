"""AMED's predictor: from the network's features and the two ends of a step to r, c and a.

    r = sigmoid(.)            the intermediate level s = nxt^r cur^(1-r)
    c in 1 +- scale_dir       stretches the step
    a in 1 +- scale_time      the network is told a s instead of s

The features, one number per place of the network's lowest-resolution map, go through 128 hidden
units to 4, and join two 8-dimensional embeddings of the levels; one linear head for each number.
About 9,000 parameters for a map of 8 x 8. The heads start at zero, so that training starts from
r = 1/2, c = a = 1, which is DPM-Solver-2's midpoint.

Source: Zhou et al. 2023 (AMED-Solver), arXiv:2312.00094. Theirs embeds sigma itself, which is
`embedding="sigma"`; ours embeds log(sigma) / 4, which tells low levels apart as well as high ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.noise import generator
from fewstep.plan import Level, Seen

__all__ = ["Predictor", "Values", "feature_count", "read_features"]

HIDDEN, CODE, EMBEDDING = 128, 4, 8
EMBEDDINGS = ("log", "sigma")


class Values(NamedTuple):
    """What is learned about a step: floats, or [b], or [1] for all samples."""

    r: Level
    c: Level
    a: Level


@dataclass(frozen=True, eq=False)
class Predictor:
    """The network that gives a step its values, as a function of its weights.

    features: how many numbers it reads; 0 where it reads none, and every sample has the same values
    scale_dir, scale_time: how far c and a may be from 1, below 1; 0 fixes them
    weights: by name, see `shapes`
    embedding: what is embedded of a level, "log" or, as published, "sigma"

    Raises:
        ValueError: for a scale outside [0, 1) and for weights that do not fit.
    """

    features: int
    scale_dir: float
    scale_time: float
    weights: dict[str, Tensor]
    embedding: str = "log"

    def __post_init__(self) -> None:
        if self.embedding not in EMBEDDINGS:
            raise ValueError(
                f"embedding must be one of {', '.join(EMBEDDINGS)}, got {self.embedding!r:.40}"
            )
        if not isinstance(self.features, int) or self.features < 0:
            raise ValueError(f"features must be an integer >= 0, got {self.features!r}")
        for name in ("scale_dir", "scale_time"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value!r}")
        found = {name: tuple(value.shape) for name, value in self.weights.items()}
        wanted = shapes(self.features)
        if found != wanted:
            wrong = sorted(
                name for name in {*found, *wanted} if found.get(name) != wanted.get(name)
            )
            raise ValueError(f"the predictor's weights do not fit: {', '.join(wrong)}")

    @classmethod
    def fresh(
        cls, features: int, scale_dir: float, scale_time: float, seed: int, device: torch.device
    ) -> Predictor:
        """Untrained: layers uniform within 1 / sqrt(inputs), heads zero."""
        gen, weights = generator(seed, "predictor"), {}
        for name, shape in shapes(features).items():
            bound = 0.0 if name.startswith("head") else shapes(features)[_matrix(name)][1] ** -0.5
            weights[name] = (bound * (2 * torch.rand(shape, generator=gen) - 1)).to(device)
        return cls(features, scale_dir, scale_time, weights)

    def __call__(
        self, features: Tensor | None, cur: float, nxt: float, device: torch.device
    ) -> Values:
        """The step from cur to nxt, in float64 on `device`.

        Args:
            features: [b, features], or None for zeros, which give one value for all samples, [1]
        """
        w = {name: value.to(device) for name, value in self.weights.items()}
        if features is None:
            features = w["hidden.weight"].new_zeros(1, max(1, self.features))

        def linear(layer: str, x: Tensor) -> Tensor:
            return F.linear(x, w[f"{layer}.weight"], w[f"{layer}.bias"])

        code = linear("code", F.silu(linear("hidden", features.to(w["hidden.weight"]))))
        embed = _embed if self.embedding == "log" else _embed_sigma
        levels = torch.stack([embed(cur), embed(nxt)]).to(code)
        levels = F.silu(linear("level", levels)).flatten()  # [16]
        out = linear("head", torch.cat((code, levels.expand(len(code), -1)), dim=1)).double()
        r, c, a = torch.sigmoid(out).unbind(1)
        return Values(r, _around_one(c, self.scale_dir), _around_one(a, self.scale_time))


def shapes(features: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights; without features the first layer reads a single zero."""
    sizes = {
        "hidden": (HIDDEN, max(1, features)),
        "code": (CODE, HIDDEN),
        "level": (EMBEDDING, EMBEDDING),
        "head": (3, CODE + 2 * EMBEDDING),
    }
    both = {f"{name}.weight": size for name, size in sizes.items()}
    return both | {f"{name}.bias": size[:1] for name, size in sizes.items()}


def feature_count(features: object) -> int:
    """How many numbers the predictor reads of a feature map. Errors as in `read_features`."""
    return _map(features).shape[1]


def read_features(seen: Seen, count: int) -> Tensor:
    """[b, count] from a reply: the channel mean of the network's map, flattened.

    Raises:
        ValueError: the denoiser gave none, or of another size.
    """
    if seen.features is None:
        raise ValueError(
            "this solver reads the network's features, and the denoiser has no with_features; "
            "train one with features=False"
        )
    features = _map(seen.features)
    if features.shape[1] != count:
        raise ValueError(
            f"this solver reads {count} features and the network gives {features.shape[1]}; "
            "it was trained on another network"
        )
    return features


def _map(features: object) -> Tensor:
    if not isinstance(features, Tensor) or features.ndim < 3:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"features must be one map [b, c, h, w], got {shape}")
    kind = torch.promote_types(features.dtype, torch.float32)
    return features.mean(dim=1, dtype=kind).flatten(1)  # [b, h w]


def _embed(sigma: float) -> Tensor:
    rates = 2.0 ** torch.arange(EMBEDDING // 2, dtype=torch.float64)
    angles = rates * (math.log(sigma) / 4)
    return torch.cat((angles.cos(), angles.sin()))


def _embed_sigma(sigma: float) -> Tensor:
    """As published: rates from 1 down to 1e-4, sines first."""
    half = EMBEDDING // 2
    rates = 1e-4 ** (torch.arange(half, dtype=torch.float64) / (half - 1))
    return torch.cat(((rates * sigma).sin(), (rates * sigma).cos()))


def _around_one(share: Tensor, scale: float) -> Level:
    return 1 + scale * (2 * share - 1) if scale else 1.0


def _matrix(name: str) -> str:
    return f"{name.partition('.')[0]}.weight"
