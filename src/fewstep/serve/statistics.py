"""What the engine counts."""

from __future__ import annotations

import threading
import time
from collections import deque

__all__ = ["Statistics", "Times"]

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
WINDOW = 10.0  # seconds over which the speed is measured


class Times:
    """Seconds of one stage, as a histogram."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        place = next((i for i, bound in enumerate(BOUNDS) if seconds <= bound), len(BOUNDS))
        self.counts[place] += 1
        self.total += seconds


class Statistics:
    """Counts and times since the start.

    Attributes:
        evaluations: of single pictures
        batches: evaluations of whole batches
        last_batch: pictures in the newest one
        cancelled, refused, failed, jobs: numbers of jobs
        late: evaluations of pictures whose job was cancelled while they ran
        pictures: that were finished
        stages: seconds by stage: queue, evaluate, decode, encode, request
    """

    def __init__(self, speed: float) -> None:
        self.evaluations = self.batches = self.last_batch = self.pictures = self.late = 0
        self.cancelled = self.refused = self.failed = self.jobs = 0
        self.stages = {
            name: Times() for name in ("queue", "evaluate", "decode", "encode", "request")
        }
        self._speed, self._lock = speed, threading.Lock()
        self._recent: deque[tuple[float, int, float]] = deque()  # (when, pictures, seconds)

    @property
    def speed(self) -> float:
        """Evaluations of a picture in a second while there is work, lately."""
        return self._speed

    def evaluated(self, pictures: int, seconds: float) -> None:
        """A batch was evaluated."""
        now = time.perf_counter()
        with self._lock:
            self.evaluations += pictures
            self.batches += 1
            self.last_batch = pictures
            self.stages["evaluate"].add(seconds)
            self._recent.append((now, pictures, seconds))
            while now - self._recent[0][0] > WINDOW or len(self._recent) > 1000:
                self._recent.popleft()
            count = sum(one[1] for one in self._recent)
            busy = max(now - self._recent[0][0] + self._recent[0][2], 1e-6)
            spent = sum(one[2] for one in self._recent)
            # two workers at once spend more seconds than pass, and pauses are no work
            self._speed = max(count / busy, count / max(spent, 1e-6))

    def waited(self, seconds: float) -> None:
        """A job was begun."""
        with self._lock:
            self.stages["queue"].add(seconds)

    def decoded(self, seconds: float, pictures: int) -> None:
        """Pictures were made of their states."""
        with self._lock:
            self.stages["decode"].add(seconds)
            self.pictures += pictures

    def encoded(self, seconds: float) -> None:
        """A picture became a file."""
        with self._lock:
            self.stages["encode"].add(seconds)

    def finished(self, seconds: float) -> None:
        """A job came to its end."""
        with self._lock:
            self.jobs += 1
            self.stages["request"].add(seconds)
