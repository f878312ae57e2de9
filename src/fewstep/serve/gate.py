"""What every request passes, before and after the application: who asks, how much, how long.

A plain ASGI wrapper. Requests get an id; bodies are bounded; keys, rates and numbers at a time are
checked; a client that does not read what is ready is let go; each request is one line of the log.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fewstep.serve.errors import ApiError
from fewstep.serve.keys import Client, Clients
from fewstep.serve.settings import Limits

__all__ = ["Gate"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN = ("/", "/healthz", "/readyz", "/favicon.ico")  # need no key
STATUS = "/v1/status"  # the page asks for it all the time: it counts as no request
JSON_BYTES = 262_144  # of a body without pictures
HERE = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.IGNORECASE)
GIVEN_ID = re.compile(r"[\w.-]{1,100}", re.ASCII)
SAFE = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"content-security-policy": (
        b"default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
        b"frame-ancestors 'none'; form-action 'self'"
    ),
}
log = logging.getLogger("fewstep.serve")


class Gone(Exception):
    """The client does not read what is sent."""


@dataclass(eq=False)
class Gate:
    """Attributes:
    app: what answers
    clients: who may ask
    limits: bounds of bodies and of sending
    local: whether only names of this machine are answered, for a service without keys
    origins: pages of other hosts that may ask, "*" for all; none by default
    answers: how many of each status
    active: requests for pictures now
    """

    app: Any
    clients: Clients
    limits: Limits
    local: bool
    origins: tuple[str, ...]
    answers: Counter[int]
    active: int = 0

    def enter(self) -> None:
        """Begin a request. Raises ApiError where there are too many, whoever they are of."""
        if self.active >= self.limits.most_requests:
            raise ApiError(
                503, "too many requests at a time; try again later", code="busy", retry_after=2
            )
        self.active += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = Answer(self, scope, receive, send)
        try:
            await answer.go()
        except Gone:
            log.info("gone", extra={"facts": {"id": answer.id}})


class Answer:
    """One request on its way."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, send: Send) -> None:
        self.gate, self.scope, self._receive, self._send = gate, scope, receive, send
        self.headers = {name.decode("latin-1"): v.decode("latin-1") for name, v in scope["headers"]}
        given = self.headers.get("x-request-id", "")
        self.id = given if GIVEN_ID.fullmatch(given) else f"req_{secrets.token_hex(10)}"
        self.status, self.taken, self.begun = 0, 0, time.perf_counter()
        self.facts: dict[str, Any] = {}
        self.over = False
        self.origin = self._allowed_origin()

    async def go(self) -> None:
        client: Client | None = None
        entered = False
        path = self.scope["path"]
        try:
            self._check_host()
            if self._preflight():
                await self._plain(204, {})
                return
            if path not in OPEN and not path.startswith("/static/"):
                address = (self.scope.get("client") or ("unknown",))[0]
                who = self.gate.clients.of(self.headers.get("authorization"), address)
                if path.startswith("/v1/") and path != STATUS:
                    self.gate.enter()
                    entered = True
                    who.enter()
                    client = who
                self.facts["client"] = who.name
                self.scope.setdefault("state", {})
                self.scope["state"]["owner"] = who.name
            self.scope.setdefault("state", {})["facts"] = self.facts
            self._check_length()
            await self.gate.app(self.scope, self.receive, self.send)
        except ApiError as error:
            if self.status == 0:
                self.over = False
                await self._plain(error.status, error.headers, error.body)
        finally:
            self.gate.active -= entered
            if client is not None:
                client.leave()
            self.gate.answers[self.status] += 1
            if path.startswith("/v1/"):
                self._write_log(path)

    async def receive(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        self.taken += len(message.get("body", b""))
        if self.taken > self._most:  # the application may make another error of it, see `send`
            self.over = True
            raise _too_large(self._most)
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if self.over and self.status == 0:
            raise _too_large(self._most)
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._add_headers(message)
        try:
            async with asyncio.timeout(self.gate.limits.send_seconds):
                await self._send(message)
        except TimeoutError:
            raise Gone from None

    @property
    def _most(self) -> int:
        upload = self.headers.get("content-type", "").startswith("multipart/form-data")
        return self.gate.limits.upload_bytes if upload else JSON_BYTES

    def _check_length(self) -> None:
        length = self.headers.get("content-length", "0")
        if length.isdecimal() and len(length) < 20 and int(length) > self._most:
            raise _too_large(self._most)

    def _check_host(self) -> None:
        """Pages of other hosts reach a service of this machine through the browser: by a name of
        theirs that points here, or by a form. Neither is answered."""
        if self.gate.local and not HERE.fullmatch(self.headers.get("host", "")):
            raise ApiError(403, "this service answers to localhost alone", code="wrong_host")
        origin = self.headers.get("origin")
        if origin and self.origin is None and urlsplit(origin).netloc != self.headers.get("host"):
            raise ApiError(403, "pages of other hosts may not ask", code="wrong_origin")

    def _allowed_origin(self) -> str | None:
        origin = self.headers.get("origin")
        allowed = origin is not None and {origin, "*"} & set(self.gate.origins)
        return origin if allowed else None

    def _preflight(self) -> bool:
        asks = "access-control-request-method" in self.headers
        return self.scope["method"] == "OPTIONS" and asks and self.origin is not None

    def _add_headers(self, message: MutableMapping[str, Any]) -> None:
        added = [*SAFE.items(), (b"x-request-id", self.id.encode())]
        if self.origin is not None:
            added += [
                (b"access-control-allow-origin", self.origin.encode("latin-1")),
                (b"access-control-allow-headers", b"authorization, content-type"),
                (b"access-control-allow-methods", b"GET, POST"),
                (b"vary", b"origin"),
            ]
        known = {name.lower() for name, _ in message.get("headers", ())}
        message["headers"] = [
            *message.get("headers", ()),
            *((name, value) for name, value in added if name not in known),
        ]

    async def _plain(self, status: int, headers: dict[str, str], body: Any = None) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        if body is not None:
            pairs.append((b"content-type", b"application/json"))
        pairs.append((b"content-length", str(len(data)).encode()))
        await self.send({"type": "http.response.start", "status": status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": data})

    def _write_log(self, path: str) -> None:
        facts = {
            "id": self.id,
            "method": self.scope["method"],
            "path": path[:200],
            "status": self.status,
            "seconds": round(time.perf_counter() - self.begun, 4),
            **self.facts,
        }
        log.info("request", extra={"facts": facts})


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"a request must have at most {most} bytes", code="too_large")
