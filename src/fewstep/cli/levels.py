"""fewstep distill levels: which levels a student visits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fewstep.cli.app import distill_app
from fewstep.cli.options import MACHINE, Machine, ModelArgument, Take, command, flag, option
from fewstep.cli.parsing import parse_budgets, words
from fewstep.text import clean


@command(
    distill_app,
    "levels",
    Take(Machine, MACHINE, only=("device", "dtype")),
)
def distill_levels_command(
    model: ModelArgument,
    /,
    *,
    nfe: Annotated[str, option("Evaluations: 2,4,8 or 2-8.")] = "2,4,8",
    samplers: Annotated[
        str | None,
        option("Samplers to choose from, with commas. Default: the card's for each budget."),
    ] = None,
    lowest: Annotated[
        str, option("Lowest levels to try, as multiples of the data's scale.")
    ] = "1,2,4,8",
    validation_seeds: Annotated[
        int, option("Pictures compared with the teacher's of other seeds.", least=250)
    ] = 500,
    features: Annotated[
        Path | None,
        option("Folder of a feature network for the distances. Default: fashion-a."),
    ] = None,
    teacher_model: Annotated[
        Path | None,
        option("The teacher's folder. Default: the built-in model that the card names."),
    ] = None,
    write: Annotated[bool, flag("Write the best of each budget into the student's card.")] = False,
    **machine: Any,
) -> None:
    """Choose the levels that a student visits for each budget, by a distance to its teacher.

    Prints the excess Frechet distance of each try. `fewstep sample STUDENT --grid 80,5,1,0` takes
    other levels without a card.
    """
    from fewstep.distillation.levels import best_of, choose_levels, write_levels
    from fewstep.models import builtin, load, teacher_of
    from fewstep.networks.features import load_feature_folder

    budgets, names = parse_budgets(nfe), words(samplers, "samplers") if samplers else ()
    try:
        multiples = tuple(float(one) for one in words(lowest, "lowest"))
    except ValueError:
        multiples = ()
    if not multiples or not all(0 < one < float("inf") for one in multiples):
        raise ValueError(f"lowest is written like 1,2,4, each above 0, got {lowest!r:.80}")
    if write and model in builtin():
        raise ValueError(
            f"{model} comes with fewstep and is not written to; leave --write out, or copy its "
            "folder"
        )
    loaded = load(model, **machine)
    # its fine solutions are those of comparisons, which are kept, whatever the student's dtype
    teacher = teacher_of(loaded.card, teacher_model, device=machine["device"])
    network = None if features is None else load_feature_folder(features)
    tries = choose_levels(
        loaded,
        teacher,
        budgets=budgets,
        samplers=names,
        multiples=multiples,
        seeds=validation_seeds,
        features=network,
        report=lambda one: print(
            f"nfe {one.nfe}  {one.sampler:18} {one.name:12} excess {one.excess:.3f}", flush=True
        ),
    )
    for budget, one in best_of(tries).items():
        grid = ",".join(f"{level:.4g}" for level in one.levels)
        print(f"{budget} evaluations: {one.sampler} on {grid} ({one.name})")
    if write:
        about = {
            "seeds": f"1000000-{1_000_000 + validation_seeds - 1}",
            "features": str(getattr(network, "name", "fashion-a")),
            "dtype": machine["dtype"],
        }
        write_levels(Path(model), loaded.card, tries, about)
        print(clean(f"{model}: its card has them; try: fewstep sample {model} --nfe {budgets[0]}"))
