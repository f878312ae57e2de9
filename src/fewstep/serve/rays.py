"""The service on many machines: replicas of a Ray Serve deployment behind one front.

    client -> front (this process: keys, limits, page) -> replica (models, engine, the same API)

The front passes a request to a replica through a handle of Ray Serve, and what the replica sends
comes back as it is sent. A picture depends on its seed alone. So where a replica is lost before it
has sent anything, another one gets the request; later, the client is told.

Pictures that can be refined are kept by one actor, for all replicas. An id that holds the recipe
would need no such place. But prompts would stand in addresses and logs, an edit's picture would
not fit in, and the draft would have to be made again to say how far the refinement is away.

Source: the documentation of Ray Serve 2.60 on handles, autoscaling and fault tolerance.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep.extras import needs
from fewstep.scale.rays import connect
from fewstep.serve.answers import first_of, gone
from fewstep.serve.app import add_operations, add_page, create_api, empty_app
from fewstep.serve.errors import ApiError
from fewstep.serve.gate import Gate
from fewstep.serve.keys import Clients, Key
from fewstep.serve.metrics import Numbers, numbers
from fewstep.serve.run import load_models, make_service
from fewstep.serve.settings import Limits, Replicas
from fewstep.serve.store import Made, Store

__all__ = ["Front", "Setup", "create_front", "deployed"]

NAME = "fewstep"
BEAT, SILENCE = 1.0, 8.0  # seconds between signs of life; without one for so long: lost
BUSY = "all replicas are busy; try again later"
TRIES = 3  # replicas that a request is given to
STOPPING = "the service is stopping"
LOST = "the replica that made the pictures was lost; ask again"
PASSED = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string")


@dataclass(frozen=True)
class Setup:
    """What a replica needs to know.

    Attributes:
        models, given: see `load_models`
        limits: bounds
        batch, workers, preview_decoder: see `make_service`
        log_prompts: whether facts of requests have prompts
    """

    models: tuple[str, ...]
    given: Mapping[str, Any]
    limits: Limits
    batch: int | None = None
    workers: int | None = None
    log_prompts: bool = False
    preview_decoder: Path | None = None


class Shared:
    """An actor: the pictures that can be refined, and what each replica reports."""

    def __init__(self, limits: Limits) -> None:
        self._store = Store(limits)
        self._reports: dict[str, tuple[float, Numbers]] = {}

    async def put(self, made: Made) -> str:
        return await self._store.put(made)

    async def get(self, key: str, owner: str) -> Made | None:
        return await self._store.get(key, owner)

    async def report(self, replica: str, found: Numbers) -> None:
        self._reports[replica] = (time.monotonic(), found)

    async def reports(self) -> dict[str, Numbers]:
        """Of replicas that have reported lately."""
        late = time.monotonic() - SILENCE
        self._reports = {name: one for name, one in self._reports.items() if one[0] > late}
        return {name: {**found} for name, (_, found) in self._reports.items()}


class SharedStore:
    """The store of a replica: that of the actor."""

    def __init__(self, shared: Any) -> None:
        self._shared = shared

    async def put(self, made: Made) -> str:
        return await self._ask(self._shared.put.remote(made))

    async def get(self, key: str, owner: str) -> Made | None:
        return await self._ask(self._shared.get.remote(key, owner))

    async def _ask(self, reference: Any) -> Any:
        try:
            return await asyncio.wait_for(_remote(reference), SILENCE)
        except Exception:  # of Ray, or time
            raise ApiError(
                503, "the kept pictures cannot be reached", code="store_lost", retry_after=5
            ) from None

    def __len__(self) -> int:
        return 0  # what all keep together is not this replica's


class Replica:
    """Models, an engine and the API, in a process of the cluster. Ray Serve calls it."""

    async def __init__(self, setup: Setup, shared: Any) -> None:  # type: ignore[misc]
        from ray import serve

        self._name = serve.get_replica_context().replica_id.unique_id
        self._shared = shared
        models = await asyncio.to_thread(load_models, setup.models, setup.given)
        self._service = make_service(
            models,
            setup.limits,
            batch=setup.batch,
            workers=setup.workers,
            store=SharedStore(shared),
            preview_decoder=setup.preview_decoder,
        )
        await self._service.warm_up()
        self._api = create_api(self._service, setup.log_prompts)
        self._reporting = asyncio.create_task(self._report())

    async def _report(self) -> None:
        while True:
            self._shared.report.remote(self._name, numbers(self._service))
            await asyncio.sleep(BEAT)

    async def check_health(self) -> None:
        """Raises RuntimeError where a worker has ended: Ray Serve starts another replica."""
        if not self._service.engine.alive:
            raise RuntimeError("the engine does not run")

    async def answer(
        self, scope: dict[str, Any], body: bytes
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Messages of ASGI as the API sends them, and signs of life between them."""
        messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        facts: dict[str, Any] = {}
        state = {"owner": scope["owner"], "facts": facts}
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            for message in given:
                return message
            return await asyncio.Future()  # the front ends this generator when its client goes

        async def run() -> None:
            try:
                await self._api({**scope, "state": state}, receive, messages.put)  # type: ignore[arg-type]
            finally:
                messages.put_nowait(None)

        yield {"type": "beat"}
        task = asyncio.create_task(run())
        try:
            while True:
                try:
                    async with asyncio.timeout(BEAT):
                        message = await messages.get()
                except TimeoutError:
                    message = {"type": "beat"}
                if message is None:
                    break
                yield message
            await task
            yield {"type": "facts", "facts": facts}
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


@dataclass(eq=False)
class Front:
    """Passes requests to replicas, as an ASGI application.

    Attributes:
        replica: makes a stream of messages of a scope and a body
        shared: the actor
        reports: the newest numbers of each replica
        active: requests on their way
    """

    replica: Any
    shared: Any
    reports: dict[str, Numbers] = field(default_factory=dict)
    active: set[asyncio.Task[Any]] = field(default_factory=set)
    stopping: bool = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.stopping:
            raise ApiError(503, STOPPING, code="stopping", retry_after=5)
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        state = scope["state"]
        passed = {name: scope[name] for name in PASSED if name in scope}
        passed |= {"headers": list(scope["headers"]), "owner": state.get("owner", "local")}
        task = asyncio.ensure_future(self._pass(passed, bytes(body), send, state["facts"]))
        self.active.add(task)
        try:
            await first_of(task, gone(receive))
        except asyncio.CancelledError:
            raise ApiError(503, STOPPING, code="stopping", retry_after=5) from None
        finally:
            self.active.discard(task)

    async def _pass(
        self, scope: dict[str, Any], body: bytes, send: Any, facts: dict[str, Any]
    ) -> None:
        """Try replicas until one begins to answer. Raises ApiError where none does."""
        for _ in range(TRIES):
            answer, taken = Answered(send), False
            stream = self.replica.remote(scope, body)
            try:
                async for message in alive(stream):
                    taken = True
                    if message["type"] == "facts":
                        facts |= message["facts"]
                    elif message["type"] != "beat":
                        await answer.add(message)
                return
            except ApiError:
                raise
            except Exception as error:  # of Ray: actors, nodes, connections, time
                waited = isinstance(error, TimeoutError) and not taken
                if waited or is_refusal(error):
                    status = 503 if waited else 429
                    raise ApiError(status, BUSY, code="busy", retry_after=2) from None
                if answer.begun:
                    await answer.end()
                    return
            finally:
                stream.cancel()
        raise ApiError(503, LOST, code="replica_lost", retry_after=1)

    async def watch(self) -> None:
        """Keep the numbers of the replicas fresh."""
        while True:
            with suppress(Exception):  # the actor may be on its way to another machine
                found = self.shared.reports.remote()
                self.reports = await asyncio.wait_for(_remote(found), SILENCE)
            await asyncio.sleep(BEAT)

    def refuse(self) -> None:
        """Take no new work from now on."""
        self.stopping = True

    def close(self, seconds: float) -> bool:
        """Wait for what runs, for so many seconds; whether all was finished."""
        self.refuse()
        limit = time.monotonic() + seconds
        while self.active and time.monotonic() < limit:
            time.sleep(0.05)
        rest = list(self.active)
        for task in rest:
            task.get_loop().call_soon_threadsafe(task.cancel)
        return not rest


class Answered:
    """What a client has got of an answer. Its start waits for the first part of the body."""

    def __init__(self, send: Any) -> None:
        self._send, self._start = send, None
        self.begun = self.events = False

    async def add(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            kinds = [value for name, value in message["headers"] if name == b"content-type"]
            self.events = any(value.startswith(b"text/event-stream") for value in kinds)
            return
        if self._start is not None:
            start, self._start = self._start, None
            self.begun = True
            await self._send(start)
        await self._send(message)

    async def end(self) -> None:
        """The replica was lost on the way: an event says so; another answer breaks off."""
        if not self.events:
            raise ConnectionError(LOST)
        error = ApiError(503, LOST, code="replica_lost").body
        data = f"data: {json.dumps(error)}\n\n".encode()
        await self._send({"type": "http.response.body", "body": data, "more_body": False})


async def alive(stream: Any) -> AsyncGenerator[dict[str, Any], None]:
    """The messages of a replica. Raises TimeoutError after a silence."""
    messages = aiter(stream)
    while True:
        try:
            async with asyncio.timeout(SILENCE):
                message = await anext(messages)
        except StopAsyncIteration:
            return
        yield message


def is_refusal(error: Exception) -> bool:
    """Whether more requests wait for a replica than may."""
    from ray.serve.exceptions import BackPressureError

    return isinstance(error, BackPressureError)


async def _remote(reference: Any) -> Any:
    """What an actor's method returns; in a coroutine, so that it can be waited for with a limit."""
    return await reference


def create_front(
    front: Front,
    limits: Limits,
    *,
    keys: tuple[Key, ...] = (),
    local: bool = True,
    origins: tuple[str, ...] = (),
) -> Gate:
    """The ASGI application of a front; for the arguments see `create_app`."""

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        task = asyncio.create_task(front.watch())
        yield
        task.cancel()

    answers: Counter[int] = Counter()
    app = empty_app(lifespan, openapi_url=None)  # the replicas describe their API
    add_page(app)
    add_operations(
        app,
        limits,
        lambda: bool(front.reports) and not front.stopping,
        lambda: front.reports,
        answers,
    )
    app.mount("/", front)
    clients = Clients(keys, limits.most_streams)
    return Gate(app, clients, limits, local and not keys, origins, answers)


class deployed:
    """Inside, replicas run on a cluster; gives their front.

    Raises:
        ValueError: there is no cluster at the address, or no node has what a replica needs.
    """

    def __init__(self, setup: Setup, replicas: Replicas, address: str = "") -> None:
        self._setup, self._how = setup, replicas
        self._address = address or os.environ.get("RAY_ADDRESS", "")

    def __enter__(self) -> Front:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        with needs("ray", "fewstep serve --ray"):
            import ray
            from ray import serve
        how = self._how
        self._own = not self._address or self._address == "local"
        connect(ray, self._address, max(1, math.ceil(how.most * how.cpus_per_replica)))
        try:
            self._check_room(ray)
            options: dict[str, Any] = {"num_cpus": how.cpus_per_replica}
            if how.gpus_per_replica:
                options["num_gpus"] = how.gpus_per_replica
            deployment: Any = serve.deployment(
                name="Pictures",
                ray_actor_options=options,
                max_ongoing_requests=how.ongoing,
                max_queued_requests=how.queued,
                autoscaling_config={
                    "min_replicas": how.replicas,
                    "max_replicas": how.most,
                    "target_ongoing_requests": min(how.wanted, how.ongoing),
                },
                health_check_period_s=2,
                health_check_timeout_s=SILENCE,
                graceful_shutdown_timeout_s=SILENCE,
            )(Replica)
            actor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3)(Shared)
            shared = actor.remote(self._setup.limits)
            quiet = {"log_level": "WARNING"}
            serve.start(proxy_location="Disabled", logging_config=quiet)
            bound = deployment.bind(self._setup, shared)
            handle = serve.run(bound, name=NAME, route_prefix=None, logging_config=quiet)
        except BaseException:
            self.__exit__()
            raise
        return Front(handle.options(stream=True, method_name="answer"), shared)

    def _check_room(self, ray: Any) -> None:
        how = self._how
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for name, wanted in (("CPU", how.cpus_per_replica), ("GPU", how.gpus_per_replica)):
            most = max((node.get(name, 0.0) for node in nodes), default=0.0)
            if most < wanted:
                raise ValueError(
                    f"a replica asks for {wanted:g} {name}s, and the nodes of this cluster have "
                    f"{most:g}; ask for fewer, or add nodes"
                )

    def __exit__(self, *error: object) -> None:
        import ray
        from ray import serve

        with suppress(Exception):  # nothing may have been started
            if self._own:
                serve.shutdown()
            else:
                serve.delete(NAME)
        ray.shutdown()


def models_of(names: Sequence[str]) -> tuple[str, ...]:
    """Names of models as other processes find them: folders by their whole paths."""
    return tuple(str(Path(name).resolve()) if Path(name).exists() else name for name in names)
