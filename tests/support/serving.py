"""A service in this process: its engine alone, or behind a real server on loopback."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

import fewstep
from fewstep.sampling.request import Request
from fewstep.sampling.settings import Settings
from fewstep.serve.app import create_app
from fewstep.serve.engine import Engine, Event, Job
from fewstep.serve.order import Order, order
from fewstep.serve.run import Server, listen, make_service
from fewstep.serve.service import Service
from fewstep.serve.settings import Limits

__all__ = ["asked_of", "collect", "make", "running", "submit"]


def asked_of(model: Any, settings: Settings, seeds: Any, **given: Any) -> Order:
    return order("model", model, Request(tuple(seeds), **given), settings)


def submit(engine: Engine, asked: Order, shown: Any = ()) -> tuple[Job, queue.Queue[Event]]:
    events: queue.Queue[Event] = queue.Queue()
    return engine.submit(asked, events.put, shown), events


def collect(events: queue.Queue[Event], seconds: float = 60) -> list[Event]:
    """All events of a job up to its end."""
    found = []
    while not found or found[-1].kind not in ("ended", "failed"):
        found.append(events.get(timeout=seconds))
    return found


def make(engine: Engine, asked: Order) -> list[np.ndarray]:
    """The pictures of an order, in their order."""
    found = collect(submit(engine, asked)[1])
    assert found[-1].kind == "ended", found[-1].error
    pictures = {event.index: event.pixels for event in found if event.kind == "picture"}
    return [pictures[i] for i in range(len(asked.seeds))]


@contextlib.contextmanager
def running(
    limits: Limits | None = None, models: Any = None, workers: int = 1, **options: Any
) -> Iterator[tuple[str, Service]]:
    """(the address, the service) of a server in a thread of its own."""
    loaded = {"fashion-mnist": fewstep.load("fashion-mnist")} if models is None else models
    service = make_service(loaded, limits or Limits(), workers=workers)
    app = create_app(service, warm=False, **options)
    addresses: queue.Queue[str] = queue.Queue()
    server = Server(app, service, 5, addresses.put)
    bound = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    try:
        yield addresses.get(timeout=30), service
    finally:
        server.should_exit = True
        service.close(0)
        thread.join(timeout=20)
        assert not thread.is_alive()
