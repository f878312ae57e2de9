"""Arguments of the wrong kind, refused in one line that names the argument and the value.

Python would take `nfe=True` for 1 and `final="no"` for yes, and say of most others that some object
has no attribute. These are called where a value comes in from outside.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["either", "function", "levels", "number", "place", "sides", "text", "whole"]


def whole(name: str, value: Any, least: int | None = None) -> int:
    """A whole number as Python's.

    Raises:
        ValueError: a bool, a fraction, anything else, or a number below `least`.
    """
    floor = "" if least is None else f", at least {least}"
    try:
        found = operator.index(value)
    except TypeError:
        found = None
    if found is None or _is_bool(value) or (least is not None and found < least):
        raise ValueError(f"{name} must be a whole number{floor}, got {value!r:.80}")
    return found


def number(name: str, value: Any, finite: bool = True) -> float:
    """A number as Python's, and a finite one unless the caller looks at that.

    Raises:
        ValueError: a bool, text, a tensor of several numbers; NaN or infinity.
    """
    try:
        found = None if isinstance(value, str | bytes) or _is_bool(value) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = None
    if found is None or (finite and not math.isfinite(found)):
        raise ValueError(f"{name} must be a {'finite ' * finite}number, got {value!r:.80}")
    return found


def text(name: str, value: Any) -> str:
    """Text that is not empty. Raises ValueError for anything else."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be text, got {value!r:.80}")
    return value


def either(name: str, value: Any) -> bool:
    """True or False. Raises ValueError for anything else."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r:.80}")
    return value


def levels(name: str, value: Any) -> tuple[float, ...]:
    """Numbers in a row, as of a grid. Raises ValueError for anything else."""
    if isinstance(value, str | bytes | dict) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must be noise levels, like (80, 9, 1, 0.002), got {value!r:.80}")
    return tuple(number(f"each level of {name}", one, finite=False) for one in value)


def sides(name: str, value: Any) -> tuple[int, ...]:
    """The shape of one sample. Raises ValueError for anything but positive whole numbers."""
    sizes = (
        tuple(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else ()
    )
    if not sizes or not all(type(side) is int and side > 0 for side in sizes):
        raise ValueError(
            f"{name} must be positive integers, such as (3, 64, 64) or (2,), got {value!r:.80}"
        )
    return sizes


def function(name: str, value: Any, form: str) -> Callable[..., Any]:
    """What can be called. form: how it is called, "D(x, sigma)". Raises ValueError otherwise."""
    if not callable(value) or isinstance(value, type):
        raise ValueError(f"{name} must be callable as {form}, got {value!r:.80}")
    return value


def place(name: str, value: Any) -> Path:
    """A file or a folder by its path. Raises ValueError for what is none, an empty one too."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError(f"{name} must be a path, got {value!r:.80}")
    return Path(value)


def _is_bool(value: Any) -> bool:
    """Of numpy and torch too, which are not imported here."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
