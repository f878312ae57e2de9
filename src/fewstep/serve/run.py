"""Starting and stopping the service."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import uvicorn

from fewstep.models import Model, load
from fewstep.serve.engine import Engine
from fewstep.serve.previews import read_tiny
from fewstep.serve.service import Service
from fewstep.serve.settings import Limits
from fewstep.serve.store import Kept

__all__ = ["Closes", "Server", "is_loopback", "listen", "load_models", "make_service", "start_log"]


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket on an address, before any work is done. Raises OSError that names the address."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"cannot listen on {host}, port {port}: {reason}; choose others") from None


def make_service(
    models: Mapping[str, Model],
    limits: Limits,
    *,
    batch: int | None = None,
    workers: int | None = None,
    threads: int | None = None,
    store: Kept | None = None,
    preview_decoder: Path | None = None,
) -> Service:
    """A service of loaded models.

    Args:
        models: by name
        limits: bounds
        batch: rows of the network's batch; 16 on a CPU, 64 elsewhere
        workers: threads that evaluate; two on a CPU with more than one thread, else one
        threads: of torch in each worker; on a CPU its share of all
        store: where pictures are kept; in this process where left out
        preview_decoder: a folder with a tiny autoencoder by which latents are shown

    Raises:
        ValueError: that folder holds none, or one of other latents.
    """
    import torch

    cpu = torch.device("cpu")
    on_cpu = all(getattr(model, "device", cpu).type == "cpu" for model in models.values())
    total = torch.get_num_threads()
    if workers is None:
        workers = 2 if on_cpu and total > 1 else 1
    if threads is None and on_cpu:
        threads = max(1, total // workers)
    tiny = None if preview_decoder is None else read_tiny(preview_decoder)
    rows = batch or (16 if on_cpu else 64)
    engine = Engine(rows=rows, workers=workers, threads=threads, most_waiting=limits.most_waiting)
    return Service(models, engine, limits, store, tiny)


def load_models(names: Sequence[str], given: Mapping[str, Any]) -> dict[str, Model]:
    """Models by the names of their cards.

    Args:
        names: built-in ones, folders, pipelines
        given: options of `fewstep.models.load`

    Raises:
        ValueError: one makes no pictures, or two have one name.
    """
    models: dict[str, Model] = {}
    for name in names:
        loaded: Model = load(name, **given)
        if not hasattr(loaded, "picture"):
            raise ValueError(f"{name} makes no pictures")
        if loaded.card.name in models:
            raise ValueError(f"two models are called {loaded.card.name}; serve one of them")
        models[loaded.card.name] = loaded
    return models


class Facts(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            facts["error"] = f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]!s:.300}"
        return json.dumps(facts)


def start_log(level: str = "info") -> None:
    """Logs to standard error, as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Facts())
    for name in ("fewstep.serve", "uvicorn.error"):
        one = logging.getLogger(name)
        one.handlers, one.propagate = [handler], False
        one.setLevel(level.upper() if name == "fewstep.serve" else logging.WARNING)


class Closes(Protocol):
    """What makes the pictures, as far as a server knows it."""

    def refuse(self) -> None:
        """Take no new work from now on."""
        ...

    def close(self, seconds: float) -> bool:
        """Finish what runs, within so many seconds; whether all was finished."""
        ...


class Server(uvicorn.Server):
    """uvicorn that stops gracefully: at a signal no new work is taken, and what runs ends within a
    limit."""

    def __init__(
        self,
        app: Any,
        service: Closes,
        seconds: int,
        started: Callable[[str], None] = lambda address: None,
    ) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            loop="asyncio",  # whatever else is installed: bounds are those of this parser
            http="h11",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=seconds + 5,
            timeout_keep_alive=30,
            h11_max_incomplete_event_size=65_536,
            limit_concurrency=2000,
        )
        super().__init__(config)
        self._service, self._seconds, self._told = service, seconds, started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ours in place of uvicorn's, which raises the signal again when all is done."""
        loop = asyncio.get_running_loop()
        known = (signal.SIGINT, signal.SIGTERM)
        try:
            for one in known:
                loop.add_signal_handler(one, self.end)
        except (NotImplementedError, RuntimeError, ValueError):  # not in the main thread
            yield
            return
        try:
            yield
        finally:
            for one in known:
                loop.remove_signal_handler(one)

    def end(self) -> None:
        """Stop; the second time at once."""
        if self.should_exit:
            self.force_exit = True
            return
        self._service.refuse()
        self.should_exit = True
        loop = asyncio.get_running_loop()
        # what still runs after the limit fails, and its connections end
        self._limit = loop.run_in_executor(None, self._service.close, self._seconds)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.servers:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            self._told(f"http://{shown}:{port}")
