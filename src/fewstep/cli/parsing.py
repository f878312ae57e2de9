"""How the text of an option becomes a value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "PARSERS",
    "parse_budgets",
    "parse_grid",
    "parse_guidance",
    "parse_lora",
    "parse_many_seeds",
    "parse_seeds",
    "parse_size",
    "parse_widths",
    "refuse_beside",
    "words",
]

MOST_SEEDS = 1_000_000


def parse_seeds(text: str, what: str = "seeds") -> list[int]:
    """Seeds, or other whole numbers, from "0-63" or "1,5,7-9", in that order, each once.

    Raises:
        ValueError: that shows the form.
    """
    seeds: dict[int, None] = {}
    for part in text.split(","):
        run = _run(part, text, what)
        if len(run) > MOST_SEEDS or len(seeds) >= MOST_SEEDS:
            raise ValueError(f"at most {MOST_SEEDS} {what} at a time, got {text!r}")
        seeds.update(dict.fromkeys(run))
    return list(seeds)


def parse_many_seeds(text: str) -> range | list[int]:
    """The same for shards; one run of seeds may be of any length, and takes no memory.

    Raises:
        ValueError: that shows the form.
    """
    return parse_seeds(text) if "," in text else _run(text, text, "seeds")


def _run(part: str, text: str, what: str) -> range:
    low, dash, high = part.strip().partition("-")
    digits = [low, high] if dash else [low]
    if not all(one.isascii() and one.isdecimal() for one in digits):
        raise ValueError(f"{what} are written like 0-63 or 1,5,7-9, got {text!r}")
    if max(map(len, digits)) > 19 or int(high or low) < int(low) or int(high or low) >= 2**63:
        raise ValueError(f"{what} must rise and stay below 2^63, got {part.strip()!r}")
    return range(int(low), int(high or low) + 1)


def parse_budgets(text: str) -> tuple[int, ...]:
    """Budgets from "3,5,7" or "3-8". Raises ValueError that shows the form."""
    try:
        return tuple(parse_seeds(text))
    except ValueError:
        raise ValueError(f"--nfe is written like 3,5,7 or 3-8, got {text!r}") from None


def parse_grid(text: str | None) -> str | list[float] | None:
    """A grid's name as it is, or sigmas from "80,9,1"."""
    if text is None or not (text[:1].isdigit() or "," in text):
        return text
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"a grid is a name or sigmas like 80,9,1,0.002, got {text!r}") from None


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) from "512x768", or from "512" for a square."""
    height, by, width = text.lower().partition("x")
    sides = (height, width if by else height)
    if not all(side.isascii() and side.isdecimal() and len(side) < 10 for side in sides):
        raise ValueError(f"a size is written HEIGHTxWIDTH in pixels, like 512x768, got {text!r}")
    return int(sides[0]), int(sides[1])


def parse_widths(text: str) -> tuple[int, ...]:
    """Channel counts from "64,128"."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"widths are written like 64,128, got {text!r}") from None


def parse_guidance(text: str) -> float | tuple[float, float]:
    """A scale from "4", or the ends of a range from "2,8"."""
    try:
        parts = [float(part) for part in text.split(",")]
    except ValueError:
        parts = []
    if len(parts) not in (1, 2):
        raise ValueError(f"guidance is one scale or two, like 4 or 2,8, got {text!r}")
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def parse_lora(text: str) -> tuple[Path, float]:
    """A file and its scale from "FILE" or "FILE:0.8"."""
    name, colon, tail = text.rpartition(":")
    try:
        scale = float(tail) if colon else 1.0
    except ValueError:
        name, scale = text, 1.0
    name = name if colon and name else text
    if not name or not math.isfinite(scale):
        raise ValueError(
            f"adapters are written FILE or FILE:SCALE, like style.safetensors:0.8, got {text!r}"
        )
    return Path(name), scale


def words(text: str, what: str = "a list") -> tuple[str, ...]:
    """Parts between commas, each once. Raises ValueError where there is none."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise ValueError(f"{what} must name at least one, got {text!r}")
    return found


def refuse_beside(what: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError that says `what` and names those of the options that were given."""
    given = [name for name, value in options.items() if value is not None and value is not False]
    if given:
        raise ValueError(f"{what}: leave out {' and '.join(given)}")


# by the name of the field; the fields of other types are words with commas between
PARSERS: dict[str, Callable[[str], Any]] = {
    "grid": parse_grid,
    "guidance": parse_guidance,
    "seeds": parse_seeds,
    "size": parse_size,
    "solver": str,
    "label": str,
    "prompt": str,
    "negative": str,
    "image": str,
    "nfe": parse_budgets,
    "budgets": parse_budgets,
    "phases": lambda text: tuple(parse_seeds(text, "phases")),
}
