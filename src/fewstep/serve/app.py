"""The HTTP interface: OpenAI's Images API, previews and refinement, operations, and the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import anyio.to_thread
from fastapi import FastAPI
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from fewstep.provenance import VERSION
from fewstep.serve import asking
from fewstep.serve.answers import in_events, in_one, model_facts
from fewstep.serve.errors import ApiError, as_api_error
from fewstep.serve.gate import Gate
from fewstep.serve.keys import Clients, Key
from fewstep.serve.memory import settle, tended
from fewstep.serve.metrics import Numbers, metrics, numbers
from fewstep.serve.pictures import FORMATS, encode, pixel_error
from fewstep.serve.schema import Edit, Generation, Preview, Refinement, Variation
from fewstep.serve.service import Asked, Service
from fewstep.serve.settings import Limits
from fewstep.serve.store import Made

__all__ = ["add_operations", "add_page", "create_api", "create_app", "empty_app"]

STATIC = Path(__file__).parent / "static"
Id = Annotated[str, PathParameter(max_length=64, pattern=r"^[\w-]+$")]
ModelId = Annotated[str, PathParameter(max_length=200)]
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "what was asked for is not possible",
        401: "a key is needed",
        403: "from a page of another host",
        404: "there is no such model or picture",
        413: "too many bytes",
        422: "a field is not of its type",
        429: "too many requests",
        503: "stopping, too busy, or failed",
    }.items()
}
IMAGE = {"type": "string", "format": "binary"}


def create_app(
    service: Service,
    *,
    keys: tuple[Key, ...] = (),
    local: bool = True,
    origins: tuple[str, ...] = (),
    warm: bool = True,
    log_prompts: bool = False,
) -> Gate:
    """The ASGI application.

    Args:
        service: makes the pictures
        keys: who may ask; anybody where there are none
        local: whether only names of this machine are answered, see `Gate`
        origins: pages of other hosts that may ask
        warm: whether a first picture is made before it is ready
        log_prompts: whether the log has prompts
    """
    answers: Counter[int] = Counter()
    ready: dict[str, bool] = {"warm": not warm}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if warm:
            await service.warm_up()
            settle()
            ready["warm"] = True
        async with tended():
            yield

    app = create_api(service, log_prompts, lifespan)
    add_page(app)
    add_operations(
        app,
        service.limits,
        lambda: ready["warm"] and service.engine.alive,
        lambda: {"": numbers(service)},
        answers,
    )
    clients = Clients(keys, service.limits.most_streams)
    return Gate(app, clients, service.limits, local and not keys, origins, answers)


def create_api(service: Service, log_prompts: bool = False, lifespan: Any = None) -> FastAPI:
    """The addresses that make pictures, without a gate before them and without operations."""
    app = empty_app(lifespan)
    _add_models(app, service)
    _add_images(app, service, log_prompts)
    _add_one_image(app, service)
    return app


def empty_app(lifespan: Any = None, **options: Any) -> FastAPI:
    """An application that has errors alone."""
    app = FastAPI(
        title="fewstep",
        version=VERSION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
        **options,
    )
    _add_errors(app)
    return app


def _add_errors(app: FastAPI) -> None:
    def answer(error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(ApiError)
    async def api(_: Request, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def body(_: Request, error: RequestValidationError) -> Response:
        return answer(asking.invalid(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        text = {404: "there is no such address", 405: "this address has no such method"}
        found = ApiError(error.status_code, text.get(error.status_code, str(error.detail)))
        response = answer(found)
        for name, value in (error.headers or {}).items():
            response.headers[name] = value
        return response

    @app.exception_handler(Exception)
    async def other(_: Request, error: Exception) -> Response:
        return answer(as_api_error(error))


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_facts(service, name) for name in service.models]}

    @app.get("/v1/models/{model}")
    async def model(model: ModelId) -> dict[str, Any]:
        return model_facts(service, service.model(model)[0])


def _add_images(app: FastAPI, service: Service, log_prompts: bool) -> None:
    def note(request: Request, prompt: str) -> None:
        if log_prompts:
            request.state.facts["prompt"] = prompt

    @app.post("/v1/images/generations")
    async def generations(body: Generation, request: Request) -> Response:
        note(request, body.prompt)
        asked = asking.generated(service, body, owner(request))
        if body.stream:
            name = "image_generation"
            return await in_events(service, request, asked, name, progress=body.progress)
        return await in_one(service, request, asked)

    form = {**Edit.model_json_schema(ref_template="#/components/schemas/{model}")}
    form["properties"] = {**form["properties"], "image": IMAGE, "mask": IMAGE}
    form["required"] = ["image"]
    extra = {"requestBody": {"content": {"multipart/form-data": {"schema": form}}}}

    @app.post("/v1/images/edits", openapi_extra=extra)
    async def edits(request: Request) -> Response:
        body, images, mask = await asking.read_form(request, service.limits.upload_bytes)
        note(request, body.prompt)
        asked = await anyio.to_thread.run_sync(
            asking.edited, service, body, images, mask, owner(request)
        )
        if body.stream:
            return await in_events(service, request, asked, "image_edit", progress=body.progress)
        return await in_one(service, request, asked)

    @app.post("/v1/previews")
    async def previews(body: Preview, request: Request) -> Response:
        note(request, body.prompt)
        asked = asking.previewed(service, body, owner(request))
        if body.stream:
            return await in_events(service, request, asked, "preview", progress=body.progress)
        return await in_one(service, request, asked)


def _add_one_image(app: FastAPI, service: Service) -> None:
    async def kept(key: str, request: Request) -> Made:
        made = await service.store.get(key, owner(request))
        if made is None:
            raise ApiError(
                404,
                "there is no such picture any more; make it again from its seed",
                param="id",
                code="image_not_found",
            )
        return made

    async def again(request: Request, body: Any, asked: Asked, name: str, extra: Any) -> Response:
        if body.stream:
            return await in_events(service, request, asked, name, extra, body.progress)
        return await in_one(service, request, asked, extra)

    @app.get("/v1/images/{id}")
    async def image(id: Id, request: Request, output_format: str = "png") -> Response:
        made = await kept(id, request)
        if output_format not in FORMATS:
            raise ApiError(400, f"output_format must be one of {', '.join(FORMATS)}")
        data = await anyio.to_thread.run_sync(encode, made.pixels, output_format, 90, made.about)
        return Response(
            data, media_type=FORMATS[output_format], headers={"cache-control": "private"}
        )

    @app.post("/v1/images/{id}/refine")
    async def refine(id: Id, body: Refinement, request: Request) -> Response:
        made = await kept(id, request)

        def extra(fact: dict[str, Any]) -> dict[str, Any]:
            near = pixel_error(made.pixels, fact["pixels"])
            return {"refines": id, "pixel_error": near, "nfe_before": made.about["nfe"]}

        asked = asking.refined(service, body, made)
        return await again(request, body, asked, "image_refinement", extra)

    @app.post("/v1/images/{id}/variations")
    async def variations(id: Id, body: Variation, request: Request) -> Response:
        made = await kept(id, request)

        def extra(fact: dict[str, Any]) -> dict[str, Any]:
            return {"varies": id, "pixel_error": pixel_error(made.pixels, fact["pixels"])}

        asked = asking.varied(service, body, made)
        return await again(request, body, asked, "image_variation", extra)


def add_operations(
    app: FastAPI,
    limits: Limits,
    ready: Callable[[], bool],
    reports: Callable[[], Mapping[str, Numbers]],
    answers: Counter[int],
) -> None:
    """What operators ask for, and what the page shows of the service.

    Args:
        app: gets the addresses
        limits: of requests
        ready: whether work is taken
        reports: the numbers of each replica by its name, which is empty where there is one
        answers: how many of each status
    """

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> dict[str, str]:
        return {"status": "ok", "version": VERSION}

    @app.get("/readyz", include_in_schema=False)
    async def readyz() -> Response:
        fine = ready()
        status = {"status": "ready" if fine else "not ready"}
        return JSONResponse(status, 200 if fine else 503)

    @app.get("/metrics", include_in_schema=False)
    async def all_metrics() -> Response:
        return Response(metrics(reports(), answers), media_type="text/plain; version=0.0.4")

    @app.get("/v1/status")
    async def status() -> dict[str, Any]:
        found = reports()
        total = {
            name: sum(one["gauges"][name] for one in found.values())
            for name in ("queue_pictures", "running_pictures", "evaluations_per_second")
        }
        return {
            "waiting": total["queue_pictures"],
            "running": total["running_pictures"],
            "evaluations_per_second": round(total["evaluations_per_second"], 1),
            "most_images": limits.most_images,
            "most_evaluations": limits.most_evaluations,
            "replicas": {name: one["process"] for name, one in found.items() if name},
        }


def add_page(app: FastAPI) -> None:
    """The page at `/`, and its files."""

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return FileResponse(STATIC / "icon.svg", media_type="image/svg+xml")

    app.mount("/static", StaticFiles(directory=STATIC), name="static")


def owner(request: Request) -> str:
    """Who asks."""
    return getattr(request.state, "owner", "local")
