"""A comparison in pieces that workers can do before it asks for them.

A piece leaves files: those in which `Workbench` and `References` keep what they made. So the
comparison itself goes as ever, and finds everything done. Pieces of one call do not depend on each
other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fewstep.evaluate.compare.bench import Judge, Workbench
from fewstep.evaluate.compare.design import Design
from fewstep.evaluate.compare.rows import CHECKED
from fewstep.evaluate.compare.screening import finalists, screened
from fewstep.evaluate.references import CHUNK
from fewstep.sampling.settings import Filled

__all__ = ["Candidates", "Do", "Piece", "do_piece", "prepare"]

Candidates = Mapping[tuple[int, str], Sequence[Filled]]
Chosen = Mapping[tuple[int, str], Iterable[int]]  # places among the candidates


@dataclass(frozen=True)
class Piece:
    """Something to do for some seeds.

    kind: "references", "finer" (by which their error is told), "run", "exact" (features of the
        reference solves) or "features" (of a run)
    key, place: of a run: budget and solver, and the setting among the candidates
    judge: label of the feature network
    """

    kind: str
    seeds: tuple[int, ...]
    key: tuple[int, str] = (0, "")
    place: int = 0
    judge: str = ""


Do = Callable[[str, Sequence[Piece]], None]


def do_piece(
    workbench: Workbench, candidates: Candidates, judges: Mapping[str, Judge], piece: Piece
) -> None:
    """Leave its files."""
    if piece.kind == "references":
        workbench.references.endpoints(piece.seeds)
    elif piece.kind == "finer":
        workbench.references.finer.endpoints(piece.seeds)
    elif piece.kind == "exact":
        workbench.features(judges[piece.judge], *workbench.exact(piece.seeds))
    else:
        settings = candidates[piece.key][piece.place]
        run = workbench.of(piece.key[1]).run(settings, piece.seeds)
        if piece.kind == "features":
            workbench.features(judges[piece.judge], run.images, run.digest)


def prepare(
    workbench: Workbench,
    design: Design,
    judges: Mapping[str, Judge],
    candidates: Candidates,
    do: Do,
) -> None:
    """Have everything done that a comparison will ask for.

    Args:
        do: does pieces, in any order, and returns when all are done; it is called with a name
    """
    few, whole = design.validation[: design.screen_first], design.validation
    open_ones = {key: range(len(some)) for key, some in candidates.items() if len(some) > 1}
    again = bool(open_ones) and len(few) < design.screen
    seeds = [design.seeds, *([few] if open_ones else []), *([whole] if again else [])]
    missing = [one for one in judges.values() if not workbench.has_population(one, design)]
    if missing:
        seeds.append(design.others)
    parts = dict.fromkeys(part for some in seeds for part in _chunks(some))
    finer = [Piece("finer", tuple(design.seeds[:CHECKED]))]
    do("reference solves", [*finer, *(Piece("references", part) for part in parts)])
    seen = [(one.label, design.others) for one in missing]
    seen += [(label, design.seeds) for label in judges]
    by = judges.get(design.choose_by)
    if by is not None and open_ones:
        seen += [(by.label, some) for some in seeds[1 : 2 + again]]
    do("features", [Piece("exact", tuple(some), judge=label) for label, some in dict.fromkeys(
        (label, tuple(some)) for label, some in seen
    )])  # fmt: skip
    choosing = [] if by is None else [by.label]
    if open_ones:
        _run(do, "screening", open_ones, few, choosing)
    if again:
        left = {
            key: finalists(workbench.of(key[1]), design, judges, candidates[key])
            for key in open_ones
        }
        _run(do, "screening again", left, whole, choosing)
    chosen = {}
    for key, some in candidates.items():
        best, _ = screened(workbench.of(key[1]), design, judges, some)
        chosen[key] = [next(i for i, one in enumerate(some) if one is best)]
    _run(do, "test seeds", chosen, design.seeds, judges)


def _run(do: Do, name: str, chosen: Chosen, seeds: Sequence[int], judges: Iterable[str]) -> None:
    """Runs of settings, chunk by chunk, then the features of each."""
    every = [(key, place) for key, places in chosen.items() for place in places]
    parts = list(_chunks(seeds))
    do(name, [Piece("run", part, *one) for one, part in itertools.product(every, parts)])
    whole = tuple(seeds)
    looks = [
        Piece("features", whole, *one, label) for one, label in itertools.product(every, judges)
    ]
    if looks:
        do(f"features of {name}", looks)


def _chunks(seeds: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(seeds), CHUNK):
        yield tuple(seeds[start : start + CHUNK])
