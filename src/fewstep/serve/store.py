"""Pictures that were made, so that they can be refined: a bounded number, for a bounded time."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fewstep.sampling.settings import Settings
from fewstep.serve.order import Mix
from fewstep.serve.settings import Limits

__all__ = ["Kept", "Made", "Store"]


@dataclass(frozen=True, eq=False)
class Made:
    """A picture and all that is needed to make it again.

    Attributes:
        owner: who asked for it; nobody else gets it
        model: its name
        pixels: uint8 [h, w, c]
        given: label, prompt, negative, guidance, strength and size
        settings: as asked for
        noise: its seeds with their weights
        image, mask: of an edit
        about: how it was made, as its file says
    """

    owner: str
    model: str
    pixels: np.ndarray
    given: dict[str, Any]
    settings: Settings
    noise: Mix
    image: np.ndarray | None
    mask: np.ndarray | None
    about: dict[str, Any]

    @property
    def nbytes(self) -> int:
        arrays = (self.pixels, self.image, self.mask)
        return 2000 + sum(one.nbytes for one in arrays if one is not None)


class Kept(Protocol):
    """Where pictures are kept: in this process, or for all replicas."""

    async def put(self, made: Made) -> str:
        """Keep a picture; returns its id."""
        ...

    async def get(self, key: str, owner: str) -> Made | None:
        """The picture of an id; None where it is not there any more, or somebody else's."""
        ...

    def __len__(self) -> int: ...


class Store:
    """The newest pictures by their ids, which cannot be guessed."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._kept: OrderedDict[str, tuple[float, Made]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    async def put(self, made: Made) -> str:
        key, now = f"img_{secrets.token_urlsafe(18)}", time.monotonic()
        limits = self._limits
        with self._lock:
            self._kept[key] = (now, made)
            self._bytes += made.nbytes
            while self._kept:
                oldest, (when, other) = next(iter(self._kept.items()))
                over = len(self._kept) > limits.kept or self._bytes > limits.kept_bytes
                if not over and now - when < limits.kept_seconds:
                    break
                del self._kept[oldest]
                self._bytes -= other.nbytes
        return key

    async def get(self, key: str, owner: str) -> Made | None:
        with self._lock:
            when, made = self._kept.get(key, (0.0, None))
        if made is None or made.owner != owner:
            return None
        return made if time.monotonic() - when < self._limits.kept_seconds else None
