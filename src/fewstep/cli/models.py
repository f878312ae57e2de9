"""fewstep models."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from fewstep.cli.app import app
from fewstep.cli.options import command
from fewstep.cli.work import AsJson
from fewstep.text import styled

if TYPE_CHECKING:
    from fewstep.models import Card


@command(app, "models")
def models_command(
    name: Annotated[
        str | None,
        Parameter(help="Show this model: a name, a folder, or a network file of a paper."),
    ] = None,
    /,
    *,
    preset: Annotated[
        str | None, Parameter(help="Published settings that a network file must have.")
    ] = None,
    config: Annotated[
        Path | None, Parameter(help="Settings that a network file does not say: JSON or YAML.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the built-in models, or show what is known of one; --json has all of it."""
    from fewstep.models import builtin, read_card

    options = {"preset": preset, "config": config}
    options = {key: value for key, value in options.items() if value is not None}
    if name and name not in builtin() and Path(name).is_file():
        from fewstep.models.formats.papers import describe

        card, known = describe(name, **options)
        if as_json:
            print(json.dumps({**(card.to_dict() if card else {}), **known}, indent=2))
        else:
            table = _file(card, known) if card else _unsaid(known)
            Console().print(table, highlight=False)
        return
    if options:
        raise ValueError("preset and config go with a network file of a paper; leave them out")
    cards = [read_card(one) for one in ([name] if name else builtin())]
    if as_json:
        values = [card.to_dict() for card in cards]
        print(json.dumps(values[0] if name else values, indent=2))
        return
    Console().print(_card(cards[0]) if name else _list(cards), highlight=False)


def _list(cards: list[Card]) -> Table:
    """One row per model; only what it is gives way on a narrow terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    rows = [(card.name, card.summary, _pictures(card), _sigmas(card)) for card in cards]
    for heading in ("model", "what it is", "pictures", "sigma"):
        table.add_column(heading, overflow="fold", no_wrap=heading != "what it is")
    for row in rows:
        table.add_row(*map(styled, row))
    return table


def _facts() -> Table:
    """Names and what is known under them."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _card(card: Card) -> Table:
    """What a reader wants to know of a model before using it."""
    from fewstep.models import BUILTIN

    table = _facts()
    rows = [
        ("name", card.name),
        ("what it is", card.summary),
        ("pictures", _pictures(card)),
        ("classes", ", ".join(card.classes)),
        ("sigma", _sigmas(card)),
        ("usual grid", f"{card.grid}, which ends at {card.end}"),
        ("weights", card.weights_sha256[:16]),
        ("folder", card.folder),
    ]
    for heading, value in rows:
        if value:
            table.add_row(heading, styled(value))
    if card.auto:
        table.add_row("auto", "what it takes for a number of evaluations:")
    for nfe in card.auto:
        table.add_row("", styled(f"{nfe}: {_choice(card, nfe)}"))
    named = card.name if card.folder is None or card.folder.parent == BUILTIN else str(card.folder)
    table.add_row("try", styled(f"fewstep sample {shlex.quote(named)}"))
    return table


def _file(card: Card, known: dict[str, Any]) -> Table:
    """What a network file is, before it is loaded or made a folder."""
    table = _facts()
    rows = [
        ("file", known["file"]),
        ("kind", known["kind"]),
        ("what it is", card.summary),
        ("preset", known["preset"] or "none of the published ones"),
        ("parameters", f"{known['parameters']:,}"),
        ("pictures", _pictures(card)),
        ("sigma", _sigmas(card)),
        ("classes", str(len(card.classes) or "none")),
        ("features", card.feature_module),
        ("SHA-256", card.weights_sha256),
        ("try", f"fewstep convert {shlex.quote(known['file'])} --out FOLDER"),
    ]
    for heading, value in rows:
        table.add_row(heading, styled(value))
    return table


def _unsaid(known: dict[str, Any]) -> Table:
    """What is known of a file that leaves something unsaid, and what may be chosen."""
    table = _facts()
    rows = [
        ("file", known["file"]),
        ("kind", known["kind"]),
        ("parameters", f"{known['parameters']:,}"),
        ("channels", f"{known['channels']}, then {', '.join(map(str, known['widths']))}"),
        ("classes", str(known["classes"] or "none")),
        ("not known", known["unsaid"]),
        ("presets", ", ".join(known["presets"])),
        ("try", f"fewstep models {shlex.quote(known['file'])} --preset NAME, or --config FILE"),
    ]
    for heading, value in rows:
        table.add_row(heading, styled(value))
    return table


def _choice(card: Card, nfe: str) -> str:
    """What auto does with a budget, in words."""
    entry = card.to_dict()["auto"][nfe]
    if entry.get("learned"):
        return f"the learned solver {entry['learned']}"
    grid = entry.get("grid", card.grid)
    on = f"on {grid}" if isinstance(grid, str) else f"on {len(grid)} levels of its own"
    afs = entry.get("afs", "none")
    return f"{entry['solver']} {on}" + f", afs {afs}" * (afs != "none")


def _pictures(card: Card) -> str:
    return "x".join(map(str, card.picture or ("?", "?", "?")))


def _sigmas(card: Card) -> str:
    return f"{card.sigma_min:g} to {card.sigma_max:g}"
