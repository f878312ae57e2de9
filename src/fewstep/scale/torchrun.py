"""The processes that torchrun started share items by a counter in torchrun's own store.

No rank waits for another one: whoever is free takes the next number. Rank 0 leads. What is still
missing when it is done itself, and takes long, it does as well. A rank that ends is torchrun's to
handle: it starts all again, and what is finished is skipped.
"""

from __future__ import annotations

import os
import pickle
import statistics
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self, TypeVar

from fewstep.scale.executors import SLOW, TRIES, Counts
from fewstep.scale.work import STOP, Outcome, Place, Runner, Work, versions

__all__ = ["Ranks"]

T = TypeVar("T")

POLL = 0.1  # seconds
FOREVER = timedelta(days=365)
PAST = 2**40  # what the counter is moved to, so that nobody takes more


@dataclass(eq=False)
class Ranks:
    """This rank among `workers`.

    store: torchrun's, with `set`, `get`, `add` and `wait`
    call: how many times `map` or its counterpart was entered
    """

    rank: int
    workers: int
    store: Any
    counts: Counts = field(default_factory=Counts)
    call: int = 0
    runner: Runner | None = None

    @classmethod
    def of(cls) -> Ranks:
        """Connect to the store. Raises ValueError where it cannot be reached."""
        from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
        from torch.distributed.rendezvous import rendezvous

        try:
            store, rank, size = next(iter(rendezvous("env://", timeout=timedelta(minutes=5))))
        except (ValueError, RuntimeError) as error:
            text = " ".join(str(error).split())
            raise ValueError(f"torchrun's store cannot be reached ({text:.200})") from None
        return cls(rank, size, PrefixStore("fewstep", store))

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def here(self) -> Place:
        return Place(int(os.environ.get("LOCAL_RANK", self.rank)))

    def map(self, work: Work, items: Iterable[T]) -> Generator[tuple[T, Outcome], None, None]:
        known = list(items)
        self._put(f"{self.call}/items", known)
        runner, seen, left, took = self._runner(work), 0, set(range(len(known))), [0.0]
        last = time.monotonic()
        while left:
            index = self._take()
            if index < len(known):
                begun = time.monotonic()
                self._done(index, _tried(runner, known[index]))
                took.append(time.monotonic() - begun)
            found = self._results(seen)
            seen += len(found)
            for place, outcome in found:
                if outcome.error:
                    raise ValueError(outcome.error)
                if place in left:
                    left.discard(place)
                    yield known[place], outcome
            now = time.monotonic()
            last = now if found else last
            if left and index >= len(known) and not found:
                time.sleep(POLL)
                if now - last > max(SLOW * statistics.median(took), 10.0) and len(took) > 1:
                    self.counts.second += 1
                    self._done(min(left), _tried(runner, known[min(left)]))
        self.call += 1

    def serve(self, work: Work) -> None:
        runner = self._runner(work)
        while (known := self._get(f"{self.call}/items")) is not None:
            while (index := self._take()) < len(known):
                self._done(index, _tried(runner, known[index]))
            self.call += 1

    def _runner(self, work: Work) -> Runner:
        if self.runner is None or self.runner.work() != work:
            self.runner = Runner(lambda: work, versions(), self.here)
        return self.runner

    def _take(self) -> int:
        return self.store.add(f"{self.call}/next", 1) - 1

    def _done(self, index: int, outcome: Outcome) -> None:
        number = self.store.add(f"{self.call}/slots", 1)
        self._put(f"{self.call}/done/{number}", (index, outcome))

    def _results(self, seen: int) -> list[tuple[int, Outcome]]:
        upto = self.store.add(f"{self.call}/slots", 0)
        return [self._get(f"{self.call}/done/{n + 1}") for n in range(seen, upto)]

    def _put(self, name: str, value: Any) -> None:
        self.store.set(name, pickle.dumps(value))

    def _get(self, name: str) -> Any:
        self.store.wait([name], FOREVER)
        return pickle.loads(self.store.get(name))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Tell the others that there is nothing more, and wait for them: the store may be ours."""
        if not self.leads:
            self.store.add("left", 1)
            return
        self.store.add(f"{self.call}/next", PAST)  # of a `map` that was left early
        for call in (self.call, self.call + 1):  # they wait for one of these
            self._put(f"{call}/items", None)
        until = time.monotonic() + 60.0
        while self.store.add("left", 0) < self.workers - 1 and time.monotonic() < until:
            time.sleep(POLL)


def _tried(runner: Runner, item: Any) -> Outcome:
    """What became of an item, after as many tries as it takes."""
    outcome = runner(item)
    for _ in range(TRIES - 1):
        if not outcome.error or outcome.kind == STOP:
            break
        outcome = runner(item)
    return outcome
