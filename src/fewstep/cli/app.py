"""The applications that the commands register themselves with."""

from __future__ import annotations

import typer

__all__ = ["app", "train_app"]

app = typer.Typer(
    help="Sample pretrained diffusion models in 1 to 10 network evaluations.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train_app = typer.Typer(help="Train networks.", no_args_is_help=True)
app.add_typer(train_app, name="train")
