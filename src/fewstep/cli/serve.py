"""fewstep serve."""

from __future__ import annotations

from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from fewstep.cli.app import app
from fewstep.cli.options import MACHINE, Machine, Take, command, flag, option
from fewstep.cli.parsing import parse_size, words
from fewstep.extras import needs
from fewstep.serve.limits import Limits

SERVICE, LIMITS = Group("Service", sort_key=2), Group("Limits", sort_key=6)
BOUNDS = ("most_images", "most_evaluations", "most_waiting", "most_streams")


@command(
    app,
    "serve",
    Take(Limits, LIMITS, only=BOUNDS),
    Take(Machine, MACHINE, without=("batch",)),
)
def serve_command(
    model: Annotated[
        list[str] | None,
        Parameter(
            help="Models: built-in names, folders, pipelines. The first is the default. Left out: "
            "a built-in one."
        ),
    ] = None,
    /,
    *,
    host: Annotated[
        str, option("The address to listen on; others than loopback need --keys.", SERVICE)
    ] = "127.0.0.1",
    port: Annotated[int, option("0 takes a free one.", SERVICE, least=0)] = 8000,
    keys: Annotated[
        Path | None, option("A TOML file of keys; see docs/serving.md.", SERVICE)
    ] = None,
    cors: Annotated[
        str | None,
        option("Pages of these hosts may ask, with commas; * for all. Default: none.", SERVICE),
    ] = None,
    size: Annotated[
        str | None,
        option("A pipeline's pictures in pixels, HEIGHTxWIDTH. Default: as it was trained."),
    ] = None,
    batch: Annotated[
        int | None,
        option("Rows of one evaluation. Default: 16 on a CPU, else 64.", MACHINE, least=1),
    ] = None,
    workers: Annotated[
        int | None,
        option("Threads that evaluate. Default: 2 on a CPU, else 1.", MACHINE, least=1),
    ] = None,
    grace: Annotated[
        int, option("Seconds in which running pictures end at a stop.", SERVICE, least=0)
    ] = 30,
    log_prompts: Annotated[bool, flag("Write prompts into the log.")] = False,
    quiet: Annotated[bool, flag("Log warnings only.")] = False,
    **given: Any,
) -> None:
    """Serve pictures over HTTP: OpenAI's Images API, previews and refinement, and a page.

    It listens on this machine alone unless told otherwise. Ctrl-C or SIGTERM stops it once what
    runs is finished.
    """
    with needs("serve", "fewstep serve"):
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    from fewstep.serve.app import create_app
    from fewstep.serve.keys import read_keys
    from fewstep.serve.run import Server, is_loopback, listen, make_service, start_log

    known = () if keys is None else read_keys(keys)
    local = is_loopback(host)
    if not local and not known:
        raise ValueError(f"host {host} is reached from other machines: give keys too, with --keys")
    if port > 65_535:
        raise ValueError(f"port must be at most 65535, got {port}")
    limits = Limits(**{name: given.pop(name) for name in BOUNDS})
    if size:
        given["size"] = parse_size(size)
    origins = () if cors is None else words(cors, "--cors")
    with listen(host, port) as bound:
        start_log("warning" if quiet else "info")
        models = _loaded(model or [_default()], given)
        service = make_service(models, limits, batch=batch, workers=workers)
        application = create_app(
            service, keys=known, local=local, origins=origins, log_prompts=log_prompts
        )

        def started(address: str) -> None:
            print(f"fewstep serves {', '.join(models)} on {address}", flush=True)

        server = Server(application, service, grace, started)
        server.run([bound])
        service.close(0)


def _default() -> str:
    """The model that is served where none is named: one by text, where it can be loaded."""
    by_text = all(find_spec(library) for library in ("diffusers", "transformers"))
    return "garments" if by_text else "fashion-mnist"


def _loaded(names: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """Models by their names; the options of pipelines are left out where they were not given."""
    from fewstep.models import load

    plain = {field.name: field.default for field in fields(Machine)}
    chosen = {name: value for name, value in given.items() if value != plain.get(name)}
    models: dict[str, Any] = {}
    for name in names:
        loaded = load(name, **chosen)
        if not hasattr(loaded, "picture"):
            raise ValueError(f"{name} makes no pictures")
        if loaded.card.name in models:
            raise ValueError(f"two models are called {loaded.card.name}; serve one of them")
        models[loaded.card.name] = loaded
    return models
