"""What the commands share: their options, and how text becomes values."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = [
    "MACHINE_PANEL",
    "MOST_SEEDS",
    "SOLVER_PANEL",
    "ModelArgument",
    "SolverOption",
    "NfeOption",
    "BudgetOption",
    "GridOption",
    "AfsOption",
    "EndOption",
    "FinalOption",
    "SeedsOption",
    "DeviceOption",
    "DtypeOption",
    "JsonOption",
    "parse_seeds",
    "parse_size",
    "parse_grid",
    "parse_widths",
    "progress_bar",
    "refuse_beside",
    "resumable",
]

MOST_SEEDS = 1_000_000
SOLVER_PANEL, MACHINE_PANEL = "Solver", "Machine"  # headings in the help

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A built-in model's name, a model folder, or a pipeline of diffusers: its folder, a "
        "Stable Diffusion in one file, or OWNER/NAME on the hub."
    ),
]
SolverOption = Annotated[
    str,
    typer.Option(
        help="auto (the best known), a name, NAME:option=value, or a folder.",
        rich_help_panel=SOLVER_PANEL,
    ),
]
NfeOption = Annotated[int, typer.Option(help="Network evaluations per picture.", min=1, max=10_000)]
BudgetOption = Annotated[
    int | None,
    typer.Option(
        help="Network evaluations per picture; 5, or a learned solver's own.",
        min=1,
        max=10_000,
        rich_help_panel=SOLVER_PANEL,
    ),
]
GridOption = Annotated[
    str | None,
    typer.Option(
        help="karras, log-snr, time-uniform, discrete, trailing, or sigmas: 80,9,1,0.002. Default: "
        "the model's (trailing for pipelines), else karras.",
        rich_help_panel=SOLVER_PANEL,
    ),
]
AfsOption = Annotated[
    str | None,
    typer.Option(
        help="Analytic first step, at no evaluation: none, zero or mean.",
        rich_help_panel=SOLVER_PANEL,
    ),
]
EndOption = Annotated[
    str | None,
    typer.Option(
        help="Where a named grid ends: sigma_min, or zero (a last step of order 1, free). Default: "
        "the model's (zero for pipelines), else sigma_min.",
        rich_help_panel=SOLVER_PANEL,
    ),
]
FinalOption = Annotated[
    bool,
    typer.Option(
        "--final",
        metavar="",
        help="Add a last denoising step; costs one evaluation.",
        rich_help_panel=SOLVER_PANEL,
    ),
]
SeedsOption = Annotated[str, typer.Option(help="Seeds, one per picture: 0-63 or 1,5,7-9.")]
DeviceOption = Annotated[
    str,
    typer.Option(help="A torch device: cpu, cuda, cuda:1.", rich_help_panel=MACHINE_PANEL),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="The network's arithmetic: float32, bfloat16, float16.", rich_help_panel=MACHINE_PANEL
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", metavar="", help="Print JSON on standard output instead.")
]


def parse_seeds(text: str, what: str = "seeds") -> list[int]:
    """Seeds, or other whole numbers, from "0-63" or "1,5,7-9", in that order, each once. Errors:
    ValueError that shows the form."""
    seeds: dict[int, None] = {}
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise ValueError(f"{what} are written like 0-63 or 1,5,7-9, got {text!r}")
        first, last = int(low), int(high or low)
        if last < first or last >= 2**63:
            raise ValueError(f"{what} must rise and stay below 2^63, got {part.strip()!r}")
        if last - first >= MOST_SEEDS or len(seeds) >= MOST_SEEDS:
            raise ValueError(f"at most {MOST_SEEDS} {what} at a time, got {text!r}")
        seeds.update(dict.fromkeys(range(first, last + 1)))
    return list(seeds)


def parse_grid(text: str | None) -> str | list[float] | None:
    """A grid's name as it is, or sigmas from "80,9,1"."""
    if text is None or not (text[:1].isdigit() or "," in text):
        return text
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"a grid is a name or sigmas like 80,9,1,0.002, got {text!r}") from None


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) from "512x768", or from "512" for a square."""
    height, by, width = text.lower().partition("x")
    sides = (height, width if by else height)
    if not all(side.isdecimal() for side in sides):
        raise ValueError(f"a size is written HEIGHTxWIDTH in pixels, like 512x768, got {text!r}")
    return int(sides[0]), int(sides[1])


def parse_widths(text: str) -> tuple[int, ...]:
    """Channel counts from "64,128"."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"widths are written like 64,128, got {text!r}") from None


def refuse_beside(what: str, options: Mapping[str, Any]) -> None:
    """Errors: ValueError that says `what` and names those of the options that were given."""
    given = [name for name, value in options.items() if value not in (None, False)]
    if given:
        raise ValueError(f"{what}: leave out {' and '.join(given)}")


@contextmanager
def resumable(path: Path) -> Iterator[None]:
    """Say, where Ctrl-C or SIGTERM ends the work, that it can be taken up again from this file or
    folder; exit code 130 or 143."""
    try:
        yield
    except KeyboardInterrupt as stop:
        inside = path.iterdir() if path.is_dir() else ()
        if path.is_file() or any(not one.name.startswith(".") for one in inside):
            done = f"{path} holds what was done, run the same command again to go on"
        else:
            done = "nothing was saved yet, run the same command again to start again"
        print(f"fewstep: stopped; {done}", file=sys.stderr)
        sys.exit(getattr(stop, "code", 130))


def progress_bar(quiet: bool) -> Progress:
    """A bar on standard error, so that standard output stays clean."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet or not sys.stderr.isatty(),
    )
