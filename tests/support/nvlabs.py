"""Network pickles as NVlabs write them, made without their code.

A module lies in such a file as a call of `torch_utils.persistence._reconstruct_persistent_obj` with
a table: the text of its source, the name of its class, its state.
"""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODULE, FUNCTION = "torch_utils.persistence", "_reconstruct_persistent_obj"


def _reconstruct_persistent_obj(meta: Any) -> Any:
    raise AssertionError("a reader ran what a file names")


_reconstruct_persistent_obj.__module__ = MODULE


@dataclass
class Persistent:
    """One object with its source."""

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)
    source: str = "raise SystemError('run')\n"

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[dict[str, Any]]]:
        meta = {"type": "class", "version": 6, "module_src": self.source}
        return _reconstruct_persistent_obj, (
            {**meta, "class_name": self.class_name, "state": self.state},
        )


@contextmanager
def _named() -> Iterator[None]:
    """The module of that name, for as long as a pickle is written."""
    home = types.ModuleType(MODULE)
    setattr(home, FUNCTION, _reconstruct_persistent_obj)
    sys.modules[MODULE.partition(".")[0]] = types.ModuleType(MODULE.partition(".")[0])
    sys.modules[MODULE] = home
    try:
        yield
    finally:
        del sys.modules[MODULE.partition(".")[0]], sys.modules[MODULE]


def dumps(value: Any, protocol: int = 4) -> bytes:
    """A pickle of values with persistent objects among them."""
    with _named():
        return pickle.dumps(value, protocol=protocol)


def write(path: Path, value: Any) -> Path:
    """The same as a file."""
    path.write_bytes(dumps(value))
    return path
