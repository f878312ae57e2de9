"""What every request passes: bounds of its body, and of the time that a client takes to read."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

from fewstep.sampling.settings import Settings
from fewstep.serve.engine import Event
from fewstep.serve.gate import JSON_BYTES, Gate
from fewstep.serve.keys import Clients
from fewstep.serve.service import Asked, Work
from fewstep.serve.settings import Limits

SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/v1/images/generations",
    "headers": [(b"host", b"localhost")],
    "client": ("127.0.0.1", 1),
}


def gate(app: Any, **limits: int) -> Gate:
    return Gate(app, Clients((), 4), Limits(**limits), True, (), Counter())


def test_a_client_that_does_not_read_is_let_go():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def never(message):
        await asyncio.sleep(60)

    begun = time.monotonic()
    closed = gate(app, send_seconds=1)
    asyncio.run(closed(dict(SCOPE), never, never))  # type: ignore[arg-type]
    assert 0.5 < time.monotonic() - begun < 20
    assert closed.clients.of(None, "127.0.0.1").active == 0


def test_a_body_without_a_length_is_bounded_whatever_the_application_makes_of_it():
    sent: list[Any] = []

    async def app(scope, receive, send):
        try:
            while (await receive())["more_body"]:
                pass
            status = 200
        except Exception:
            status = 400
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive():
        return {"type": "http.request", "body": b"a" * (JSON_BYTES // 4), "more_body": True}

    async def send(message):
        sent.append(message)

    asyncio.run(gate(app)(dict(SCOPE), receive, send))
    assert [one["type"] for one in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 413
    assert b"too_large" in sent[1]["body"]


def test_previews_that_are_not_read_do_not_pile_up():
    asked = Asked("m", {}, Settings(), (((1, 1.0),),), partial=None)
    work = Work(asked, None, asyncio.Queue())  # type: ignore[arg-type]
    for nfe in range(1, 50):
        work.add(Event("preview", nfe % 2, nfe, nfe))
    work.add(Event("picture", 0, 50, 50))
    assert work.events.qsize() == 3
    assert {event.nfe for event in work.latest.values()} == {48, 49}


def test_requests_at_a_time_are_bounded_whoever_they_are_of():
    sent: list[Any] = []

    async def app(scope, receive, send):
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def two() -> int:
        closed = gate(app, most_requests=1)
        first = asyncio.create_task(closed(dict(SCOPE), receive, send))
        await asyncio.sleep(0)
        await closed({**SCOPE, "client": ("127.0.0.2", 1)}, receive, send)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        return closed.active

    assert asyncio.run(two()) == 0
    assert sent[0]["status"] == 503
    assert (b"retry-after", b"2") in sent[0]["headers"]
