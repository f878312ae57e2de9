"""Workers as actors of a Ray cluster.

Each is a plain actor that opens the work once: it loads a model by its name. Ray starts a dead one
again, wherever there is room, and repeats its call: that does no harm, for items are idempotent.
An item that ends one worker after the other is handed out a few times more, and then ends the run.
The actor is a class that travels whole, so a node where fewstep is not installed can say so.

Source: the documentation of Ray 2.60 on actor fault tolerance.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from fewstep.data.bounds import reason
from fewstep.extras import needs
from fewstep.scale.executors import LOSSES, Counts, hand_out
from fewstep.scale.settings import Scaling
from fewstep.scale.work import BROKEN, Outcome, Work, versions

__all__ = ["Ray", "connect"]

T = TypeVar("T")

ANSWER = 5.0  # seconds that a cluster has to answer
STORE = 100 * 2**20  # bytes of shared memory of a cluster of our own: shards do not pass through it


@dataclass(eq=False)
class Ray:
    """A cluster, ours or one that was there.

    workers: actors
    gpus: of each, which may be a part of one
    own: whether the cluster ends with us
    """

    ray: Any
    workers: int
    gpus: float
    own: bool
    counts: Counts = field(default_factory=Counts)
    leads: bool = True
    here: None = None
    pool: _Actors | None = None
    aside: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def of(cls, how: Scaling) -> Ray:
        """Connect to the cluster at the address, or to $RAY_ADDRESS, or start one here.

        Raises:
            ValueError: there is none, or Ray is not installed.
        """
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        with needs("ray", "executor ray"):
            import ray
        workers, gpus = how.workers or 1, how.gpus_per_worker or 0.0
        address = how.address or os.environ.get("RAY_ADDRESS", "")
        own = not ray.is_initialized()
        if own:
            connect(ray, address, workers)
        found = cls(ray, workers, gpus, own)
        if (has := found._lacks()) is not None:
            found.__exit__()
            raise ValueError(
                f"each of {workers} workers asks for {gpus:g} GPUs, and the nodes of this cluster "
                f"have {has:g}; leave out --gpus-per-worker, or add nodes"
            )
        return found

    def _lacks(self) -> float | None:
        """The most GPUs of a node, where that is too few."""
        have = [node["Resources"].get("GPU", 0.0) for node in self.ray.nodes() if node["Alive"]]
        most = max(have, default=0.0)
        return most if most < self.gpus else None

    def map(self, work: Work, items: Iterable[T]) -> Generator[tuple[T, Outcome], None, None]:
        known = pickle.dumps(work)
        if self.pool is None or self.pool.work != known:
            self._close()
            self.pool = _Actors(self, known)
        before = self.pool.restarted
        yield from hand_out(self.pool, items, self.counts)
        self.counts.lost += self.pool.restarted - before

    def serve(self, work: Work) -> None:
        raise ValueError("executor ray has one process that leads")

    def __enter__(self) -> Self:
        """What Ray prints goes to standard error: the result alone goes to standard output."""
        self.aside.enter_context(redirect_stdout(sys.stderr))
        return self

    def __exit__(self, *error: object) -> None:
        self.aside.close()
        self._close()
        if self.own:
            self.ray.shutdown()

    def _close(self) -> None:
        if self.pool is not None:
            self.pool.close()
        self.pool = None


class _Actors:
    """Actors by number, and the processes that they are."""

    def __init__(self, cluster: Ray, work: bytes) -> None:
        self.cluster, self.work, self.count = cluster, work, cluster.workers
        # not for ever: an item that ends every worker has to be told of
        options: dict[str, Any] = {"num_cpus": 1, "max_restarts": -1, "max_task_retries": LOSSES}
        if cluster.gpus:
            options["num_gpus"] = cluster.gpus
        self.kind = cluster.ray.remote(**options)(_actor_class())
        self.alive: dict[int, tuple[str, int]] = {}
        self.restarted = 0  # actors that Ray has started again, as far as they have answered
        self.actors = [self._start(worker) for worker in range(self.count)]

    def _start(self, worker: int) -> Any:
        gpu = bool(self.cluster.gpus)
        return self.kind.remote(self.work, versions(), worker, gpu, os.getcwd())

    def submit(self, worker: int, item: Any) -> Future[Outcome]:
        reference = self.actors[worker].do.remote(pickle.dumps(item))
        future: Future[Outcome] = Future()
        reference.future().add_done_callback(lambda ended: self._note(worker, ended, future))
        return future

    def _note(self, worker: int, ended: Future[Any], future: Future[Outcome]) -> None:
        error = ended.exception()
        if error is not None:
            text = " ".join(str(error).split())
            future.set_result(Outcome(None, f"{type(error).__name__}: {text:.300}", BROKEN))
            return
        outcome = Outcome(*ended.result())
        who = outcome.host, outcome.worker
        self.restarted += self.alive.setdefault(worker, who) != who
        self.alive[worker] = who
        future.set_result(outcome)

    def replace(self, worker: int) -> None:
        self.cluster.ray.kill(self.actors[worker])
        self.alive.pop(worker, None)
        self.actors[worker] = self._start(worker)

    def close(self) -> None:
        for actor in self.actors:
            self.cluster.ray.kill(actor)


def connect(ray: Any, address: str, cpus: int) -> None:
    """Join the cluster at an address, or start one here with so many CPUs.

    Raises:
        ValueError: no cluster answers, or starts.
    """
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    if not address or address == "local":
        try:
            ray.init(address="local", num_cpus=cpus, object_store_memory=STORE, **quiet)
        except Exception as error:  # of processes, of ports, of time: all kinds
            raise ValueError(
                f"Ray cannot start a cluster on this machine ({reason(error)}); is it very busy, "
                "or short of memory? Try again, or name a cluster that is there"
            ) from error
        return
    try:
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if colon and port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=ANSWER).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:  # of connections, of versions, of the client: all kinds
        raise ValueError(
            f"no Ray cluster answers at {address} ({reason(error)}); start one there with ray "
            "start --head, or leave the address out"
        ) from error


def _actor_class() -> type:
    """The class of the actors; made in a function, so that it is pickled whole."""

    class FewstepWorker:
        def __init__(
            self, work: bytes, wanted: dict[str, str], number: int, own_gpu: bool, folder: str
        ) -> None:
            import os

            self.work, self.wanted, self.number, self.own_gpu = work, wanted, number, own_gpu
            self.runner: Any = None
            if os.path.isdir(folder):  # so that relative paths mean the same
                os.chdir(folder)

        def do(self, item: bytes) -> tuple[Any, str, str, str, int]:
            import os
            import pickle
            import platform

            host, what = platform.node(), f"the worker on {platform.node()}"
            wanted = self.wanted["fewstep"]
            mend = f"install fewstep {wanted} on all machines"
            try:
                from fewstep.provenance import VERSION

                if wanted != VERSION:
                    text = f"{what} has fewstep {VERSION}, and the run was started with {wanted}"
                    return None, f"{text}; {mend}", "stop", host, os.getpid()
                from fewstep.scale.work import Place, Runner
            except ImportError as error:
                text = f"{what} cannot import fewstep ({error})"
                return None, f"{text}; {mend}", "stop", host, os.getpid()
            if self.runner is None:
                place = Place(self.number, self.own_gpu)
                self.runner = Runner(lambda: pickle.loads(self.work), self.wanted, place)
            known = pickle.loads(item)
            found = self.runner.begin() if known is None else self.runner(known)
            return found.value, found.error, found.kind, found.host, found.worker

    return FewstepWorker
