"""The methods by name."""

from __future__ import annotations

import difflib

from fewstep.learned.amed import AMED, PLUGIN
from fewstep.learned.fixed import READ_ONLY
from fewstep.learned.grid_search import GRID
from fewstep.learned.method import Kind
from fewstep.learned.tuned import TUNED

__all__ = ["KINDS", "READABLE", "kind_of"]

KINDS: dict[str, Kind] = {kind.name: kind for kind in (AMED, PLUGIN, TUNED, GRID)}
READABLE: dict[str, Kind] = {**KINDS, **READ_ONLY}  # from folders; the others are trained elsewhere


def kind_of(name: str) -> Kind:
    """The method of a name.

    Raises:
        ValueError: with the nearest names.
    """
    if name not in KINDS:
        near = difflib.get_close_matches(str(name), KINDS, n=2) or list(KINDS)
        raise ValueError(f"no method is called {name!r}; did you mean {' or '.join(near)}?")
    return KINDS[name]
