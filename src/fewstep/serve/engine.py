"""The engine: it works by evaluations, not by requests. No HTTP in it.

A worker has a running batch. Before every evaluation it lets go what is finished or cancelled, and
takes in what waits, up to `rows` rows of the network's batch. So requests of one model and size run
side by side whatever their prompts, guidance, seeds, budgets and solvers: each sample has its own
level and its own coefficients. What a picture looks like depends on its own seed alone.

On a CPU several workers with few threads each do more than one with all of them: nothing waits for
the slowest thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.loop import Stepper, seeded, stand_in
from fewstep.plan import Eval
from fewstep.serve.order import Order
from fewstep.serve.statistics import Statistics
from fewstep.serve.together import Share, together

__all__ = ["Engine", "Event", "Full", "Job", "Stopping"]


class Full(Exception):
    """The queue has no room. `seconds`: when it may have."""

    def __init__(self, seconds: float) -> None:
        super().__init__("the queue is full")
        self.seconds = seconds


class Stopping(Exception):
    """No new work is taken."""


@dataclass(frozen=True, eq=False)
class Event:
    """Something that happened to a picture of a job, or to the job.

    Attributes:
        kind: "preview", "picture", "failed" (the job ends) or "ended"
        index: which picture
        pixels: of a preview [c, h, w] float32 in about [-1, 1], or the state where latents are
            shown; of a picture uint8 [h, w, c]
        nfe: evaluations spent on it
        error: what went wrong
    """

    kind: str
    index: int = 0
    pixels: Any = None
    nfe: int = 0
    error: Exception | None = None


@dataclass(eq=False)
class Job:
    """An order on its way.

    Attributes:
        order: what is asked for
        listen: called with every event, by a worker's thread; must return at once
        shown: after how many evaluations a preview is wanted
        taken: pictures that a worker has begun
        open: pictures that are not finished
        spent: evaluations, of all its pictures together
        late: those of them that began after it was cancelled
    """

    order: Order
    listen: Callable[[Event], None]
    shown: frozenset[int] = frozenset()
    taken: int = 0
    open: int = 0
    spent: int = 0
    late: int = 0
    cancelled: bool = False
    submitted: float = field(default_factory=time.perf_counter)
    started: float | None = None

    def __post_init__(self) -> None:
        self.open = len(self.order.seeds)

    @property
    def waiting(self) -> int:
        """Pictures that no worker has begun."""
        return len(self.order.seeds) - self.taken


class Part:
    """Some pictures of a job in a worker's batch."""

    def __init__(self, job: Job, start: int, count: int) -> None:
        order = job.order
        self.job, self.start, self.count = job, start, count
        seeds = order.seeds[start : start + count]
        self.stepper = Stepper(order.run.program, order.begin(start, count), seeded(seeds))
        self.share = Share(order.denoiser, start, count)
        self.rows = count * order.rows
        self.op: Eval | None = None
        self.ask()

    def ask(self) -> None:
        """Go on to the next evaluation by the network."""
        rows = slice(self.start, self.start + self.count)
        while (op := self.stepper.ask()) is not None and op.source != "net":
            self.stepper.tell(stand_in(self.share.denoiser, self.stepper, op, rows))
        self.op = op

    def levels(self, x: Tensor) -> Sequence[float] | Tensor:
        """What the network is told, one a sample."""
        assert self.op is not None
        told = self.op.sigma if self.op.cond is None else self.op.cond
        return told.to(x).expand(len(x)) if isinstance(told, Tensor) else [told] * self.count

    def tell(self, denoised: Tensor, features: Tensor | None) -> None:
        region = self.job.order.region
        if region is not None:  # the known part has a known D: its path is the picture plus noise
            denoised = region.free * denoised + (1 - region.free) * region.clean
        self.stepper.tell(denoised, features)
        self.denoised = denoised


class Engine:
    """Takes jobs, runs them together, and says what happens.

    Attributes:
        rows: of the network's batch at most, of each worker
        most_waiting: pictures in the queue at most
        stats: counts and times
    """

    def __init__(
        self,
        *,
        rows: int = 16,
        workers: int = 1,
        threads: int | None = None,
        most_waiting: int = 128,
        speed: float = 50.0,
    ) -> None:
        """
        Args:
            rows: see the class
            workers: threads that evaluate, each with its own batch
            threads: of torch in each worker; torch's own number where left out
            most_waiting: see the class
            speed: evaluations of a picture in a second, until it is measured
        """
        if min(rows, workers, most_waiting) < 1:
            raise ValueError(
                "rows, workers and most_waiting must be at least 1, got "
                f"{rows}, {workers} and {most_waiting}"
            )
        self.rows, self.most_waiting, self.stats = rows, most_waiting, Statistics(speed)
        self._threads = threads
        self._queue: deque[Job] = deque()
        self._running: set[Job] = set()
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._stopping = self._ended = False
        self._workers = [
            threading.Thread(target=self._work, name=f"evaluate-{i}", daemon=True)
            for i in range(workers)
        ]
        for worker in self._workers:
            worker.start()

    # -- from outside ---------------------------------------------------------------------------

    def submit(
        self, order: Order, listen: Callable[[Event], None], shown: Sequence[int] = ()
    ) -> Job:
        """Queue an order.

        Args:
            order: what is asked for
            listen: see `Job`
            shown: after how many evaluations a preview is wanted

        Raises:
            Full: there is no room; says when there may be.
            Stopping: no new work is taken.
        """
        job = Job(order, listen, frozenset(shown))
        with self._news:
            self._check_room(job.waiting)
            self._queue.append(job)
            self._news.notify_all()
        return job

    def check_room(self, pictures: int) -> None:
        """Errors as in `submit`, before an order of so many pictures is prepared."""
        with self._news:
            self._check_room(pictures)

    def _check_room(self, pictures: int) -> None:
        if self._stopping:
            raise Stopping
        waiting = self._waiting()
        # a job that is larger than the queue is taken by an empty one
        if waiting and waiting + pictures > self.most_waiting:
            self.stats.refused += 1
            raise Full(self._seconds(self._queue))

    def cancel(self, job: Job) -> None:
        """Let go of a job; evaluations of it that have not begun do not happen."""
        with self._news:
            if job.open and not job.cancelled:
                job.cancelled = True
                self.stats.cancelled += 1
            if job in self._queue:
                self._queue.remove(job)
            self._running.discard(job)
            job.open, job.listen = 0, silent
            self._news.notify_all()

    def waiting(self) -> int:
        """Pictures in the queue."""
        with self._lock:
            return self._waiting()

    def _waiting(self) -> int:
        return sum(job.waiting for job in self._queue)

    def place(self, job: Job) -> tuple[int, float]:
        """(jobs that are before this one in the queue, seconds until it is finished, estimated)."""
        with self._lock:
            ahead = []
            for other in self._queue:
                if other is job:
                    break
                ahead.append(other)
            return len(ahead) if job in self._queue else 0, self._seconds([*ahead, job])

    @property
    def busy(self) -> bool:
        """Whether anything runs or waits."""
        with self._lock:
            return bool(self._queue or self._running)

    @property
    def running(self) -> int:
        """Pictures that are being made."""
        with self._lock:
            return sum(job.open - job.waiting for job in self._running)

    def stop(self, seconds: float = 0.0) -> bool:
        """Take no new work; return once all is finished, or after so many seconds, when the rest
        fails. Returns whether all was finished."""
        with self._news:
            self._stopping = True
        limit = time.monotonic() + seconds
        while self.busy and time.monotonic() < limit:
            time.sleep(0.02)
        with self._news:
            rest = {*self._queue, *self._running}
            self._queue.clear()
            self._running.clear()
            self._ended = True
            for job in rest:
                job.cancelled = True
            self._news.notify_all()
        for job in rest:
            job.listen(Event("failed", error=Stopping("the service is stopping")))
        for worker in self._workers:
            worker.join(timeout=10)
        return not rest

    def refuse(self) -> None:
        """Take no new work from now on."""
        with self._news:
            self._stopping = True

    @property
    def alive(self) -> bool:
        """Whether every worker runs."""
        return not self._stopping and all(worker.is_alive() for worker in self._workers)

    # -- in the workers -------------------------------------------------------------------------

    def _work(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        parts: list[Part] = []
        merged = Merged()
        with torch.inference_mode():
            while self._take(parts):
                parts[:] = [part for part in parts if not part.job.cancelled]
                if not parts:
                    continue
                lane = parts[0].job.order.lane
                batch = [part for part in parts if part.job.order.lane == lane]
                self._advance(batch, merged)
                self._leave(batch, parts)
                # what was not evaluated goes first the next time
                parts.sort(key=lambda part: part.job.order.lane == lane)

    def _take(self, parts: list[Part]) -> bool:
        """Fill the batch from the queue, and wait while there is nothing; False at the end."""
        taken: list[tuple[Job, int, int]] = []
        with self._news:
            while not (parts or self._queue or self._ended):
                self._news.wait()
            if self._ended:
                return False
            room = self.rows - sum(part.rows for part in parts)
            while self._queue and room > 0:
                job = self._queue[0]
                each = job.order.rows
                # shared between the workers where all are free; never a batch of none
                most = -(-job.waiting // len(self._workers)) if len(self._queue) == 1 else room
                count = min(job.waiting, max(most, 1), room // each)
                if count < 1:
                    if parts or taken:
                        break
                    count = 1  # a picture that needs more rows than there are
                taken.append((job, job.taken, count))
                job.taken += count
                room -= count * each
                self._running.add(job)
                if job.started is None:
                    job.started = time.perf_counter()
                    self.stats.waited(job.started - job.submitted)
                if not job.waiting:
                    self._queue.popleft()
                elif most < room:  # the rest is the other workers'
                    break
        for job, start, count in taken:
            try:
                parts.append(Part(job, start, count))
            except Exception as error:
                self._fail_job(job, error)
        return True

    def _advance(self, batch: Sequence[Part], merged: Merged) -> None:
        """One evaluation of the network for all parts, and what follows from it.

        Where it fails, each part is tried alone: a request fails for its own faults only.
        """
        working = [part for part in batch if part.op is not None]
        if not working:
            return
        begun = time.perf_counter()
        try:
            denoised, features = _evaluate(working, merged)
        except Exception as error:
            if len(working) == 1:
                self._fail_job(working[0].job, error)
            else:
                for part in working:
                    self._advance([part], merged)
            return
        place = 0
        for part in working:
            one = slice(place, place + part.count)
            place += part.count
            with self._lock:
                part.job.spent += part.count
                if part.job.cancelled:
                    part.job.late += part.count
                    self.stats.late += part.count
            try:
                part.tell(denoised[one], None if features is None else features[one])
                self._show(part)
                part.ask()
            except Exception as error:
                self._fail_job(part.job, error)
        self.stats.evaluated(place, time.perf_counter() - begun)

    def _show(self, part: Part) -> None:
        """The preview after an evaluation, where one is wanted."""
        job, nfe = part.job, part.stepper.nfe
        if nfe not in job.shown or job.cancelled:
            return
        states = part.denoised.float().cpu().numpy()
        for i, state in enumerate(states):
            self._say(job, Event("preview", part.start + i, state, nfe))

    def _leave(self, batch: Sequence[Part], parts: list[Part]) -> None:
        """Let go of the parts that have come to their end, with their pictures."""
        for part in [part for part in batch if part.op is None and part in parts]:
            parts.remove(part)
            job = part.job
            if job.cancelled:
                continue
            begun = time.perf_counter()
            try:
                pictures = _finished(part)
            except Exception as error:
                self._fail_job(job, error)
                continue
            self.stats.decoded(time.perf_counter() - begun, part.count)
            for i, picture in enumerate(pictures):
                self._say(job, Event("picture", part.start + i, picture, part.stepper.nfe))
            with self._lock:
                job.open -= part.count
                done = job.open == 0
                if done:
                    self._running.discard(job)
            if done:
                self.stats.finished(time.perf_counter() - job.submitted)
                self._say(job, Event("ended"))

    def _fail_job(self, job: Job, error: Exception) -> None:
        with self._lock:
            known = job.cancelled
            job.cancelled, job.open = True, 0
            self._running.discard(job)
            if job in self._queue:
                self._queue.remove(job)
            self.stats.failed += not known
        if not known:
            self._say(job, Event("failed", error=error))

    def _say(self, job: Job, event: Event) -> None:
        with suppress(Exception):  # a listener's faults are its own
            job.listen(event)
        if event.kind in ("ended", "failed"):
            job.listen = silent  # it mostly knows the job: without this, memory waits for a sweep

    def _seconds(self, jobs: Sequence[Job] | deque[Job]) -> float:
        """How long all that runs and these jobs take; needs the lock."""
        work = 0.0
        for job in {*jobs, *self._running}:
            total = len(job.order.seeds) * job.order.nfe - job.spent
            work += max(0, total) * job.order.rows
        return work / self.stats.speed


def silent(event: Event) -> None:
    """Listens to a job that has ended."""


class Merged:
    """The denoiser of a batch, kept while the batch stays as it is."""

    def __init__(self) -> None:
        self._key: tuple[Part, ...] = ()
        self._denoiser: Any = None

    def of(self, parts: Sequence[Part]) -> Any:
        if self._key != tuple(parts):
            self._denoiser = together([part.share for part in parts])
            self._key = tuple(parts)
        return self._denoiser


def _evaluate(parts: Sequence[Part], merged: Merged) -> tuple[Tensor, Tensor | None]:
    """D of all parts, one after the other, and features where a solver looks at them."""
    xs = [part.stepper.x for part in parts]
    x = torch.cat(xs) if len(xs) > 1 else xs[0]
    told = [part.levels(part.stepper.x) for part in parts]
    if not any(isinstance(one, Tensor) for one in told):
        sigma = torch.tensor([level for one in told for level in one], dtype=x.dtype)
        sigma = sigma.to(x.device, non_blocking=True)
    else:
        rows = [torch.as_tensor(one, dtype=x.dtype, device=x.device) for one in told]
        sigma = torch.cat(rows)
    denoiser = merged.of(parts)
    asked = any(part.op is not None and part.op.features for part in parts)
    if asked and hasattr(denoiser, "with_features"):
        return denoiser.with_features(x, sigma)
    return denoiser(x, sigma), None


def _finished(part: Part) -> Any:
    """The pictures of a part, uint8 [n, h, w, c]. Raises FloatingPointError."""
    x, order = part.stepper.x, part.job.order
    if not torch.isfinite(x).all():
        raise FloatingPointError(
            "the network returned NaN or infinity; try dtype float32, or another guidance scale"
        )
    pictures = order.run.model.decode(x)
    if order.region is not None:
        kept = ~order.region.mask
        pictures[:, kept] = order.region.image[kept]
    return pictures
