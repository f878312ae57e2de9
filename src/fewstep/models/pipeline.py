"""A diffusers pipeline as a model: prompts, denoisers, prior, and pictures of latents.

The state is x = x_t / alpha_t in EDM units, float32, of pixels or of scaled latents as the network
sees them. The pipeline's own loop and scheduler are not used; its components are, as they are.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.idx import to_pixels, to_unit
from fewstep.denoiser import Bound, Clipped, Guided, Predicted
from fewstep.models.card import Card
from fewstep.models.components import (
    Network,
    Tapped,
    device_of,
    dtype_of,
    guidance_embedding,
    latent_scale,
    pixels_per_latent,
    quiet,
    roomy,
    told_guidance,
)
from fewstep.models.families import Condition, Family
from fewstep.models.identity import checksums, differ, of_component
from fewstep.models.process import Process, Scheduled, betas_of, read_process, said_of_process
from fewstep.models.students import Consistency, DiscreteEnd
from fewstep.models.texts import TextCache, on_leaves, warn_of_cuts
from fewstep.networks.conditioning import guidance_index, phases_index
from fewstep.networks.taps import has_module
from fewstep.noise import normal

__all__ = ["PipelineModel", "process_of"]

Text = str | Sequence[str] | None
Size = tuple[int, int]
LARGEST = 16_384  # pixels to a side
# what pictures depend on besides weights: of the pipeline, its autoencoder, the latter's config
CONDITIONING = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
DECODING = (
    "use_slicing",
    "use_tiling",
    "tile_sample_min_size",
    "tile_latent_min_size",
    "tile_overlap_factor",
)
SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")
UNUSED = ("scheduler", "safety_checker", "feature_extractor", "image_encoder")  # of its components


@dataclass(frozen=True, eq=False)
class PipelineModel:
    """A loaded pipeline, from noise and text to pixels; everything but the solver.

    pipe: the diffusers pipeline; `model.pipe.vae.enable_tiling()` and its like work as ever
    size: height and width of the pictures, in pixels
    forward: the network, compiled or not
    texts: what texts became in earlier calls, which are not encoded again
    loras: adapters whose weights are in the network's, as `facts` names them
    phases: the number of segments that a student is told, where it is told any
    """

    card: Card
    pipe: Any = field(repr=False)
    family: Family = field(repr=False)
    process: Process
    size: Size
    forward: Callable[..., Any] = field(repr=False)
    texts: TextCache = field(default_factory=TextCache, repr=False)
    loras: tuple[Mapping[str, Any], ...] = ()
    phases: int = 1

    def __post_init__(self) -> None:
        step = self.scale * math.lcm(self.family.patch(self.net), self.family.step(self.net))
        if any(side < step or side % step or side > LARGEST for side in self.size):
            raise ValueError(
                f"size must be multiples of {step} pixels up to {LARGEST} for {self.card.name}, "
                f"got {self.size[0]}x{self.size[1]}"
            )

    @property
    def net(self) -> Any:
        """The network that denoises."""
        return getattr(self.pipe, self.family.network)

    @property
    def autoencoder(self) -> Any:
        """What makes pictures of latents; None where the network works on pixels."""
        return getattr(self.pipe, self.family.autoencoder) if self.family.autoencoder else None

    @property
    def dtype(self) -> torch.dtype:
        return next(self.net.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def scale(self) -> int:
        """Pixels to a side of one element of the state."""
        return pixels_per_latent(self.autoencoder)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one state, (c, h, w): pixels or latents."""
        height, width = self.size
        return int(self.net.config.in_channels), height // self.scale, width // self.scale

    @property
    def picture(self) -> tuple[int, int, int]:
        """Shape of one picture, (h, w, c)."""
        vae = self.autoencoder
        return *self.size, int(self.shape[0] if vae is None else vae.config.in_channels)

    @property
    def schedule(self) -> Any:
        """The schedule by whose time grids are uniform."""
        return self.process.grid_schedule

    def facts(self) -> dict[str, Any]:
        """What pictures depend on besides the weights, JSON-ready."""
        vae = self.autoencoder
        used = [name for name in CONDITIONING if name in self.pipe.config]
        decoding = {name: getattr(vae, name) for name in DECODING if hasattr(vae, name)}
        scaling = {name: vae.config[name] for name in SCALING if vae and name in vae.config}
        return {
            "size": list(self.size),
            "scheduler": said_of_process(self.pipe.scheduler),
            "autoencoder": {**decoding, **scaling},
            "conditioning": {name: self.pipe.config[name] for name in used},
            **({"loras": [dict(one) for one in self.loras]} if self.loras else {}),
            **({"phases": self.phases} if "phases" in self.card.told else {}),
        }

    def components(self) -> dict[str, Any]:
        """A hash of every component that has weights or a vocabulary, as it is in memory. Reads
        all weights once."""
        parts = {name: part for name, part in self.pipe.components.items() if part is not None}
        used = {name: part for name, part in parts.items() if name not in UNUSED}
        return {"components": {name: of_component(part) for name, part in used.items()}}

    def checksums(self) -> dict[str, str]:
        """Of the network's weights as they are in memory, by dtype: see `fewstep.models.identity`.
        Reads them once for each dtype."""
        return checksums(self.net, self.dtype)

    def differs(self, known: Any) -> bool | None:
        """Whether the network's weights are others than those of `checksums`; None: unknown."""
        return differ(known, self.net, self.dtype)

    def with_size(self, height: int, width: int) -> PipelineModel:
        """The same model for pictures of another size, in pixels."""
        process = process_of(self.pipe, self.family, (height, width))
        return replace(self, size=(height, width), process=process)

    @torch.no_grad()
    def denoiser(
        self,
        label: Any = None,
        prompt: Text = None,
        guidance: float | Sequence[float] | Tensor | None = None,
        *,
        negative: Text = None,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
    ) -> Any:
        """D(x, sigma) with the prompt filled in; text is encoded here, once.

        A prompt longer than the text encoder reads: a UserWarning with what was cut.

        Args:
            prompt: one text for all pictures, or one per picture; None is the empty text
            guidance: scale of classifier-free guidance, one or one per picture, >= 0; None or 1 is
                none and 0 the unconditional prediction, at one network call, any other costs two.
                A network that takes the scale as an input (LCM) is told it and costs one call.
            negative: the negative prompt, in place of the empty text
            original_size, crops_coords_top_left, target_size: the size conditioning of SDXL,
                (height, width) each; the picture's own size, uncropped, where left out

        Raises:
            ValueError: for what the model does not take, and for counts that do not agree.
        """
        if label is not None:
            raise ValueError(f"{self.card.name} has no classes; leave out label")
        if self.family.encode is None:
            given = {"prompt": prompt, "negative": negative, "guidance": guidance}
            named = [name for name, value in given.items() if value not in (None, 1)]
            if named:
                raise ValueError(f"{self.card.name} takes no text; leave out {' and '.join(named)}")
            return self._finish(Bound(self._network(), {}))
        scale = self._checked(self._scale(guidance), guidance)
        told = told_guidance(self.net)
        guided = scale is not None and not told
        if guided and prompt is None:
            raise ValueError("guidance needs a prompt to guide towards; give prompt too")
        if negative is not None and not guided:
            raise ValueError(
                "negative acts through guidance; give guidance above 1 too"
                if not told
                else f"{self.card.name} is told its guidance and takes no negative prompt"
            )
        wanted = {
            "original_size": original_size or self.size,
            "crops_coords_top_left": crops_coords_top_left,
            "target_size": target_size or self.size,
        }
        sizes = {name: (high, wide) for name, (high, wide) in wanted.items()}  # from lists too
        cond, uncond = self._encode(prompt, negative, guided, sizes)
        if told:
            w = torch.ones(1, device=self.device) if scale is None else scale.reshape(-1)
            phases = torch.tensor([self.phases], device=self.device)
            in_segments = "phases" in self.card.told
            index = phases_index(phases) if in_segments else guidance_index(w)
            cond = cond | guidance_embedding(self.net, index)
        if uncond is None:
            return self._finish(Bound(self._network(), cond))
        assert scale is not None
        return self.under(cond, uncond, scale)

    def under(self, cond: Condition, uncond: Condition | None, scale: Tensor | None) -> Any:
        """D(x, sigma) under conditions that are encoded already.

        Args:
            cond, uncond: as the family's `encode` makes them; no guidance where uncond is None
            scale: of guidance, [] or [b]
        """
        if uncond is None or scale is None:
            return self._finish(Bound(self._network(), cond))
        one = float(scale) if scale.ndim == 0 else scale
        if scale.ndim == 0 and one == 0:
            return self._finish(Bound(self._network(), uncond))
        return self._finish(Guided(self._network(), one, cond, uncond))

    @torch.no_grad()
    def condition(self, texts: Sequence[str | None]) -> Condition:
        """What the network is given for some texts, one row each; None stands for no text. Empty
        where the model takes no text."""
        wanted = dict.fromkeys(("original_size", "target_size"), self.size)
        sizes = {**wanted, "crops_coords_top_left": (0, 0)}
        return {} if self.family.encode is None else self._half(texts, sizes)

    def _checked(self, scale: Tensor | None, guidance: Any) -> Tensor | None:
        """The scale. Raises: ValueError where a student was distilled for other scales."""
        card, told = self.card, self.card.told
        if card.built_in_guidance is not None and guidance is not None:
            raise ValueError(
                f"{card.name} has guidance {card.built_in_guidance:g} built in, in one pass; "
                "leave guidance out"
            )
        if {"gamma", "phases"} & set(told) and guidance is not None:
            raise ValueError(f"{card.name} was distilled without guidance; leave guidance out")
        known = card.distilled.guidance if card.distilled else None
        if "guidance" not in told or not isinstance(known, tuple):
            return scale
        low, high = known
        if scale is None and guidance is None:
            return torch.tensor((low + high) / 2, device=self.device)
        given = torch.ones(1) if scale is None else scale
        if not bool(((given >= low) & (given <= high)).all()):
            raise ValueError(
                f"{card.name} was distilled for guidance from {low:g} to {high:g}, got {guidance}"
            )
        return scale

    def _scale(self, guidance: float | Sequence[float] | Tensor | None) -> Tensor | None:
        """The scale as a tensor, [] or [b]; None where there is no guidance."""
        if guidance is None:
            return None
        scale = torch.as_tensor(guidance, dtype=torch.float32, device=self.device)
        if scale.ndim > 1 or not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            raise ValueError(
                f"guidance must be finite and at least 0, one or one per picture, got {guidance}"
            )
        return None if scale.ndim == 0 and float(scale) == 1 else scale

    def _encode(
        self,
        prompt: Text,
        negative: Text,
        guided: bool,
        sizes: dict[str, Size],
    ) -> tuple[Condition, Condition | None]:
        texts, negatives = _texts("prompt", prompt) or [""], _texts("negative", negative)
        count = max(len(texts), len(negatives or []))
        for name, value in (("prompt", texts), ("negative", negatives)):
            if value is not None and len(value) not in (1, count):
                raise ValueError(
                    f"{name} must be one text or one per picture, got {len(value)} for {count}"
                )
        uncond = self._half(negatives or [None], sizes) if guided else None
        return self._half(texts, sizes), uncond

    def _half(self, texts: Sequence[str | None], sizes: dict[str, Size]) -> Condition:
        """The condition of some texts, one row each. Each is encoded by itself, so that what it
        becomes depends on no other, to the bit."""
        rows = [
            self.texts.recall((text, *sizes.values()), partial(self._said, text, sizes))
            for text in texts
        ]
        return on_leaves(lambda *leaves: torch.cat(leaves).to(self.device), *rows)

    def _said(self, text: str | None, sizes: dict[str, Size]) -> Condition:
        texts = None if text is None else [text]
        warn_of_cuts(self.pipe, self.family.tokenizers, texts or [])
        assert self.family.encode is not None
        with quiet():
            return self.family.encode(self.pipe, texts, sizes)

    def _network(self) -> Predicted:
        """D of the network under conditions, (x, sigma, condition)."""
        inner = network = Network(self.forward)
        if has_module(self.net, self.card.feature_module):
            patch = self.family.patch(self.net)
            inner = Tapped(network, self.net, self.card.feature_module, patch)
        process = self.process
        return Predicted(
            inner, process.schedule, process.prediction, process.time_scale, dtype=self.dtype
        )

    def _finish(self, denoiser: Any) -> Any:
        """The boundary of a student, clipping, and the time of the grids, around a bound
        denoiser."""
        process = self.process
        if self.card.distilled and self.card.distilled.boundary == "discrete":
            denoiser = Consistency(denoiser, DiscreteEnd(process.schedule))
        if process.clip is not None:
            denoiser = Clipped(denoiser, -process.clip, process.clip)
        if process.grid_schedule is not process.schedule:
            denoiser = Scheduled(denoiser, process.grid_schedule)
        return denoiser

    def prior(self, seeds: Sequence[int], sigma: float | None = None, label: Any = None) -> Tensor:
        """The start of sampling, float32 [n, c, h, w]: the pipeline's x_t = z, keyed by seed.

        In EDM units that is z / alpha: sqrt(1 + sigma_max^2) z for VP, (1 + sigma_max) z for a flow
        at t = 1 - 1e-5.

        Raises:
            ValueError: for a lower sigma: a pipeline has no statistics for a head start.
        """
        if sigma is not None:
            raise ValueError(
                f"{self.card.name} has no data statistics for a head start; leave out head_start"
            )
        return self._noise(seeds) / self.process.schedule.alpha(self.process.sigma_max)

    def start(
        self, images: np.ndarray | Tensor, seeds: Sequence[int], strength: float
    ) -> tuple[Tensor, float]:
        """Where image-to-image starts: (x, sigma), the pictures with noise up to sigma.

        Solve on from there: `solve(denoiser, x, ..., sigma_max=sigma)`.

        Args:
            images: uint8 [n, h, w, c] of the model's size, one for all seeds or one per seed
            strength: in (0, 1]; the share of the network's own time that is gone through again, 1
                keeps nothing of the picture but what is left at sigma_max
        """
        sigma = self.level(strength)
        clean = self.encode(images)
        if len(clean) not in (1, len(seeds)):
            raise ValueError(
                f"images must be one or one per seed, got {len(clean)} for {len(seeds)}"
            )
        return clean + sigma * self._noise(seeds), sigma

    def level(self, strength: float) -> float:
        """The noise level at which `start` puts a picture.

        Raises:
            ValueError: for a strength that is not in (0, 1], or too small for the network's range.
        """
        schedule = self.process.grid_schedule
        t = schedule.t_clean + strength * (schedule.t_max - schedule.t_clean)
        if not 0 < strength <= 1 or t <= schedule.t_min:
            raise ValueError(f"strength must lie in (0, 1] and not be tiny, got {strength}")
        return schedule.sigma(t) if strength < 1 else self.process.sigma_max

    def _noise(self, seeds: Sequence[int]) -> Tensor:
        seeds = [operator.index(seed) for seed in seeds]
        return normal(seeds, self.shape, "prior").to(self.device)

    @torch.no_grad()
    def encode(self, images: np.ndarray | Tensor) -> Tensor:
        """Clean states x_0, float32 [n, c, h, w], of pictures uint8 [n, h, w, c].

        Latents are the mode of the autoencoder's posterior, so no noise is drawn.

        Raises:
            ValueError: the pictures have another size.
        """
        pictures = torch.as_tensor(images)
        vae, wanted = self.autoencoder, self.picture
        if (
            pictures.ndim != 4
            or tuple(pictures.shape[1:]) != wanted
            or pictures.is_floating_point()
        ):
            raise ValueError(
                f"images must be uint8 [n, {', '.join(map(str, wanted))}], got "
                f"{pictures.dtype} {list(pictures.shape)}; resize them, or load with size=(h, w)"
            )
        x = to_unit(pictures.permute(0, 3, 1, 2)).to(self.device)
        if vae is None:
            return x
        with roomy(vae, self.family.upcasts):
            out = vae.encode(x.to(dtype_of(vae)))
        latents = out.latents if hasattr(out, "latents") else out.latent_dist.mode()
        factor, shift = latent_scale(vae)
        return (latents.float() - shift) * factor

    def decode(self, x: Tensor) -> np.ndarray:
        """Pictures uint8 [n, h, w, c] from clean states. Errors as in `pictures`."""
        return to_pixels(self.pictures(x)).permute(0, 2, 3, 1).cpu().numpy()

    @torch.no_grad()
    def pictures(self, x: Tensor) -> Tensor:
        """Pictures float32 [n, c, h, w] in [-1, 1], but for what sticks out, from clean states.

        Raises:
            FloatingPointError: the autoencoder returns NaN or infinity.
        """
        vae = self.autoencoder
        if vae is None:
            return x.float()
        factor, shift = latent_scale(vae)
        latents = x.float().to(device_of(vae)) / factor + shift
        with roomy(vae, self.family.upcasts):
            x = vae.decode(latents.to(dtype_of(vae))).sample.float()
        if not torch.isfinite(x).all():
            raise FloatingPointError(
                f"the autoencoder of {self.card.name} returned NaN or infinity; try dtype "
                "float32 or bfloat16"
            )
        return x


def process_of(pipe: Any, family: Family, size: Size) -> Process:
    """What the pipeline's scheduler says of its process, for pictures of one size in pixels."""
    vae = getattr(pipe, family.autoencoder) if family.autoencoder else None
    side = pixels_per_latent(vae) * family.patch(getattr(pipe, family.network))
    scheduler = pipe.scheduler
    tokens = (size[0] // side) * (size[1] // side)
    return read_process(type(scheduler).__name__, scheduler.config, betas_of(scheduler), tokens)


def _texts(name: str, value: Text) -> list[str] | None:
    if value is None:
        return None
    texts = [value] if isinstance(value, str) else list(value)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be a text, or a list of texts, got {value!r}")
    return texts
