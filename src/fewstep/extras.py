"""Libraries that only some users need: what is said where one is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["MissingExtra", "needs"]


class MissingExtra(ImportError, ValueError):
    """A library of an extra is not installed, or cannot be imported."""


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Around the imports of what an extra in pyproject.toml installs.

    Args:
        extra: its name
        what: what needs it, for the message

    Raises:
        MissingExtra: an import failed; one line that says how to install it.
    """
    try:
        yield
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise MissingExtra(
            f"{what} needs libraries of the extra {extra!r} ({reason}); install them in the "
            f"folder of fewstep's source: pip install -e '.[{extra}]', or make setup"
        ) from None
