"""What is sampled: seeds, conditions and pictures, as one frozen object."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fewstep.arguments import number, whole

__all__ = ["CONDITIONS", "Request", "one_per_seed"]

CONDITIONS = ("label", "prompt", "negative", "guidance")


@dataclass(frozen=True)
class Request:
    """What is sampled: the seeds, what each picture shows, and where it starts.

    A condition is one for all pictures, or a list with one per seed. The command shows these lines
    as its help.

    Attributes:
        seeds: Seeds, one per picture: 0-63 or 1,5,7-9.
        label: Class name or index. Text that is a class's name means that class, other text of
            digits an index; a number is always an index.
        prompt: Text that the picture shows, for models that take one.
        negative: Negative prompt: text that guidance moves away from.
        guidance: Scale of classifier-free guidance, with a prompt or a label; any but 1 doubles the
            network calls. 1 is none, 0 ignores the prompt. Default: none. (Pipelines of diffusers
            have 7.5, 5 or 7.)
        image: Start from this picture; its largest middle part of the right shape is resized.
        strength: How far to leave the image, above 0 and up to 1; the whole budget is spent within.
            Default: 0.8.
        size: Height and width of a pipeline's pictures in pixels. Default: those of its training.
    """

    seeds: tuple[int, ...]
    label: Any = None
    prompt: Any = None
    negative: Any = None
    guidance: Any = None
    image: Any = None
    strength: float | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", _whole(self.seeds))
        for name in CONDITIONS:
            object.__setattr__(self, name, _plain(getattr(self, name)))
            one_per_seed(name, getattr(self, name), len(self.seeds))
        for scale in self.guidance if isinstance(self.guidance, list) else [self.guidance]:
            if scale is not None:
                number("guidance", scale, finite=False)
        if self.strength is not None:
            number("strength", self.strength, finite=False)
        if self.image is None and self.strength is not None:
            raise ValueError("strength says how far to leave an image; give image too")

    @property
    def given(self) -> dict[str, Any]:
        """The conditions by name; None where one is left out."""
        return {name: getattr(self, name) for name in CONDITIONS}


def one_per_seed(name: str, value: Any, count: int) -> bool:
    """Whether a condition is given for each picture.

    Raises:
        ValueError: it is a list of another length.
    """
    if value is None or isinstance(value, str) or not hasattr(value, "__len__"):
        return False
    if len(value) != count:
        raise ValueError(f"{name} must be one or one per seed, got {len(value)} for {count}")
    return True


def _whole(seeds: Iterable[Any]) -> tuple[int, ...]:
    try:
        found = tuple(whole("each seed", seed) for seed in _rows(seeds))
    except (TypeError, ValueError):
        raise ValueError(
            f"seeds must be whole numbers, one per picture, such as range(16), got {seeds!r:.80}"
        ) from None
    if not found:
        raise ValueError("seeds must name at least one picture")
    return found


def _rows(seeds: Any) -> Iterable[Any]:
    if isinstance(seeds, str | bytes | dict):
        raise TypeError
    return seeds


def _plain(value: Any) -> Any:
    """The same with the numbers of torch and numpy as Python's, which JSON knows."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
