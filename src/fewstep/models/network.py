"""A trained network as a model: its denoisers, its prior, its pixels.

Whatever the network is, a `Precondition` makes D(x, sigma) of it; how a folder or a file becomes
such a model stands in `fewstep.models.formats`, and for one's own network in `fewstep.models.own`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.data.idx import to_pixels, to_unit
from fewstep.denoiser import Bound, Covariance, Guided, Wrapper
from fewstep.models.card import Card
from fewstep.models.exact import gaussian_flow
from fewstep.models.guidance import ByNetwork, ClassGradient, ClassGuided
from fewstep.models.identity import checksums, differ, digest_of, of_component
from fewstep.networks.conditioning import indices
from fewstep.networks.preconditioning import denoise
from fewstep.networks.taps import as_map, hear
from fewstep.noise import normal
from fewstep.schedule import Schedule

__all__ = ["Conditional", "FirstStage", "NetworkModel", "Precondition", "assembled"]

DECODED = 8  # states that a first stage decodes at a time
SHOWN = 20  # classes in a message

Label = int | np.integer | str | Sequence[Any] | Tensor | np.ndarray | None


class Precondition(Protocol):
    """Makes D of a raw network: (forward, x, sigma, label, sigma_data, dtype) -> D, [b, ...].

    forward: the network, called as it wants to be called
    x, sigma, label: noisy samples in EDM units, [b, ...]; their level, [b]; rows of classes, [b]
    dtype: the network's arithmetic
    """

    def __call__(
        self,
        forward: Callable[..., Any],
        x: Tensor,
        sigma: Tensor,
        label: Tensor,
        sigma_data: float,
        dtype: torch.dtype,
        /,
    ) -> Tensor: ...


class FirstStage(Protocol):
    """Makes pictures of states: [b, c, h, w] in about [-1, 1], and back.

    picture: shape of one picture, (h, w, c), of a state's height and width
    """

    def picture(self, height: int, width: int) -> tuple[int, int, int]: ...
    def encode(self, pictures: Tensor) -> Tensor: ...
    def decode(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Conditional:
    """D(x, sigma, label) of a model's network; label [b], or [1] for all.

    told: the further numbers that the network is told; None where it is told none
    """

    model: NetworkModel
    told: Tensor | None = None

    @property
    def sigma_min(self) -> float:
        return self.model.card.sigma_min

    @property
    def sigma_max(self) -> float:
        return self.model.card.sigma_max

    @property
    def schedule(self) -> Schedule | None:
        return self.model.schedule

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        return self.by(self.model.compiled or self.model.forward, x, sigma, label)

    def by(self, forward: Callable[..., Any], x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """D by the network as it is, or compiled."""
        model = self.model
        if self.told is not None:
            forward = partial(forward, told=self.told)
        rows = label.expand(len(x))
        return model.precondition(forward, x, sigma, rows, model.card.sigma_data, model.dtype)


@dataclass(frozen=True, eq=False)
class Heard(Wrapper):
    """A Conditional with features: what the card's feature_module returns, [b, c, h, w]."""

    denoiser: Conditional

    def with_features(self, x: Tensor, sigma: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        inner, model = self.denoiser, self.denoiser.model
        if model.features is not None:
            return model.features(x, sigma, label.expand(len(x)))
        out, features = hear(
            model.net,
            model.card.feature_module,
            lambda: inner.by(model.forward, x, sigma, label),
        )
        return out, as_map(features, tuple(x.shape[2:]), 1)


@dataclass(frozen=True, eq=False)
class NetworkModel:
    """A trained network with its card and statistics: everything from noise to pixels but the
    solver.

    net: the module that has the weights
    stats: the statistics that `fewstep.models.formats.native` names, float32 on the device, as far
        as there are any
    forward: what the precondition calls; mostly the network itself
    shape: of one sample; (c, h, w) for pictures
    precondition: makes D of the network; EDM's by default
    compiled: `forward`, compiled
    features: (x, sigma, label) -> (D, features), where the network has a way of its own
    schedule: the network's own, for grids that are uniform in its time; None where it has none
    first_stage: makes pictures of states; None where states are pictures
    needs_label: whether the network has no row for "no class"
    classifier: of noisy states, by which guidance goes then
    guide: a second network, by which guidance goes then
    phases: the number of segments that a student is told, where it is told any
    """

    card: Card
    net: Any
    stats: dict[str, Tensor] = field(repr=False)
    forward: Callable[..., Any] = field(repr=False)
    shape: tuple[int, ...]
    precondition: Precondition = field(default=denoise, repr=False)
    compiled: Callable[..., Any] | None = field(default=None, repr=False)
    features: Callable[..., tuple[Tensor, Tensor]] | None = field(default=None, repr=False)
    schedule: Schedule | None = None
    first_stage: FirstStage | None = field(default=None, repr=False)
    needs_label: bool = False
    classifier: ClassGradient | None = field(default=None, repr=False)
    guide: NetworkModel | None = field(default=None, repr=False)
    phases: int = 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic: the narrowest that there is, since some layers may stay float32."""
        kinds = {p.dtype for p in self.net.parameters()}
        return min(kinds, key=lambda kind: kind.itemsize, default=torch.float32)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.net.parameters()), torch.device("cpu"))

    def facts(self) -> dict[str, Any]:
        """What pictures depend on besides the weights, JSON-ready."""
        card = self.card
        return {
            "shape": list(self.shape),
            "range": [card.sigma_min, card.sigma_max],
            "sigma_data": card.sigma_data,
            "network": digest_of([card.kind, card.network, card.told, card.classes]),
            "schedule": None if self.schedule is None else _levels(self.schedule),
            **({"phases": self.phases} if "phases" in card.told else {}),
        }

    def components(self) -> dict[str, Any]:
        """A hash of every network as it is in memory. Reads all weights once."""
        named = {
            "network": self,
            "autoencoder": self.first_stage,
            "classifier": self.classifier,
            "guide": self.guide,
        }
        nets = {name: getattr(part, "net", None) for name, part in named.items()}
        found = {n: of_component(net) for n, net in nets.items() if isinstance(net, nn.Module)}
        return {"components": found}

    def checksums(self) -> dict[str, str]:
        """Of the network's weights in memory, by dtype: see `fewstep.models.identity`."""
        return checksums(self.net, self.dtype)

    def differs(self, known: Any) -> bool | None:
        """Whether the network's weights are others than those of `checksums`; None: unknown."""
        return differ(known, self.net, self.dtype)

    @property
    def picture(self) -> tuple[int, int, int]:
        """Shape of one picture, (h, w, c).

        Raises:
            ValueError: samples are no pictures.
        """
        if len(self.shape) != 3:
            raise ValueError(
                f"{self.card.name} has no pictures: its samples are {self.shape}, not (c, h, w); "
                "solve(model.denoiser(), model.prior(seeds), ...) gives them as they are"
            )
        channels, height, width = self.shape
        if self.first_stage is not None:
            return self.first_stage.picture(height, width)
        return height, width, channels

    def denoiser(
        self,
        label: Label = None,
        prompt: str | None = None,
        guidance: float | Sequence[float] | Tensor | None = None,
        *,
        negative: str | None = None,
    ) -> Wrapper:
        """D(x, sigma) for one label for all pictures, or one per picture; None is the network
        without class.

        Args:
            label: text that is a class's name means that class, other text of digits an index; a
                number is always an index
            prompt, negative: for models with text, so not here
            guidance: scale of classifier-free guidance, >= 0, one or one per picture, needs a
                label; None or 1 is none, 0 the prediction without a label, and either costs one
                pass. A network that is told the scale takes it in, at no second pass.

        Raises:
            ValueError: for a text, an unknown label, a guidance that is negative or not finite,
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
        if label is None and self.needs_label:
            raise ValueError(
                f"{self.card.name} always wants a class; give label (--label), from 0 to "
                f"{len(self.card.classes) - 1}"
            )
        rows = self._rows(label)
        if self.classifier is not None and label is not None:
            by = 1.0 if guidance is None else scale.item() if scale.ndim == 0 else scale
            base = self._bound(self.conditional(), rows)
            return base if by == 0.0 else ClassGuided(base, self.classifier, by, rows)
        if self.guide is not None:
            by = 1.0 if guidance is None else scale.item() if scale.ndim == 0 else scale
            base = self._bound(self.conditional(), rows)
            if by == 1.0:
                return base
            theirs = self.guide.denoiser(label if self.guide.card.classes else None)
            return theirs if by == 0.0 else ByNetwork(base, theirs, by)
        if "guidance" in self.card.told:
            return self._told(rows, label, guidance, scale)
        base = self.conditional(self._numbers(torch.ones(1)))
        if scale.ndim == 0 and scale == 1:
            return self._bound(base, rows)
        if label is None:
            raise ValueError("guidance needs a label to guide towards; give label too")
        if self.needs_label:
            raise ValueError(
                f"{self.card.name} cannot be used without a class, which guidance away from none "
                "needs; leave guidance out, or give a classifier"
            )
        none = torch.full_like(rows, len(self.card.classes))
        if scale.ndim == 0 and scale == 0:
            return self._bound(base, none[:1])
        strength = scale.item() if scale.ndim == 0 else scale.float().to(self.device)
        means = self._far(rows), self._far(none)
        far = None if means[0] is None or means[1] is None else (means[0], means[1])
        return Guided(base, strength, rows, none, far)

    def conditional(self, told: Tensor | None = None) -> Conditional | Heard:
        """D(x, sigma, label), with features where the card names their module."""
        base = Conditional(self, told)
        return Heard(base) if self.card.feature_module or self.features else base

    def _bound(self, conditional: Conditional | Heard, rows: Tensor) -> Bound:
        """D of these classes, with what is known of their data."""
        known, names = None, ("basis", "variances", "rest")
        if all(name in self.stats for name in names):
            known = Covariance(*(self.stats[name][rows] for name in names))
        return Bound(conditional, rows, self._far(rows), known)

    def _far(self, rows: Tensor) -> Tensor | None:
        """The mean of D at sigma_max, where it is known."""
        far = self.stats.get("far_mean")
        return None if far is None else far[rows]

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
        return self._bound(self.conditional(self._numbers(scale.reshape(-1))), rows)

    def _numbers(self, scale: Tensor) -> Tensor | None:
        """What the network is told beside level and class, [1 or b, numbers]; None for nothing but
        what it takes to be so."""
        if not {"guidance", "phases"} & set(self.card.told):
            return None
        told = indices(self.card.told, torch.ones(1), scale, torch.tensor([self.phases]))
        return None if told is None else told.to(self.device)

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
                named = [f"{i} {name}" for i, name in enumerate(names)]
                named[SHOWN:-1] = ["..."] if len(named) > SHOWN + 1 else named[SHOWN:-1]
                have = ", ".join(named) or "none"
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

        Args:
            seeds: one per picture
            sigma: a lower level to carry it to along the flow of a Gaussian with the data's mean
                and leading covariance (those of the label), in closed form and without an
                evaluation
            label: as in `denoiser`

        Raises:
            ValueError: the model has no such statistics.
        """
        x = self.card.sigma_max * normal(seeds, self.shape, "prior").to(self.device)
        if sigma is None:
            return x
        if not self.card.sigma_min < sigma <= self.card.sigma_max:
            span = f"({self.card.sigma_min}, {self.card.sigma_max}]"
            raise ValueError(f"head_start must lie in {span}, got {sigma}")
        if "basis" not in self.stats:
            raise ValueError(
                f"{self.card.name} has no data statistics for a head start; leave out head_start"
            )
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
        that is gone through again.

        Raises:
            ValueError: it is not in (0, 1].
        """
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
        if self.first_stage is not None:
            with torch.no_grad():
                clean = self.first_stage.encode(clean.to(self.device)).cpu()
        return (clean + sigma * normal(seeds, self.shape, "prior")).to(self.device), sigma

    def decode(self, x: Tensor) -> np.ndarray:
        """Pictures uint8 [n, h, w, c] from clean states in [-1, 1]. Errors: as `picture`."""
        if self.first_stage is not None:
            with torch.no_grad():
                x = torch.cat([self.first_stage.decode(one) for one in x.float().split(DECODED)])
        height, width, channels = self.picture
        x = x.reshape(-1, channels, height, width)
        return to_pixels(x).permute(0, 2, 3, 1).cpu().numpy()


def assembled(
    card: Card,
    net: Any,
    stats: Mapping[str, Tensor],
    device: str | torch.device = "cpu",
    compile: bool = False,
    **more: Any,
) -> NetworkModel:
    """The model of a network that is where it will run.

    Args:
        card, net, stats: as of `NetworkModel`; the statistics are moved there
        device: where that is
        compile: torch.compile the network
        more: further fields
    """
    placed = {name: value.to(device) for name, value in stats.items()}
    compiled = torch.compile(net) if compile else None
    return NetworkModel(card, net, placed, net, net.image_shape, compiled=compiled, **more)


def _levels(schedule: Schedule) -> list[float]:
    """Sigma at a few of its times, by which it is known."""
    low, high = schedule.t_min, schedule.t_max
    return [float(schedule.sigma(low + i / 4 * (high - low))) for i in range(5)]
