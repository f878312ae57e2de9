"""The applications that the commands register themselves with."""

from __future__ import annotations

from typing import Annotated

import typer

from fewstep.provenance import VERSION

__all__ = ["app", "train_app"]

app = typer.Typer(
    help="Sample pretrained diffusion models in 1 to 10 network evaluations.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train_app = typer.Typer(help="Train solvers and networks.", no_args_is_help=True)
app.add_typer(train_app, name="train")


def _show_version(asked: bool) -> None:
    if asked:
        print(f"fewstep {VERSION}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_show_version, is_eager=True, help="Show the version."
        ),
    ] = False,
) -> None: ...
