"""fewstep train solver."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fewstep.cli.app import train_app
from fewstep.cli.options import (
    LEARNING,
    MACHINE,
    SOLVER,
    TEXT,
    Condition,
    Machine,
    ModelArgument,
    Take,
    command,
    option,
)
from fewstep.cli.parsing import refuse_beside
from fewstep.cli.work import resumable
from fewstep.learned.settings import MethodOptions, Settings
from fewstep.text import clean

if TYPE_CHECKING:
    from fewstep.learned import LearnedSolver
    from fewstep.learned import Progress as Batch
    from fewstep.report.terminal import Progress

SOLVER_FIELDS = ("method", "base", "nfe", "grid", "sigma_min", "sigma_max", "afs", "end")
LABEL = "Class name or index. Several, with commas, take turns among the seeds; all: draw one."
METHOD = Take(MethodOptions, LEARNING)


@command(
    train_app,
    "solver",
    Take(Settings, SOLVER, only=SOLVER_FIELDS),
    Take(Settings, LEARNING, without=(*SOLVER_FIELDS, "options")),
    METHOD,
    Take(Condition, TEXT, helps={"label": LABEL, "prompt": "One text for all pictures."}),
    Take(
        Machine,
        MACHINE,
        only=("device", "dtype", "compile"),
        defaults={"dtype": "bfloat16"},
    ),
)
def train_solver_command(
    model: ModelArgument,
    /,
    *,
    out: Annotated[Path, option("Folder for the checkpoint and the solver.")],
    loss: Annotated[
        str,
        option(
            "Where tuned and grid compare ends: pixels, fashion-a or fashion-b.", group=LEARNING
        ),
    ] = "pixels",
    prompts: Annotated[
        Path | None,
        option(
            "A csv, tsv, json or jsonl with a column prompt or caption. Each picture draws one; "
            "every tenth is for validation alone.",
            group=TEXT,
        ),
    ] = None,
    negative: Annotated[str | None, option("Negative prompt.", group=TEXT)] = None,
    teacher_model: Annotated[
        Path | None,
        option(
            "Of a student: the folder of the model that it was distilled from, whose solutions are "
            "the target. Default: the built-in one that its card names.",
            group=LEARNING,
        ),
    ] = None,
    **given: Any,
) -> None:
    """Train a solver for one model and one budget; no data are needed.

    Resumes, exactly, from the checkpoint in the output folder. Ends with a folder that every
    command takes as --solver.
    """
    from fewstep.data.captions import read_captions
    from fewstep.learned.on_model import train_on_model
    from fewstep.models import load, teacher_of
    from fewstep.report.terminal import Progress

    label, prompt = given.pop("label"), given.pop("prompt")
    if prompts is not None:
        refuse_beside("the prompts are in the file", {"--prompt": prompt})
    if prompt is None and prompts is None:
        refuse_beside("a negative prompt needs --prompts or --prompt", {"--negative": negative})
    else:
        refuse_beside("models that take text have no classes", {"--label": label})
    machine = {name: given.pop(name) for name in ("device", "dtype", "compile")}
    own = METHOD.take(given)
    guidance = given.pop("guidance")
    Settings(**given)  # refused before torch and the model are there
    captions = None if prompts is None else read_captions(prompts)
    texts = captions.texts if captions else () if prompt is None else (prompt,)
    loaded, teacher = load(model, **machine), None
    if loaded.card.distilled is not None or teacher_model is not None:
        teacher = teacher_of(loaded.card, teacher_model, **machine)
    with resumable(out), Progress() as bar:
        solver = train_on_model(
            loaded,
            label=label,
            texts=texts,
            digest=captions.digest if captions else "",
            negative=negative,
            guidance=guidance,
            loss=loss,
            teacher_model=teacher,
            out=out,
            report=_report(bar),
            note=bar.say,
            **given,
            **own,
        )
    try_it = f"fewstep sample {shlex.quote(model)} --solver {_typed(out)}"
    try_it += f" --label {shlex.quote(label)}" if label else ""
    try_it += f" --prompt {shlex.quote(texts[0])}" if texts else ""
    try_it += f" --guidance {guidance:g}" if texts and guidance is not None else ""
    print(clean(f"{out}: {_result(solver, given['validation_seeds'])}; try: {try_it}"))


def _typed(out: Path) -> str:
    """A folder as an argument: a bare name may be a solver's."""
    return shlex.quote(str(out) if len(out.parts) > 1 else f"./{out}")


def _result(solver: LearnedSolver, seeds: int) -> str:
    """What came out, in one line."""
    found = solver.validation
    searched = solver.training["grid"] == "search"
    before = "untrained, on the best named grid" if searched else "untrained"
    return (
        f"{solver.program().name}, {solver.nfe} evaluations, error {found['error']:.4f} to "
        f"fine solves of {seeds} validation seeds ({before}: {found['error_untrained']:.4f})"
    )


def _report(bar: Progress) -> Callable[[Batch], None]:
    """Show each batch with its loss and the learned numbers; a line per validation."""

    def report(batch: Batch) -> None:
        learned = "  ".join(f"{name} {value:.3f}" for name, value in batch.learned.items())
        loss = f"loss {batch.loss:.3g}  {learned}"
        done, total = batch.step, batch.total_steps
        bar("training", done, total, loss)
        if batch.validation:
            found = "  ".join(f"{name} {value:.4f}" for name, value in batch.validation.items())
            bar.say(f"batch {done}/{total}  {batch.seconds_left:.0f} s left  {found}  {loss}")

    return report
