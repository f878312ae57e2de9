"""Who does the work: `map(work, items)` gives each item's result as it is there.

    local       in this process, or in processes of this machine
    torchrun    the processes that torchrun started
    ray         actors of a Ray cluster

All keep to the same rules. Items go to whoever is free. What a dead worker held goes to another.
What failed is tried again, unless it would fail again. When nothing is left to hand out, what takes
long is given to a second worker, and the first answer counts. So items must be idempotent.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol, Self, TypeVar

from fewstep.scale.settings import RAY, TORCHRUN, Scaling
from fewstep.scale.work import AGAIN, STOP, Outcome, Place, Runner, Work, kind_of, versions

__all__ = ["Counts", "Executor", "Local", "Pool", "hand_out", "open_executor"]

T = TypeVar("T")

TRIES = 3  # of an item that fails
LOSSES = 10  # workers that an item may take with it
SLOW = 2.0  # an item is slow that takes so many times the median
LOOK = 1.0  # seconds between two looks for slow ones


@dataclass
class Counts:
    """What happened to the items of a run: `tried` again, given to a `second` worker, and workers
    that were `lost`."""

    tried: int = 0
    second: int = 0
    lost: int = 0


class Executor(Protocol):
    """Does work on items, wherever; a context that ends what it started.

    leads: whether this process hands out the work and says what became of it
    here: the place of this process where it is itself a worker
    workers: how many there are
    counts: what happened so far
    """

    @property
    def leads(self) -> bool: ...
    @property
    def here(self) -> Place | None: ...
    @property
    def workers(self) -> int: ...
    @property
    def counts(self) -> Counts: ...
    def map(self, work: Work, items: Iterable[T]) -> Generator[tuple[T, Outcome], None, None]:
        """Each item with what became of it, in the order in which they are done.

        Raises:
            ValueError: an item cannot be done; it says why, in one line.
        """
        ...

    def serve(self, work: Work) -> None:
        """Take part, where another process leads, until it is done."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...


class Pool(Protocol):
    """Workers, by number from 0 to count - 1."""

    @property
    def count(self) -> int: ...
    def submit(self, worker: int, item: Any) -> Future[Outcome]:
        """Begin an item; None: say when the worker is ready."""
        ...

    def replace(self, worker: int) -> None:
        """Start a worker in the place of one that is gone or broken."""
        ...


def open_executor(how: Scaling) -> Executor:
    """The executor of the settings.

    Raises:
        ValueError: there is no such cluster.
    """
    if how.kind == TORCHRUN:
        from fewstep.scale.torchrun import Ranks

        return Ranks.of()
    if how.kind == RAY:
        from fewstep.scale.rays import Ray

        return Ray.of(how)
    return Local(how.workers or 1)


def hand_out(pool: Pool, items: Iterable[T], counts: Counts) -> Iterator[tuple[T, Outcome]]:
    """Each item with its outcome, as the pool's workers do them.

    The driver's time per item does not depend on the number of workers.

    Raises:
        ValueError: an item failed for good, or took too many workers with it.
    """
    desk = _Desk(pool, iter(items), counts)
    try:
        yield from desk.run()
    finally:  # a second worker may be slow as well, or the run has ended early
        for worker in list(desk.running):
            pool.replace(worker)


@dataclass(eq=False)
class _Task:
    """An item, with how many workers hold it, and what happened to it."""

    item: Any
    holders: int = 0
    fails: int = 0
    losses: int = 0
    over: bool = False


@dataclass(eq=False)
class _Desk:
    """Where items are handed out."""

    pool: Pool
    todo: Iterator[Any]
    counts: Counts
    done: SimpleQueue[tuple[int, _Task | None, Future[Outcome]]] = field(
        default_factory=SimpleQueue
    )
    again: deque[_Task] = field(default_factory=deque)
    idle: deque[int] = field(default_factory=deque)
    running: dict[int, tuple[_Task, float]] = field(default_factory=dict)
    took: deque[float] = field(default_factory=lambda: deque(maxlen=1000))
    open: int = 0  # items that were handed out and have no result
    ended: bool = False  # whether `todo` is at its end
    stillborn: int = 0  # workers in a row that ended before they were ready

    def run(self) -> Iterator[tuple[Any, Outcome]]:
        for worker in range(self.pool.count):
            self._submit(worker, None)
        while self._hand():
            try:
                worker, task, future = self.done.get(timeout=LOOK)
            except Empty:
                self._second()
                continue
            outcome = self._back(worker, task, future)
            if outcome is not None and task is not None:
                yield task.item, outcome

    def _hand(self) -> bool:
        """Give items to those who are free; whether there is anything to wait for."""
        while self.idle and (task := self._next()) is not None:
            self._submit(self.idle.popleft(), task)
        return self.open > 0 or not self.ended

    def _next(self) -> _Task | None:
        while self.again:
            task = self.again.popleft()
            if not task.over:
                return task
        for item in self.todo:
            self.open += 1
            return _Task(item)
        self.ended = True
        return None

    def _submit(self, worker: int, task: _Task | None) -> None:
        if task is not None:
            task.holders += 1
            self.running[worker] = task, time.monotonic()
        future = self.pool.submit(worker, None if task is None else task.item)
        future.add_done_callback(lambda ended: self.done.put((worker, task, ended)))

    def _back(self, worker: int, task: _Task | None, future: Future[Outcome]) -> Outcome | None:
        """What an ended call says of its task; None where it is not done by that."""
        _, begun = self.running.pop(worker, (None, 0.0))
        reason = "cancelled" if future.cancelled() else future.exception()
        outcome = future.result() if reason is None else None
        if outcome is None or outcome.kind not in ("", STOP, AGAIN):
            self.counts.lost += 1
            self.stillborn += task is None
            if self.stillborn > LOSSES:
                raise ValueError(f"workers end before they are ready ({reason!s:.200})")
            self.pool.replace(worker)
            self._submit(worker, None)
        else:
            self.idle.append(worker)
            self.stillborn = 0
        if task is None:
            if outcome is not None and outcome.error:
                raise ValueError(outcome.error)
            return None
        task.holders -= 1
        if task.over:
            return None
        if outcome is None or outcome.error:
            self._retry(task, outcome)
            return None
        task.over = True
        self.open -= 1
        self.took.append(time.monotonic() - begun)
        return outcome

    def _retry(self, task: _Task, outcome: Outcome | None) -> None:
        if outcome is None:
            task.losses += 1
        else:
            task.fails += 1
        if outcome is not None and (outcome.kind == STOP or task.fails >= TRIES):
            raise ValueError(outcome.error)
        if task.losses > LOSSES:
            raise ValueError(
                f"{LOSSES} workers ended while they made the same shard; do they have the memory "
                "for it? Take a smaller --batch"
            )
        self.counts.tried += 1
        if not task.holders:
            self.again.append(task)

    def _second(self) -> None:
        """Give what is slow to a second worker, once all is handed out."""
        if not (self.ended and self.idle and self.took):
            return
        patience = max(SLOW * statistics.median(self.took), LOOK)
        before = time.monotonic() - patience
        slow = [
            task
            for task, begun in sorted(self.running.values(), key=lambda one: one[1])
            if begun < before and task.holders == 1 and not task.over
        ]
        for task, worker in zip(slow, list(self.idle), strict=False):
            self.idle.remove(worker)
            self.counts.second += 1
            self._submit(worker, task)


@dataclass(eq=False)
class Local:
    """This process, or processes of this machine, which stay between two calls of `map`."""

    workers: int = 1
    counts: Counts = field(default_factory=Counts)
    leads: bool = True
    pool: Processes | None = None

    @property
    def here(self) -> Place | None:
        return Place() if self.workers == 1 else None

    def map(self, work: Work, items: Iterable[T]) -> Generator[tuple[T, Outcome], None, None]:
        if self.workers == 1:
            do, who = work.open(Place()), (socket.gethostname(), os.getpid())
            for item in items:
                yield item, Outcome(self._tried(do, item), host=who[0], worker=who[1])
            return
        known = pickle.dumps(work)
        if self.pool is None or self.pool.work != known:
            self.__exit__()
            self.pool = Processes(self.workers, known)
        yield from hand_out(self.pool, items, self.counts)

    def _tried(self, do: Callable[[Any], Any], item: Any) -> Any:
        """In this process. What is raised keeps its traceback."""
        for left in reversed(range(TRIES)):
            try:
                return do(item)
            except OSError as error:
                if not left or kind_of(error) == STOP:
                    raise
                self.counts.tried += 1

    def serve(self, work: Work) -> None:
        raise ValueError("executor local has one process that leads")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.close()
        self.pool = None


class Processes:
    """Processes of this machine, each with an executor of its own, so that one may die."""

    def __init__(self, count: int, work: bytes) -> None:
        self.count, self.work = count, work
        self.pids: dict[int, int] = {}
        self.made = {worker: self._start(worker) for worker in range(count)}

    def _start(self, worker: int) -> ProcessPoolExecutor:
        threads = max(1, len(os.sched_getaffinity(0)) // self.count) if _LINUX else 1
        return ProcessPoolExecutor(
            1,
            multiprocessing.get_context("spawn"),
            _begin,
            (self.work, versions(), Place(worker), threads),
        )

    def submit(self, worker: int, item: Any) -> Future[Outcome]:
        try:
            future = self.made[worker].submit(_do, item)
        except BrokenProcessPool as error:  # it was killed while it had nothing to do
            future: Future[Outcome] = Future()
            future.set_exception(error)
        future.add_done_callback(lambda ended: self._note(worker, ended))
        return future

    def _note(self, worker: int, ended: Future[Outcome]) -> None:
        if not ended.cancelled() and ended.exception() is None:
            self.pids[worker] = ended.result().worker

    def replace(self, worker: int) -> None:
        self._end(worker)
        self.made[worker] = self._start(worker)

    def _end(self, worker: int) -> None:
        pid = self.pids.pop(worker, None)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        self.made[worker].shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        """End them, whatever they do."""
        for worker in self.made:
            self._end(worker)


_LINUX = hasattr(os, "sched_getaffinity")
_runner: Runner | None = None  # of a worker process: one work in its life


def _begin(work: bytes, wanted: dict[str, str], place: Place, threads: int) -> None:
    """In a new worker process. It ends with its parent, however that ends, and leaves Ctrl-C to
    it."""
    global _runner
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    _runner = Runner(partial(pickle.loads, work), wanted, place)


def _follow(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _do(item: Any) -> Outcome:
    assert _runner is not None
    return _runner.begin() if item is None else _runner(item)
