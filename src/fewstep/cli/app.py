"""The applications that the commands register themselves with."""

from __future__ import annotations

from cyclopts import App, Parameter

from fewstep.provenance import VERSION

__all__ = ["app", "distill_app", "train_app"]

HELP = "Sample pretrained diffusion models in 1 to 10 network evaluations."
EVERYWHERE = (
    "With every command: --traceback shows where an error came from, and --import MODULE first "
    "imports a module that registers solvers."
)

app = App(
    name="fewstep",
    help=HELP,
    help_format="plaintext",
    help_epilogue=EVERYWHERE,
    version=f"fewstep {VERSION}",
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(allow_repeating=True),  # the last one counts
)
train_app = App(name="train", help="Train solvers and networks.")
distill_app = App(name="distill", help="Distil networks into few-step ones.")
app.command(train_app)
app.command(distill_app)
