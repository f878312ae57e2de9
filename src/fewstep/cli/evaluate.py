"""fewstep evaluate."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from fewstep.cli.app import app
from fewstep.cli.options import MACHINE, command, flag, option
from fewstep.cli.parsing import refuse_beside
from fewstep.cli.work import AsJson, command_line, resumable

CLIP = "openai/clip-vit-large-patch14"  # torchmetrics' default


@command(app, "evaluate")
def evaluate_command(
    images: Annotated[
        Path | None,
        Parameter(help="Pictures: a folder, a .zip, or an .npz with arr_0 or images."),
    ] = None,
    /,
    *,
    reference: Annotated[
        Path | None,
        option(
            "What to compare with: pictures, an .npz with mu and sigma, or what "
            "--save-statistics wrote. Left out: the data set that comes with the features."
        ),
    ] = None,
    features: Annotated[
        str | None,
        option(
            "fashion-a, fashion-b, inception, inception=FILE, or a TorchScript FILE[:WORDS]; "
            "the protocol's, else inception, if left out."
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        option("fd, kid, pr, clip, with commas; none: features only. Default: fd."),
    ] = None,
    protocol: Annotated[
        str | None, option("A published protocol: its counts and sizes are enforced.")
    ] = None,
    explain: Annotated[
        str | None, option("Print all about a protocol, or list them all: list.")
    ] = None,
    captions: Annotated[
        Path | None, option("Captions, one per picture: csv, tsv, json, jsonl.")
    ] = None,
    clip: Annotated[
        str | None, option("CLIP model: a folder, or its id on the Hugging Face hub.")
    ] = None,
    out: Annotated[Path | None, option("File for the result, JSON.")] = None,
    save_statistics: Annotated[
        Path | None,
        option("File for the pictures' statistics, to be a reference: .npz."),
    ] = None,
    limit: Annotated[int | None, option("Only the first pictures.", least=1)] = None,
    fit: Annotated[
        int | None,
        option("Cut reference photographs to squares of this many pixels.", least=1),
    ] = None,
    as_stored: Annotated[
        bool,
        flag("Do not turn pictures as their Exif data say."),
    ] = False,
    trust: Annotated[
        list[str] | None,
        option("SHA-256 of a TorchScript file of --features that may run its code."),
    ] = None,
    skip_corrupt: Annotated[
        bool,
        flag("Leave out, and count, pictures that cannot be read."),
    ] = False,
    resamples: Annotated[
        int | None,
        option(
            "Of the bootstrap behind the error bar; 0: none. Default: 100, inception: 20.", least=0
        ),
    ] = None,
    state: Annotated[
        Path | None,
        option("File that an interrupted run goes on from; beside --out if left out."),
    ] = None,
    batch: Annotated[int, option("Pictures at a time.", least=1)] = 64,
    device: Annotated[str, option("A torch device: cpu, cuda, cuda:1.", group=MACHINE)] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure pictures against a reference: Frechet distance (FID), KID, precision and recall,
    CLIP score.

    Every number comes with its error bar, its protocol, and a record of all that it depends on.
    """
    from fewstep.evaluate.protocols import check_protocol, get_protocol

    if explain is not None:
        _explain(explain, as_json)
        return
    if images is None:
        raise ValueError("name the pictures to measure: a folder, a .zip or an .npz")
    chosen = get_protocol(protocol) if protocol is not None else None
    wanted = _metrics(metrics, chosen.metrics if chosen else ("fd",))
    if chosen is not None:
        changed = {"--features": not (features or "inception").startswith("inception")}
        refuse_beside(
            f"protocol {chosen.name} fixes these",
            {**changed, "--limit": limit, "--as-stored": as_stored},
        )
        features = features or chosen.features
        fit, clip = fit or chosen.reference_fit, clip or chosen.clip
    if ("clip" in wanted) != (captions is not None):
        raise ValueError("--metrics clip and --captions FILE go together")

    from fewstep.data.captions import read_captions
    from fewstep.data.sources import open_images, picture_shape
    from fewstep.evaluate.clip import load_clip
    from fewstep.evaluate.features import resolve_features
    from fewstep.evaluate.gather import open_reference
    from fewstep.evaluate.measure import evaluate
    from fewstep.files import check_writable, write_json
    from fewstep.report.terminal import Progress

    for path in (out, save_statistics, state):
        if path is not None:
            check_writable(path.parent)
    upright = chosen.upright if chosen is not None else not as_stored
    pictures = open_images(images, upright=upright)
    shape = picture_shape(pictures)
    if chosen is not None:
        check_protocol(chosen, len(pictures.names), shape[:2] if shape else None)
    texts = read_captions(captions) if captions is not None else None
    scorer = load_clip(clip or CLIP, device) if texts is not None else None
    against = [name for name in wanted if name != "clip"]
    seen = bool(against) or save_statistics is not None or not wanted
    extractor = None
    if seen:
        extractor = resolve_features(
            features or "inception", device, shape or (32, 32, 3), trust or ()
        )
    own = state is None and out is not None
    state = out.with_name(f"{out.name}.state.npz") if own and out is not None else state
    beside = state.with_name(f"reference.{state.name}") if state is not None else None
    with Progress(as_json) as bar, resumable(state) if state else nullcontext():
        target = None
        if against and extractor is not None:
            target = open_reference(
                reference,
                extractor,
                fit=fit,
                upright=upright,
                batch=batch,
                skip_corrupt=skip_corrupt,
                state=beside,
                report=bar,
            )
        result = evaluate(
            pictures,
            target,
            extractor,
            metrics=wanted,
            clip=scorer,
            captions=texts,
            protocol=chosen,
            batch=batch,
            limit=limit,
            skip_corrupt=skip_corrupt,
            resamples=resamples,
            state=state,
            command=command_line(),
            report=bar,
        )
    if save_statistics is not None:
        result.save_statistics(save_statistics)
    if out is not None:
        write_json(out, result.record)
    if own:  # a state that the user did not name goes when the result is there
        for path in (state, beside):
            if path is not None:
                path.unlink(missing_ok=True)
    if as_json:
        print(json.dumps(result.record))
        return
    _show(result.record)
    for path in (out, save_statistics):
        if path is not None:
            print(path)


def _metrics(text: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    if text is None:
        return default
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    known = ("fd", "kid", "pr", "clip", "none")
    if not names or any(name not in known for name in names) or ("none" in names[1:]):
        raise ValueError(f"metrics are {', '.join(known)}, with commas between, got {text!r}")
    return () if names[0] == "none" else names


def _explain(name: str, as_json: bool) -> None:
    from fewstep.evaluate.protocols import explain, get_protocol, protocols

    if name == "list":
        table = Table("protocol", "data", "pictures", "metrics", box=None)
        for one in map(get_protocol, protocols()):
            table.add_row(one.name, one.data, f"{one.pictures:,}", ", ".join(one.metrics))
        Console().print(table)
        return
    found = get_protocol(name)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for heading, text in explain(found):
        table.add_row(heading, text)
    Console().print(table, highlight=False)


def _show(record: dict[str, Any]) -> None:
    """The numbers, each beside what it was taken of; then what to know about them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("metric", "value", "error"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for name in ("pictures", "against", "protocol"):
        table.add_column(name, overflow="fold")
    protocol, reference = record["protocol"], record["reference"]
    for row in record["metrics"]:
        error = "" if row["error"] is None else f"± {_digits(row['error'], row['error'])}"
        against = (
            Path(record["captions"]["name"]).name if "model" in row else _against(row, reference)
        )
        table.add_row(
            row["metric"],
            _digits(row["value"], row["error"]),
            error,
            f"{row['count']:,}",
            against,
            protocol["name"] if protocol else "none",
        )
    console = Console()
    console.print(table, highlight=False)
    if record["extractor"] is not None:
        console.print(f"features: {record['extractor']['name']}", highlight=False)
    if record["clip"] is not None:
        console.print(f"CLIP: {record['clip']}", highlight=False)
    for text in record["warnings"]:
        console.print(f"note: {text}", style="yellow", highlight=False, soft_wrap=True)


def _against(row: dict[str, Any], reference: dict[str, Any]) -> str:
    count = row.get("reference_count")
    return Path(reference["name"]).name + (f" ({count:,})" if count is not None else "")


def _digits(value: float, error: float | None) -> str:
    """With as many decimals as the error has to two figures."""
    if not error:
        return f"{value:.4g}"
    places = 0
    while error < 10 and places < 8:
        error, places = error * 10, places + 1
    return f"{value:.{places}f}"
