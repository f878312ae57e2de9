"""fewstep serve."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from fewstep.cli.app import app
from fewstep.cli.options import MACHINE, SPREAD, Machine, Take, command, flag, option
from fewstep.cli.parsing import parse_size, words
from fewstep.extras import needs
from fewstep.serve.settings import Limits, Replicas

SERVICE, LIMITS = Group("Service", sort_key=2), Group("Limits", sort_key=6)
BOUNDS = Take(
    Limits,
    LIMITS,
    only=("most_images", "most_evaluations", "most_waiting", "most_streams", "most_requests"),
)
REPLICAS = Take(Replicas, SPREAD)


@command(
    app,
    "serve",
    BOUNDS,
    Take(Machine, MACHINE, without=("batch",)),
    REPLICAS,
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
    preview_decoder: Annotated[
        Path | None,
        option("Folder of an AutoencoderTiny that shows previews of latents.", MACHINE),
    ] = None,
    grace: Annotated[
        int, option("Seconds in which running pictures end at a stop.", SERVICE, least=0)
    ] = 30,
    log_prompts: Annotated[bool, flag("Write prompts into the log.")] = False,
    quiet: Annotated[bool, flag("Log warnings only.")] = False,
    ray: Annotated[
        bool,
        Parameter(help="Replicas on a Ray cluster make the pictures.", negative="", group=SPREAD),
    ] = False,
    address: Annotated[
        str | None,
        option("Of the Ray cluster. Default: $RAY_ADDRESS, else one on this machine.", SPREAD),
    ] = None,
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
    from fewstep.serve.run import Server, listen, start_log

    access = _access(host, port, keys, cors)
    limits, replicas = Limits(**BOUNDS.take(given)), Replicas(**REPLICAS.take(given))
    if not ray and (address or replicas != Replicas()):
        raise ValueError("replicas and their address are of a Ray cluster; add --ray")
    if size:
        given["size"] = parse_size(size)
    plain = {field.name: field.default for field in fields(Machine)}
    chosen = {name: value for name, value in given.items() if value != plain.get(name)}
    names = tuple(model or [_default()])
    with listen(host, port) as bound, ExitStack() as stack:
        start_log("warning" if quiet else "info")
        if ray:
            from fewstep.serve.rays import Setup, create_front, deployed, models_of

            tiny = preview_decoder and preview_decoder.resolve()
            setup = Setup(models_of(names), chosen, limits, batch, workers, log_prompts, tiny)
            service: Any = stack.enter_context(deployed(setup, replicas, address or ""))
            application = create_front(service, limits, **access)
        else:
            from fewstep.serve.app import create_app
            from fewstep.serve.run import load_models, make_service

            models = load_models(names, chosen)
            names = tuple(models)
            service = make_service(
                models, limits, batch=batch, workers=workers, preview_decoder=preview_decoder
            )
            application = create_app(service, **access, log_prompts=log_prompts)

        def started(address: str) -> None:
            print(f"fewstep serves {', '.join(names)} on {address}", flush=True)

        Server(application, service, grace, started).run([bound])
        service.close(0)


def _access(host: str, port: int, keys: Path | None, cors: str | None) -> dict[str, Any]:
    """Who may ask, as `create_app` takes it."""
    from fewstep.serve.keys import read_keys
    from fewstep.serve.run import is_loopback

    known, local = () if keys is None else read_keys(keys), is_loopback(host)
    if not local and not known:
        raise ValueError(f"host {host} is reached from other machines: give keys too, with --keys")
    if port > 65_535:
        raise ValueError(f"port must be at most 65535, got {port}")
    return {
        "keys": known,
        "local": local,
        "origins": () if cors is None else words(cors, "--cors"),
    }


def _default() -> str:
    """The model that is served where none is named: one by text, where it can be loaded."""
    by_text = all(find_spec(library) for library in ("diffusers", "transformers"))
    return "garments" if by_text else "fashion-mnist"
