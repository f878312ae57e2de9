"""Put trained solvers into a model's folder, for `--solver auto` and by their name.

Below the folder of runs, every solver that was trained on this model without label or guidance is
a candidate, of the method, loss and teacher that it says. For each budget, the one with the least
validation error is taken (in features, where it was trained in them), where that is below the error
of its base on the best named grid. In the model's folder they are NAME/3, NAME/4, ..., and the
card's `auto` names them.

    python studies/ship_solvers.py runs --loss pixels            says what it would do
    python studies/ship_solvers.py runs --loss pixels --write
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fewstep.files import write_json
from fewstep.learned.solver import SOLVER_FILE, LearnedSolver
from fewstep.models import BUILTIN
from fewstep.models.card import CARD_FILE, SOLVERS, Card

CONDITIONS = ("label", "prompt", "guidance")


def candidates(runs: Path, card: Card, method: str, loss: str | None) -> list[LearnedSolver]:
    """All below `runs` that fit. Errors: ValueError where there is none."""
    found = []
    for path in sorted(runs.rglob(SOLVER_FILE)):
        solver = LearnedSolver.load(path.parent)
        fits = solver.method.kind == method and loss in (None, solver.training.get("loss"))
        plain = all(solver.model.get(name) is None for name in CONDITIONS)
        if fits and plain and solver.model.get("weights") == card.weights_sha256:
            found.append(solver)
    if not found:
        raise ValueError(
            f"{runs} has no solver of method {method}, trained on {card.name} without conditions"
        )
    return found


def best(solvers: list[LearnedSolver]) -> dict[int, LearnedSolver]:
    """For each budget the one with the least validation error that is better than its base.

    Errors: ValueError where they were validated on different seeds.
    """
    seeds = {tuple(solver.validation["seeds"]) for solver in solvers}
    if len(seeds) > 1:
        raise ValueError(f"solvers of different validation seeds cannot be ranked: {sorted(seeds)}")

    def score(solver: LearnedSolver) -> float:
        return solver.validation.get("features", solver.validation["error"])

    chosen: dict[int, LearnedSolver] = {}
    for solver in sorted(solvers, key=score):
        if solver.validation["error"] < solver.validation["error_untrained"]:
            chosen.setdefault(solver.nfe, solver)
    return dict(sorted(chosen.items()))


def main(
    runs: Path,
    model: str = "fashion-mnist",
    method: str = "tuned",
    loss: str | None = None,
    name: str | None = None,
    write: bool = False,
) -> dict[int, LearnedSolver]:
    folder = BUILTIN / model if (BUILTIN / model).is_dir() else Path(model)
    card, name = Card.read(folder), name or method
    chosen = best(candidates(runs, card, method, loss))
    values = json.loads((folder / CARD_FILE).read_text())
    for nfe, solver in chosen.items():
        error, before = (solver.validation[key] for key in ("error", "error_untrained"))
        print(f"{nfe}: {solver.program().name}, error {error:.4f} (untrained {before:.4f})")
        if str(nfe) not in values["auto"]:
            raise ValueError(f"the card's auto has no entry for {nfe}; screen_solvers.py makes one")
        values["auto"][str(nfe)]["learned"] = name
        if write:
            solver.save(folder / SOLVERS / name / str(nfe))
    if write:
        write_json(folder / CARD_FILE, values)
        print(f"written: {folder / SOLVERS / name} and the card")
    return chosen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", type=Path, help="folder of trained solvers, at any depth")
    parser.add_argument("--model", default="fashion-mnist", help="a name or a model folder")
    parser.add_argument("--method", default="tuned")
    parser.add_argument("--loss", help="only those trained with this loss: pixels, fashion-a")
    parser.add_argument("--name", help="what they are called; the method's name if left out")
    parser.add_argument("--write", action="store_true", help="copy them and write the card")
    main(**vars(parser.parse_args()))
