"""Labels and texts by seed: one for all, several that take turns, or one that each seed draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fewstep.denoiser import Denoiser
from fewstep.noise import key

__all__ = ["by_seed", "drawn_label", "drawn_labels"]


def drawn_label(seed: int, count: int) -> int:
    """The class that a seed draws of so many, the same wherever it is sampled.

    Raises:
        ValueError: there are no classes.
    """
    if not count:
        raise ValueError("label all draws a class, and this model has no classes; leave out label")
    return key(seed, "label") % count


def drawn_labels(seeds: Sequence[int], model: Any) -> list[int]:
    """The class that each seed draws of a model's."""
    return [drawn_label(seed, len(model.card.classes)) for seed in seeds]


def by_seed(
    model: Any,
    label: int | str | None,
    prompt: str | Sequence[str] | None = None,
    guidance: float | None = None,
) -> Callable[[Sequence[int]], Denoiser]:
    """From seeds to a model's denoiser, bound to their labels.

    Args:
        label: class name or index; several, with commas, take turns: seed s has the s-th, counted
            round; all: each seed draws one
        prompt: one for all; several take turns as labels do
        guidance: as in `model.denoiser`

    Raises:
        ValueError: as `model.denoiser`, for each of the labels.
    """
    if prompt is not None and not isinstance(prompt, str):
        model.denoiser(label, prompt[0], guidance)  # raises where it takes no text
        texts = prompt
        return lambda seeds: model.denoiser(
            label, [texts[seed % len(texts)] for seed in seeds], guidance
        )
    classes = model.card.classes
    names = [name.strip() for name in label.split(",")] if isinstance(label, str) else [label]
    if label == "all":
        drawn_label(0, len(classes))
    elif len(names) == 1 or label in classes:
        denoiser = model.denoiser(label, prompt, guidance)
        return lambda seeds: denoiser
    else:
        model.denoiser(names, prompt, guidance)  # raises for an unknown one

    def chosen(seed: int) -> int | str | None:
        return drawn_label(seed, len(classes)) if label == "all" else names[seed % len(names)]

    return lambda seeds: model.denoiser([chosen(seed) for seed in seeds], prompt, guidance)
