"""What is to know of a network of the ADM family without building it: its Spec and its card.

It imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any, Literal

from fewstep.models.card import Card, Choice
from fewstep.networks.adm_config import ADMConfig, AutoencoderConfig
from fewstep.records import Int, Real, Slug, Text, as_slug, record, shown

__all__ = ["GUIDE", "NULL_CLASS", "STAGE", "Spec", "betas_of", "card_of", "spec_of"]

NULL_CLASS = 1001  # rows of a class embedding whose last one stands for no class
STAGE, GUIDE = "first_stage.", "classifier."  # prefixes of weights
ROLES = {"eps": "eps prediction", "edm": "EDM's process", "consistency": "a consistency model"}
TABLES = {"linear": 3, "scaled_linear": 3, "cosine": 1}  # count and ends of each
RHO, POINTS, INDICES = 7, 40, (0, 22, 39)  # of the published sampling of consistency models


@record
class Spec:
    """A network of the family with its process, JSON-ready.

    kind: of the file that it was read from
    role: of the raw output, see the module's docstring
    schedule: ("linear", count, first, last), ("scaled_linear", ...), ("cosine", count), or
        ("betas", ...); empty for networks of EDM's process
    clip: D is held in [-clip, clip]; None where it is free
    scale: a state is `scale` times the first stage's latents
    first_stage: of a latent diffusion
    classifier: of noisy pictures, by which guidance goes then
    how: where the settings that shapes do not say are from
    points, indices: of a consistency model: the Karras grid of so many points, and where on it the
        published sampling stands
    """

    kind: Slug
    unet: ADMConfig
    role: Literal["eps", "edm", "consistency"]
    schedule: tuple[str | float, ...] = ()
    sigma_min: Real = 0.002
    sigma_max: Real = 80.0
    clip: Real | None = None
    scale: Real = 1.0
    first_stage: AutoencoderConfig | None = None
    classifier: ADMConfig | None = None
    how: Text = ""
    points: Int = POINTS
    indices: tuple[Int, ...] = INDICES

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"need 0 < sigma_min < sigma_max, got {self.sigma_min}, {self.sigma_max}"
            )
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")
        if self.classifier is not None and (self.role != "eps" or self.first_stage is not None):
            raise ValueError("classifier goes with guided-diffusion, of pixels and of eps")
        if (self.role == "eps") != bool(self.schedule):
            raise ValueError(f"a schedule goes with role eps, got {self.role!r}")
        if self.schedule:
            _ends(self.schedule)
        rising = all(a < b for a, b in pairwise(self.indices))
        if not (rising and self.points >= 2 and self.indices[0] >= 0):
            raise ValueError(f"indices must rise from 0, got {self.indices} of {self.points}")
        if not len(self.indices) >= 2 or self.indices[-1] >= self.points:
            raise ValueError(f"indices must be below {self.points}, got {self.indices}")

    @property
    def range(self) -> tuple[float, float]:
        """The levels on which it was trained; of a table, but for the last digits."""
        return _ends(self.schedule) if self.schedule else (self.sigma_min, self.sigma_max)

    @property
    def classes(self) -> int:
        """How many classes it knows, no class not counted; else its classifier."""
        if self.classifier is not None and not self.unet.classes:
            return self.classifier.outputs
        rows = self.unet.context_rows
        return rows - (rows == NULL_CLASS) if rows else self.unet.classes

    @property
    def needs_label(self) -> bool:
        """Whether it cannot be used without a class."""
        rows = self.unet.context_rows
        return rows != NULL_CLASS if rows else self.unet.classes > 0


def _ends(schedule: Sequence[str | float]) -> tuple[float, float]:
    """sigma at the ends of the table that a Spec names, without torch.

    Raises:
        ValueError: for another table.
    """
    betas = betas_of(schedule)
    if len(betas) < 2 or not all(0 < beta < 1 for beta in betas):
        raise ValueError(f"schedule must be 2 betas in (0, 1) or more, got {shown(schedule[:4])}")
    whole = math.fsum(math.log1p(-beta) for beta in betas)
    low, high = (math.expm1(-log) ** 0.5 for log in (math.log1p(-betas[0]), whole))
    return low, high


def betas_of(schedule: Sequence[str | float]) -> list[float]:
    """The table that a Spec names, the cleanest first. Errors: ValueError for another."""
    name, *values = schedule
    numbers = [float(value) for value in values]
    if name == "betas":
        return numbers
    if name not in TABLES or len(numbers) != TABLES[str(name)] or not 2 <= numbers[0] <= 100_000:
        known = ", ".join(TABLES)
        raise ValueError(f"schedule must be one of {known}, betas, got {shown(schedule[:4])}")
    count = int(numbers[0])
    if name == "cosine":
        abar = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        return [min(1 - b / a, 0.999) for a, b in pairwise(abar)]
    power = 1 if name == "linear" else 2  # evenly spaced, or their square roots
    low, high = (end ** (1 / power) for end in numbers[1:])
    return [(low + i / (count - 1) * (high - low)) ** power for i in range(count)]


def card_of(spec: Spec, name: str, weights_sha256: str = "", **about: Any) -> Card:
    """The card of such a model."""
    schedule, stage = spec.schedule, spec.first_stage
    low, high = spec.range
    picture = {
        "size": spec.unet.size * (stage.factor if stage else 1),
        "channels": stage.channels if stage else spec.unet.channels,
    }
    card = Card(
        name=as_slug(name),
        network={**picture, **asdict(spec)},
        summary=f"{spec.kind.replace('-', ' ')}, {ROLES[spec.role]}; settings: {spec.how}",
        classes=tuple(map(str, range(spec.classes))),
        sigma_min=low,
        sigma_max=high,
        sigma_data=1.0 if stage else 0.5,
        feature_module="middle_block",
        weights_sha256=weights_sha256,
        grid="trailing" if schedule else "karras",
        end="zero" if schedule else "sigma_min",
        about=about,
        kind="adm",
    )
    return replace(card, **_as_published(spec)) if spec.role == "consistency" else card


def spec_of(card: Card) -> Spec:
    """What the card of such a model says of it.

    Raises:
        ValueError: that names the field, where it is none of this kind.
    """
    values = dict(card.network)
    picture = {name: values.pop(name, None) for name in ("size", "channels")}
    try:
        spec = Spec(**values)
    except TypeError as error:
        raise ValueError(f"network: {error}") from None
    if {name: card_of(spec, "x").network[name] for name in picture} != picture:
        raise ValueError(f"size and channels do not go with the network, got {shown(picture)}")
    return spec


def _as_published(spec: Spec) -> dict[str, Any]:
    """How a consistency model is sampled: in one evaluation, or where the published indices stand;
    the last of these is the end of the grid, from which there is no step."""
    high, low = spec.sigma_max ** (1 / RHO), spec.sigma_min ** (1 / RHO)
    grid = [(high + i / (spec.points - 1) * (low - high)) ** RHO for i in spec.indices]
    ways = {"1": (spec.sigma_max, 0.0), str(len(grid) - 1): (*grid[:-1], 0.0)}
    chosen = {nfe: Choice("consistency", grid=levels) for nfe, levels in ways.items()}
    return {"auto": chosen, "screened": {nfe: (choice,) for nfe, choice in chosen.items()}}
