"""How far work is that goes from phase to phase, in a file that any machine can read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated

from pydantic import Field

from fewstep.records import Int, Real, Text, parse, record
from fewstep.scale.stores import Store, open_store

__all__ = ["Phase", "Phases", "read_phase"]

NAME = "phase.json"
EVERY = 2.0  # seconds between two writes


@record
class Phase:
    """What is being done. done: of `total`; begun, at: when it began and was last told, epoch."""

    what: Text
    done: Annotated[Int, Field(ge=0)]
    total: Annotated[Int, Field(ge=0)]
    begun: Real
    at: Real

    @property
    def left(self) -> float | None:
        """Seconds at the rate so far."""
        if not self.done:
            return None
        return (self.at - self.begun) / self.done * (self.total - self.done)


def read_phase(store: Store) -> Phase | None:
    """What a folder says; None where it says nothing that can be read."""
    data = store.read(NAME)
    if data is None:
        return None
    try:
        return Phase(**parse(data, NAME))
    except (TypeError, ValueError):
        return None


class Phases:
    """Writes the file."""

    def __init__(self, place: str) -> None:
        self.store = open_store(place)

    @contextmanager
    def of(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Inside, the yielded function is told how much is done."""
        begun, written = time.time(), 0.0

        def tick(done: int) -> None:
            nonlocal written
            now = time.time()
            if now - written > EVERY or done == total:
                written = now
                phase = Phase(what, done, total, begun, now)
                self.store.write(NAME, json.dumps(asdict(phase)).encode())

        tick(0)
        yield tick
