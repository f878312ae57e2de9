"""What goes back: JSON and server-sent events with the fields that OpenAI's client reads."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from fewstep.serve.errors import ApiError, as_api_error
from fewstep.serve.service import Asked, Service, Work
from fewstep.solver import names

__all__ = ["EventStream", "in_events", "in_one", "model_facts"]

Extra = Callable[[dict[str, Any]], dict[str, Any]]
BEAT = b": waiting\n\n"


class EventStream(Response):
    """Server-sent events; the client's going away ends the generator at once."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(None)
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-store"
        self.headers["x-accel-buffering"] = "no"
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)

        async def write() -> None:
            async with aclosing(self.events) as events:
                async for data in events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        await first_of(write(), gone(receive))


async def gone(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def first_of(work: Any, other: Any) -> bool:
    """Run until one of both ends; whether it was the work. Its errors are raised."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(other)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        done = tasks[0].done()
        if done:
            tasks[0].result()
        return done
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError, Exception):
                await task


async def in_one(
    service: Service, request: Request, asked: Asked, extra: Extra = lambda fact: {}
) -> Response:
    """All pictures of a request in one answer.

    Args:
        service: makes them
        request: is watched: where its client goes away, its evaluations stop
        asked: what it wants
        extra: further fields of each picture
    """
    work = await service.submit(asked)
    found: list[dict[str, Any]] = [{} for _ in range(work.count)]

    async def collect() -> None:
        async for fact in service.watch(work):
            if fact["kind"] == "picture":
                found[fact["index"]] = fact

    told(request, work)
    if not await first_of(collect(), gone(request.receive)):
        service.cancel(work)
        return Response(status_code=499)
    told(request, work)
    data = [_picture(fact, work) | extra(fact) for fact in found]
    return JSONResponse(
        {
            "created": int(time.time()),
            "data": data,
            **_common(work),
            "usage": _usage(work),
            "model": asked.model,
        }
    )


async def in_events(
    service: Service,
    request: Request,
    asked: Asked,
    name: str,
    extra: Extra = lambda fact: {},
    progress: bool = False,
) -> Response:
    """The same as events, each previews and picture as it gets ready.

    Args:
        name: of the events: NAME.partial_image, NAME.completed
        progress: whether places in the queue are told too, as NAME.queued
    """
    work = await service.submit(asked)
    told(request, work)
    return EventStream(_events(service, work, name, extra, progress, request))


async def _events(
    service: Service, work: Work, name: str, extra: Extra, progress: bool, request: Request
) -> AsyncGenerator[bytes, None]:
    facts: AsyncIterator[dict[str, Any]] = service.watch(work)
    try:
        async with aclosing(facts) as found:  # type: ignore[type-var]
            async for fact in found:
                event = _event(work, name, fact, extra)
                if event is not None and (fact["kind"] != "queued" or progress):
                    yield _frame(event)
                elif fact["kind"] == "queued":
                    yield BEAT
    except ApiError as error:
        yield _frame(error.body)
    except Exception as error:
        yield _frame(as_api_error(error).body)
    finally:
        told(request, work)


def _event(work: Work, name: str, fact: dict[str, Any], extra: Extra) -> dict[str, Any] | None:
    kind = fact["kind"]
    if kind == "queued":
        return {
            "type": f"{name}.queued",
            "position": fact["position"],
            "estimated_seconds": fact["seconds"],
        }
    common = {"created_at": int(time.time()), **_common(work), "index": fact["index"]}
    if kind == "partial":
        return {
            "type": f"{name}.partial_image",
            "b64_json": fact["b64_json"],
            "partial_image_index": fact["number"],
            **common,
            "seed": fact["seed"],
            "nfe": fact["nfe"],
        }
    usage = _usage(work, 1)
    own = {**_picture(fact, work), **extra(fact)}
    return {"type": f"{name}.completed", **own, **common, "usage": usage}


def _frame(event: dict[str, Any]) -> bytes:
    kind = event.get("type")
    head = f"event: {kind}\n" if kind else ""
    return f"{head}data: {json.dumps(event)}\n\n".encode()


def _picture(fact: dict[str, Any], work: Work) -> dict[str, Any]:
    label = work.asked.given.get("label")
    shown = label[fact["index"]] if isinstance(label, list) else label
    prompt = work.asked.given.get("prompt")
    text = prompt[fact["index"]] if isinstance(prompt, list) else prompt
    return {
        "b64_json": fact.get("b64_json"),
        "url": fact.get("url"),
        "revised_prompt": text if text is not None or shown is None else str(shown),
        "id": fact["id"],
        "seed": fact["seed"],
        "nfe": fact["nfe"],
    }


def _common(work: Work) -> dict[str, Any]:
    height, width, _ = work.order.run.model.picture  # type: ignore[attr-defined]
    return {
        "background": "opaque",
        "output_format": work.asked.kind,
        "quality": "auto",
        "size": f"{width}x{height}",
    }


def _usage(work: Work, pictures: int | None = None) -> dict[str, Any]:
    """OpenAI counts tokens; here an evaluation of the network counts as one, and text as none."""
    spent = work.order.nfe * (work.count if pictures is None else pictures)
    return {
        "input_tokens": 0,
        "output_tokens": spent,
        "total_tokens": spent,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    }


def model_facts(service: Service, name: str) -> dict[str, Any]:
    """A model in the list of models."""
    model = service.models[name]
    card = model.card
    height, width, channels = model.picture  # type: ignore[attr-defined]
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "fewstep",
        "summary": card.summary,
        "classes": list(card.classes),
        "text": not card.classes,
        "size": f"{width}x{height}",
        "channels": channels,
        "budgets": [int(budget) for budget in card.auto],
        "solvers": ["auto", *names(), *(names(consistency=True) if card.distilled else [])],
    }


def told(request: Request, work: Work) -> None:
    """What the log says of a request; never its prompt."""
    facts = getattr(request.state, "facts", None)
    if facts is None:
        return
    job = work.job
    facts.update(
        model=work.asked.model,
        n=work.count,
        nfe=work.order.nfe,
        evaluations=0 if job is None else job.spent,
    )
    if job is not None and job.started is not None:
        facts["waited"] = round(job.started - job.submitted, 4)
    if job is not None and job.cancelled:
        facts["cancelled"] = True
