"""fewstep train solver."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
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
from fewstep.learned.options import MethodOptions, Options
from fewstep.text import clean

if TYPE_CHECKING:
    from fewstep.denoiser import Denoiser
    from fewstep.learned import LearnedSolver
    from fewstep.learned import Progress as Batch
    from fewstep.models import Model
    from fewstep.report.terminal import Progress

SOLVER_FIELDS = ("method", "base", "nfe", "grid", "sigma_min", "afs", "end")
LABEL = "Class name or index. Several, with commas, take turns among the seeds; all: draw one."


@command(
    train_app,
    "solver",
    Take(Options, SOLVER, only=SOLVER_FIELDS),
    Take(Options, LEARNING, without=SOLVER_FIELDS),
    Take(MethodOptions, LEARNING),
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
    **given: Any,
) -> None:
    """Train a solver for one model and one budget; no data are needed.

    Resumes, exactly, from the checkpoint in the output folder. Ends with a folder that every
    command takes as --solver.
    """
    from fewstep.cache import cache_folder
    from fewstep.data.captions import read_captions
    from fewstep.learned import prompted, train
    from fewstep.models import load
    from fewstep.report.terminal import Progress

    label, prompt, guidance = (given.pop(name) for name in ("label", "prompt", "guidance"))
    if prompts is not None:
        refuse_beside("the prompts are in the file", {"--prompt": prompt})
    if prompt is None and prompts is None:
        refuse_beside("a negative prompt needs --prompts or --prompt", {"--negative": negative})
    else:
        refuse_beside("models that take text have no classes", {"--label": label})
    captions = None if prompts is None else read_captions(prompts)
    loaded = load(model, **{name: given.pop(name) for name in ("device", "dtype", "compile")})
    network = None
    if loss != "pixels":
        from fewstep.networks.features import Clamped, load_feature_network

        network = Clamped(load_feature_network(loss, str(loaded.prior([0]).device)))
    about = {
        "name": loaded.card.name,
        "weights": loaded.card.weights_sha256,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "label": label,
        "prompt": prompt,
        "guidance": guidance,
    }
    if captions is not None:
        about["prompts"] = captions.digest
    texts = captions.texts if captions else () if prompt is None else (prompt,)
    if texts:
        conditions = prompted(loaded, texts, negative=negative, guidance=guidance)
    else:
        conditions = _labelled(loaded, label, guidance)
    if negative is not None:
        about["negative"] = negative
    given["afs"] = _first_step(loaded, conditions, given)
    validation = given.pop("validation_seeds")
    own = {name: given.pop(name) for name in MethodOptions.__dataclass_fields__}
    with resumable(out), Progress() as bar:
        solver = train(
            conditions([0]),
            loaded.shape,
            conditions=conditions,
            prior=loaded.prior,
            device=loaded.prior([0]).device,
            model=about,
            loss_features=network,
            cache=cache_folder() if about["weights"] else None,
            validation=validation,
            out=out,
            report=_report(bar),
            note=bar.say,
            **given,
            **{name: value for name, value in own.items() if value is not None},
        )
    try_it = f"fewstep sample {shlex.quote(model)} --solver {_typed(out)}"
    try_it += f" --prompt {shlex.quote(texts[0])}" if texts else ""
    try_it += f" --guidance {guidance:g}" if texts and guidance is not None else ""
    print(clean(f"{out}: {_result(solver, validation)}; try: {try_it}"))


def _first_step(model: Model, conditions: Callable[..., Any], given: dict[str, Any]) -> str | None:
    """The analytic first step: of tuned and grid, mean where it is known and holds."""
    from fewstep.loop import starts_at

    if given["method"] not in ("tuned", "grid") or given["afs"] is not None:
        return given["afs"]
    grid = given["grid"]
    top = not isinstance(grid, list) or starts_at(grid[0], model.card.sigma_max)
    known = getattr(conditions([0]), "far_mean", None) is not None
    return "mean" if known and top else "none"


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


def _labelled(
    model: Model, label: str | None, guidance: float | None
) -> Callable[[Sequence[int]], Denoiser]:
    """From seeds to the denoiser bound to their labels."""
    from fewstep.noise import key

    if label is None:
        denoiser = model.denoiser(None, None, guidance)
        return lambda seeds: denoiser
    names = [one.strip() for one in label.split(",")]
    if label == "all":
        count = len(model.card.classes)

        def chosen(seed: int) -> Any:
            return key(seed, "label") % count
    else:

        def chosen(seed: int) -> Any:
            return names[seed % len(names)]

    return lambda seeds: model.denoiser([chosen(seed) for seed in seeds], None, guidance)


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
