"""`fewstep compare` by several workers: its settings times seeds are handed out in pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from fewstep.evaluate.compare.pieces import Piece, do_piece
from fewstep.evaluate.compare.run import Comparison, compare_beside
from fewstep.evaluate.compare.screening import all_candidates
from fewstep.evaluate.compare.setup import Opened, Setup
from fewstep.scale.executors import Executor
from fewstep.scale.phases import Phases
from fewstep.scale.work import Place, device_at

__all__ = ["CompareWork", "compare_by"]


@dataclass(frozen=True)
class CompareWork:
    """Does pieces of a comparison; what they leave is in its folder and in the cache, which all
    workers share."""

    setup: Setup

    def open(self, place: Place) -> Callable[[Piece], None]:
        opened = self.setup.open(device_at(self.setup.machine["device"], place))
        candidates, _ = all_candidates(opened.workbench, opened.design)
        judges = {judge.label: judge for judge in opened.judges}
        return lambda piece: do_piece(opened.workbench, candidates, judges, piece)


def compare_by(
    executor: Executor,
    setup: Setup,
    opened: Opened,
    earlier: dict[str, Any] | None = None,
    *,
    command: str = "",
    note: Callable[[str], None] = lambda text: None,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Comparison | None:
    """`compare_beside`, with all that is slow done by an executor before.

    Args:
        executor: who does it
        setup: the comparison by names, for the workers
        opened: the same, opened by this process
        earlier, command, note: as of `compare_beside`
        report: called with what is done, the pieces done and all of them

    Returns:
        The result; None in a process that does not lead.

    Raises: as `compare_beside`.
    """
    work = CompareWork(setup)
    if not executor.leads:
        executor.serve(work)
        return None
    phases = Phases(str(setup.out))

    def do(what: str, pieces: Sequence[Piece]) -> None:
        with phases.of(what, len(pieces)) as tick, closing(executor.map(work, pieces)) as made:
            report(what, 0, len(pieces))
            for number, _ in enumerate(made, 1):
                tick(number)
                report(what, number, len(pieces))

    return compare_beside(
        opened.workbench,
        opened.design,
        opened.judges,
        earlier,
        command=command,
        note=note,
        do=do if executor.workers > 1 or executor.here is None else None,
    )
