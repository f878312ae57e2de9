"""Reference solves: the same seed's exact solution, by a fine solve, kept in a cache.

A sampler's error is the distance of its endpoint to the reference's, so a reference is a float32
endpoint, not a picture. Each is kept at both ends at which samplers stop: x at sigma_min, and D
there, which is x at 0 up to O(sigma_min^2).

The cache (`fewstep.cache`) has a file for each CHUNK seeds. A model in memory that has no hash of
its weights has no cache.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.cache import cache_folder, kept_at, recall
from fewstep.denoiser import Denoiser
from fewstep.models import Model
from fewstep.models.labels import by_seed
from fewstep.reference import ReferenceSolve
from fewstep.sampling.choose import identify

__all__ = ["References"]

CHUNK = 250  # seeds in a file of the cache


@dataclass(frozen=True, eq=False)
class References:
    """Reference endpoints of one model under one condition.

    label, guidance, prompt: the condition, see `fewstep.models.labels`
    folder: of the cache; `cache_folder()` unless given
    batch: pictures at a time
    """

    model: Model
    how: ReferenceSolve = ReferenceSolve()
    label: int | str | None = None
    guidance: float | None = None
    folder: Path | None = None
    batch: int = 50
    prompt: str | tuple[str, ...] | None = None

    @property
    def said(self) -> str | None:
        """The prompt; of several, how many, and a hash of them."""
        if self.prompt is None or isinstance(self.prompt, str):
            return self.prompt
        digest = hashlib.sha256("\0".join(self.prompt).encode()).hexdigest()
        return f"{len(self.prompt)} texts, SHA-256 {digest[:16]}"

    def facts(self) -> dict[str, Any]:
        """Everything that the endpoints depend on but the seed, JSON-ready."""
        return {
            "model": self.model.card.name,
            "weights": self.model.card.weights_sha256,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "label": self.label,
            "guidance": self.guidance,
            **({} if self.prompt is None else {"prompt": self.said}),
            **asdict(self.how),
        }

    def endpoints(
        self, seeds: Sequence[int], report: Callable[[int], None] = lambda done: None
    ) -> np.ndarray:
        """float32 [n, 2, c, h, w]: x at sigma_min and at 0, from the cache or solved now.

        Args:
            report: called with the number of seeds done
        """
        out = np.empty((len(seeds), 2, *self.model.shape), np.float32)
        for part, values in self.chunks(seeds):
            out[part] = values
            report(part.stop)
        return out

    def chunks(self, seeds: Sequence[int]) -> Iterator[tuple[slice, np.ndarray]]:
        """The same, file by file: slices of `seeds` and their endpoints."""
        for start in range(0, len(seeds), CHUNK):
            part = slice(start, min(start + CHUNK, len(seeds)))
            yield part, self._chunk(tuple(int(seed) for seed in seeds[part]))

    def error(self, seeds: Sequence[int]) -> float:
        """Their own error: root mean square distance at sigma_min to a solve three times as fine by
        another method, [-1, 1] pixel units."""
        both = (self, self.finer)
        ours, theirs = (one.endpoints(seeds)[:, 0].astype(float) for one in both)
        return float(np.sqrt(np.square(ours - theirs).reshape(len(seeds), -1).mean(1)).mean())

    @property
    def finer(self) -> References:
        """The solves that tell the error of these."""
        nfe = min(3 * self.how.nfe, 1000)
        return replace(self, how=ReferenceSolve("exp-adams-4", nfe, "log-snr"))

    def missing(self, seeds: Sequence[int]) -> int:
        """How many of the seeds would be solved now."""
        if not self.model.card.weights_sha256:
            return len(seeds)
        parts = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
        files = [kept_at(self._folder, self._key(part)) for part in parts]
        return sum(len(part) for part, path in zip(parts, files, strict=True) if not path.is_file())

    @torch.inference_mode()
    def seconds_per_evaluation(self) -> float:
        """Wall time of one evaluation of one picture, from one batch."""
        x = self.model.prior(range(self.batch))
        level = torch.full((len(x),), float(self.model.card.sigma_max), device=x.device)
        begun = time.perf_counter()
        self._bound(range(self.batch))(x, level).cpu()
        return (time.perf_counter() - begun) / len(x)

    @cached_property
    def _bound(self) -> Callable[[Sequence[int]], Denoiser]:
        """From seeds to the denoiser under their condition."""
        return by_seed(self.model, self.label, self.prompt, self.guidance)

    @property
    def _folder(self) -> Path:
        return (self.folder or cache_folder()) / "references"

    def _key(self, seeds: Sequence[int]) -> dict[str, Any]:
        return {**self.facts(), **self._known, "seeds": tuple(seeds)}

    @cached_property
    def _known(self) -> dict[str, Any]:
        """What else the endpoints depend on: the model's settings and its weights in memory."""
        return {**getattr(self.model, "facts", dict)(), **identify(self.model)}

    def _chunk(self, seeds: tuple[int, ...]) -> np.ndarray:
        if not self.model.card.weights_sha256:
            return self._solved(seeds).numpy()
        shape = (len(seeds), 2, *self.model.shape)
        return recall(self._folder, self._key(seeds), shape, lambda: self._solved(seeds)).numpy()

    def _solved(self, seeds: Sequence[int]) -> Tensor:
        return torch.cat([self._solve(part) for part in _split(seeds, self.batch)])

    @torch.inference_mode()
    def _solve(self, seeds: Sequence[int]) -> Tensor:
        try:
            return self.how.ends(self._bound(seeds), self.model.prior(seeds)).float().cpu()
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} (seeds {seeds[0]} to {seeds[-1]})") from None


def _split(seeds: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(seeds), size):
        yield seeds[start : start + size]
