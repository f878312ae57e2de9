"""Items are handed to whoever is free, each is done once, and what dies is done by another."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest

from fewstep.scale.executors import Counts, Processes, hand_out
from fewstep.scale.rays import connect
from fewstep.scale.settings import Scaling
from fewstep.scale.work import AGAIN, STOP, Outcome


class Simulated:
    """Workers that answer at once, or as `act` says; `act` may raise, as the death of a worker."""

    def __init__(self, count: int, act: Any = None) -> None:
        self.count, self.act = count, act or (lambda worker, item: Outcome(item))
        self.replaced: list[int] = []

    def submit(self, worker: int, item: Any) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        if item is None:
            future.set_result(Outcome())
            return future
        try:
            outcome = self.act(worker, item)
            if outcome is not None:
                future.set_result(outcome)
        except OSError as error:
            future.set_exception(error)
        return future

    def replace(self, worker: int) -> None:
        self.replaced.append(worker)


def test_each_item_is_done_once_by_any_number_of_workers():
    for count in (1, 3, 50):
        found = [item for item, _ in hand_out(Simulated(count), range(20), Counts())]
        assert sorted(found) == list(range(20))
    assert not list(hand_out(Simulated(2), [], Counts()))


def test_what_a_dead_worker_held_is_done_by_another():
    died: Counter[int] = Counter()

    def act(worker: int, item: int) -> Outcome:
        if item % 3 == 0 and died[item] < 2:
            died[item] += 1
            raise OSError("killed")
        return Outcome(item)

    pool, counts = Simulated(4, act), Counts()
    assert sorted(item for item, _ in hand_out(pool, range(30), counts)) == list(range(30))
    assert counts.lost == len(pool.replaced) == 20
    assert counts.tried == 20


def test_an_item_that_kills_every_worker_ends_the_run():
    def act(worker: int, item: int) -> Outcome:
        raise OSError("killed")

    with pytest.raises(ValueError, match="workers ended while they made the same shard"):
        list(hand_out(Simulated(2, act), range(3), Counts()))


def test_workers_that_end_before_they_are_ready_end_the_run():
    class Stillborn(Simulated):
        def submit(self, worker: int, item: Any) -> Future[Outcome]:
            future: Future[Outcome] = Future()
            future.set_exception(OSError("no memory"))
            return future

    with pytest.raises(ValueError, match=r"before they are ready .*no memory"):
        list(hand_out(Stillborn(2), range(3), Counts()))


def test_a_failure_is_tried_again_unless_it_would_fail_again():
    tries: Counter[int] = Counter()

    def act(worker: int, item: int) -> Outcome:
        tries[item] += 1
        return Outcome(item) if tries[item] == 3 else Outcome(None, "the network is down", AGAIN)

    assert len(list(hand_out(Simulated(2, act), range(5), Counts()))) == 5
    for error, kind in (("the disk is full", STOP), ("it is down", AGAIN)):
        pool = Simulated(2, lambda worker, item, e=error, k=kind: Outcome(None, e, k))
        with pytest.raises(ValueError, match=error):
            list(hand_out(pool, [1], Counts()))


def test_what_takes_long_at_the_end_is_given_to_a_second_worker():
    asked: Counter[int] = Counter()

    def act(worker: int, item: int) -> Outcome | None:
        asked[item] += 1
        return None if item == 7 and asked[item] == 1 else Outcome(item)  # the first never answers

    pool, counts = Simulated(3, act), Counts()
    found = [item for item, _ in hand_out(pool, range(9), counts)]
    assert sorted(found) == list(range(9))
    assert counts.second == 1
    assert len(pool.replaced) == 1  # who never answers does not write later


def test_who_is_busy_is_ended_where_a_run_is_left_early():
    pool = Simulated(3, lambda worker, item: None if item else Outcome(item))
    handed: Any = hand_out(pool, range(9), Counts())
    next(handed)
    handed.close()
    assert len(pool.replaced) == 2


def test_a_process_that_was_killed_while_idle_is_a_lost_worker():
    class Broken:
        def submit(self, *arguments: Any) -> Future[Outcome]:
            raise BrokenProcessPool("killed")

    pool = Processes(1, b"")
    pool.made[0] = Broken()  # type: ignore[assignment]
    assert isinstance(pool.submit(0, 1).exception(), BrokenProcessPool)


def test_a_thousand_workers_cost_the_driver_less_than_a_millisecond_an_item():
    """The time of the processor, for the machine may be busy."""
    begun = time.process_time()
    done = sum(1 for _ in hand_out(Simulated(1024), range(20_000), Counts()))
    assert done == 20_000
    assert (time.process_time() - begun) / done < 1e-3


def test_an_address_belongs_to_ray():
    for name in ("local:3", "torchrun:2", "ray:", "spark"):
        with pytest.raises(
            ValueError, match="executor must be local, torchrun, ray or ray:ADDRESS"
        ):
            Scaling(name)
    named = {"ray": "", "ray:auto": "auto", "ray:h:6379": "h:6379", "ray://h:1": "ray://h:1"}
    assert {name: Scaling(name).address for name in named} == named
    assert {Scaling(name).kind for name in named} == {"ray"}


def test_a_cluster_that_does_not_start_is_one_line():
    class Stuck:
        def init(self, **options: Any) -> None:
            raise Exception("The current node timed out\nduring startup.")

    with pytest.raises(ValueError, match=r"cannot start .*timed out during startup.*Try again"):
        connect(Stuck(), "", 2)
    with pytest.raises(ValueError, match=r"no Ray cluster answers at auto .*timed out"):
        connect(Stuck(), "auto", 2)
