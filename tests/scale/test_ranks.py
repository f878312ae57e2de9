"""Ranks share items by a store, and end together whatever happens to the one that leads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from fewstep.scale.torchrun import Ranks
from fewstep.scale.work import Place


class Squares:
    """Work of which some items cannot be done."""

    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad

    def open(self, place: Place) -> Callable[[int], int]:
        return self.do

    def do(self, item: int) -> int:
        if item == self.bad:
            raise ValueError(f"no square of {item}")
        return item * item


def together(lead: Callable[[Ranks], Any], work: Squares) -> Any:
    """What rank 0 returns, while rank 1 serves; both have ended."""
    store = HashStore()

    def serve() -> None:
        with Ranks(1, 2, store) as rank:
            rank.serve(work)

    with ThreadPoolExecutor(1) as aside:
        served = aside.submit(serve)
        try:
            with Ranks(0, 2, store) as rank:
                return lead(rank)
        finally:
            served.result(timeout=20)


def test_ranks_do_each_item_in_one_call_after_the_other() -> None:
    work = Squares()

    def lead(rank: Ranks) -> list[dict[int, int]]:
        return [
            {item: outcome.value for item, outcome in rank.map(work, range(n))} for n in (9, 0, 4)
        ]

    assert together(lead, work) == [{i: i * i for i in range(n)} for n in (9, 0, 4)]


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_the_others_end_where_the_leader_fails_outside_its_calls(calls: int) -> None:
    """As for a folder of another job, or a reference that is missing in the end."""
    work = Squares()

    def lead(rank: Ranks) -> None:
        for _ in range(calls):
            list(rank.map(work, range(3)))
        raise ValueError("another job")

    with pytest.raises(ValueError, match="another job"):
        together(lead, work)


def test_the_others_end_where_an_item_fails_or_a_call_is_left_early() -> None:
    bad = Squares(bad=2)
    with pytest.raises(ValueError, match="no square of 2"):
        together(lambda rank: list(rank.map(bad, range(5))), bad)
    work = Squares()

    def lead(rank: Ranks) -> None:
        for _ in rank.map(work, range(50)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        together(lead, work)
