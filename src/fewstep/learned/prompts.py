"""Prompts to train a solver under: for each seed one of many texts, drawn by the seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fewstep.denoiser import Denoiser
from fewstep.learned.settings import TRAINING, VALIDATION
from fewstep.learned.validation import Conditions
from fewstep.noise import key

__all__ = ["prompted"]

HELD_OUT = 10  # every tenth text


def prompted(
    model: Any,
    texts: Sequence[str],
    *,
    negative: str | None = None,
    guidance: float | None = None,
) -> Conditions:
    """Conditions for `train`, of texts.

    Args:
        model: a pipeline (`PipelineModel`); each text is encoded once, within a bound
        texts: what is drawn from. Every tenth distinct one is for validation alone, where there are
            ten or more.
        negative, guidance: as in `model.denoiser`, the same for all

    Raises:
        ValueError: there is no text, and where the model takes none.
    """
    if not texts:
        raise ValueError("prompts must be at least one text")
    if model.card.kind != "pipeline":
        raise ValueError(f"{model.card.name} takes no text; leave out prompts")
    distinct = list(dict.fromkeys(texts))
    held_out = distinct[HELD_OUT - 1 :: HELD_OUT] or distinct
    kept = [text for i, text in enumerate(distinct) if (i + 1) % HELD_OUT]

    def drawn(seed: int) -> str:
        pool = held_out if VALIDATION <= seed < TRAINING else kept
        return pool[key(seed, "prompt") % len(pool)]

    def conditions(seeds: Sequence[int]) -> Denoiser:
        texts = [drawn(seed) for seed in seeds]
        return model.denoiser(prompt=texts, negative=negative, guidance=guidance)

    return conditions
