"""The engine: batches of unlike requests, that end and are cancelled at any evaluation."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

import fewstep
from fewstep.sampling.settings import Settings
from fewstep.serve.engine import Engine, Full, Stopping
from fewstep.serve.order import mixed, order
from fewstep.serve.together import Share, together
from tests.support.serving import asked_of, collect, make, submit

MODEL: Any = fewstep.load("fashion-mnist")
SETTINGS = [
    Settings("auto", 1),
    Settings("auto", 3),
    Settings("auto", 5),
    Settings("dpmpp-2m", 4),
    Settings("heun", 4),
    Settings("ddim-eta", 3),
    Settings("dpmpp-2m-sde", 4),
    Settings("unipc", 5, afs="mean"),
    Settings("ipndm-3", 3, afs="zero"),
]


@pytest.fixture
def engine():
    made = Engine(rows=8, workers=1, threads=1)
    yield made
    made.stop()


def one_of(seed: int):
    """A request of one picture, as random as it gets, and what it looks like alone."""
    draw = random.Random(seed)
    settings = draw.choice(SETTINGS)
    label = draw.choice([None, "bag", 3, "boot"])
    guidance = draw.choice([None, 1.0, 2.5, 4.0]) if label is not None else None
    return settings, {"label": label, "guidance": guidance}


def alone(settings: Settings, seed: int, given) -> np.ndarray:
    how = {name: getattr(settings, name) for name in ("solver", "nfe", "afs")}
    return fewstep.sample(MODEL, seeds=[seed], **how, **given).images[0]


def check_mixes(engine: Engine, mixes: range) -> None:
    """Each picture, in a mix that comes and goes, equals itself alone within one grey level."""
    for mix in mixes:
        draw = random.Random(mix)
        wanted, jobs = [], []
        for i in range(draw.randint(2, 5)):
            seed = draw.randrange(10_000)
            settings, given = one_of(draw.randrange(10_000))
            count = draw.randint(1, 3)
            seeds = [seed + k for k in range(count)]
            chosen = draw.randrange(count)
            wanted.append((settings, seeds[chosen], given, chosen))
            jobs.append(submit(engine, asked_of(MODEL, settings, seeds, **given))[1])
            if i % 2:
                time.sleep(draw.random() * 0.03)
        for events, (settings, seed, given, chosen) in zip(jobs, wanted, strict=True):
            found = {e.index: e.pixels for e in collect(events) if e.kind == "picture"}
            apart = np.abs(found[chosen].astype(int) - alone(settings, seed, given)).max()
            assert apart <= 1, (mix, settings, seed, given)


def test_a_picture_does_not_depend_on_its_batch(engine):
    check_mixes(engine, range(2))


@pytest.mark.slow
def test_a_picture_does_not_depend_on_its_batch_in_200_mixes(engine):
    check_mixes(engine, range(2, 202))


def test_unlike_conditions_have_each_its_own_d_and_features():
    made: list[Any] = [
        MODEL.denoiser("bag"),
        MODEL.denoiser(["boot", "coat"], guidance=[3.0, 5.0]),
        MODEL.denoiser(),
        MODEL.denoiser(4, guidance=2.0),
    ]
    counts = [2, 1, 1, 2]
    starts = [0, 1, 0, 0]
    shares = [Share(*one) for one in zip(made, starts, counts, strict=True)]
    made[1] = MODEL.denoiser("coat", guidance=5.0)  # the part of it that takes part
    x = torch.randn(6, *MODEL.shape, generator=torch.Generator().manual_seed(0)) * 5
    sigma = torch.tensor([5.0, 1.0, 0.3, 20.0, 2.0, 7.0])
    with torch.no_grad():
        denoised, features = together(shares).with_features(x, sigma)
        place = 0
        for denoiser, count in zip(made, counts, strict=True):
            one = slice(place, place + count)
            own, its = denoiser.with_features(x[one], sigma[one])
            torch.testing.assert_close(denoised[one], own, rtol=0, atol=1e-5)  # float32
            torch.testing.assert_close(features[one], its, rtol=1e-4, atol=1e-5)
            place += count


def test_requests_come_and_go_at_every_evaluation(engine):
    long = asked_of(MODEL, Settings("ddim", 12), [1])
    _, slow = submit(engine, long)
    made = [make(engine, asked_of(MODEL, Settings("ddim", 1), [k])) for k in range(2)]
    assert len(made) == 2
    assert slow.empty()  # the short ones did not wait for the long one
    assert collect(slow)[-1].kind == "ended"
    assert engine.stats.batches < 12 + 2 + 2


def test_a_job_that_is_cancelled_stops_within_one_evaluation(engine):
    job, events = submit(engine, asked_of(MODEL, Settings("ddim", 40), [1, 2]), range(1, 40))
    events.get(timeout=20)
    engine.cancel(job)
    spent = job.spent
    deadline = time.monotonic() + 10
    while engine.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.busy
    assert job.late <= 2  # one evaluation of two pictures was on its way
    assert job.spent <= spent + 2
    assert engine.stats.cancelled == 1
    assert make(engine, asked_of(MODEL, Settings("ddim", 1), [3]))


def test_a_job_that_waits_is_cancelled_before_it_begins(engine):
    submit(engine, asked_of(MODEL, Settings("ddim", 8), range(8)))
    job, events = submit(engine, asked_of(MODEL, Settings("ddim", 2), [1]))
    assert engine.place(job)[1] > 0
    engine.cancel(job)
    assert job.spent == 0
    assert events.empty()


def test_the_queue_is_bounded_and_says_when_there_may_be_room():
    engine = Engine(rows=2, threads=1, most_waiting=4)
    try:
        pair = asked_of(MODEL, Settings("ddim", 6), [1, 2])
        first = [submit(engine, pair)]
        while engine.waiting():
            time.sleep(0.001)  # until the worker has it
        jobs = [*first, *(submit(engine, pair) for _ in range(2))]
        with pytest.raises(Full) as refused:
            submit(engine, pair)
        assert refused.value.seconds > 0
        assert engine.stats.refused == 1
        places = [engine.place(job)[0] for job, _ in jobs]
        assert places == sorted(places)
        for _, events in jobs:
            assert collect(events)[-1].kind == "ended"
    finally:
        engine.stop()


def test_more_pictures_than_the_batch_has_rows_are_made_in_parts(engine):
    asked = asked_of(MODEL, Settings("ddim", 2), range(11), label="bag", guidance=2.0)
    pictures = make(engine, asked)
    wanted = alone(Settings("ddim", 2), 10, {"label": "bag", "guidance": 2.0})
    assert np.abs(pictures[10].astype(int) - wanted).max() <= 1


def test_workers_share_the_pictures_of_one_request():
    engine = Engine(rows=8, workers=2, threads=1)
    try:
        asked = asked_of(MODEL, Settings("ddim", 3), range(4), label="bag")
        pictures = make(engine, asked)
        wanted = fewstep.sample(MODEL, seeds=range(4), solver="ddim", nfe=3, label="bag").images
        assert np.abs(np.stack(pictures).astype(int) - wanted).max() <= 1
    finally:
        engine.stop()


def test_a_preview_is_d_after_that_evaluation(engine):
    asked = asked_of(MODEL, Settings("ddim", 3), [5], label="bag")
    found = collect(submit(engine, asked, [1, 2])[1])
    assert [(e.kind, e.nfe) for e in found] == [
        ("preview", 1),
        ("preview", 2),
        ("picture", 3),
        ("ended", 0),
    ]
    states = fewstep.iterate(
        MODEL.denoiser("bag"), MODEL.prior([5]), "ddim", 3, grid=MODEL.card.grid
    )
    with torch.no_grad():
        first: Any = next(states).denoised
    np.testing.assert_allclose(found[0].pixels, first[0].numpy(), atol=1e-5)


def test_a_network_that_fails_fails_its_job_alone(engine, monkeypatch):
    asked = asked_of(MODEL, Settings("ddim", 2), [1])

    def broken(*_):
        raise RuntimeError("out of memory")

    bad = asked_of(MODEL, Settings("ddim", 2), [1])
    object.__setattr__(bad, "denoiser", broken)
    found = collect(submit(engine, bad)[1])
    assert found[-1].kind == "failed"
    assert "out of memory" in str(found[-1].error)
    assert make(engine, asked)


def test_a_request_that_fails_in_a_batch_leaves_the_others_alone(engine, monkeypatch):
    good = asked_of(MODEL, Settings("ddim", 6), [1])
    bad = asked_of(MODEL, Settings("ddim", 3), [2])
    begin = type(bad).begin

    def poisoned(self, start, count):
        x = begin(self, start, count)
        return x[:, :, :-1] if self is bad else x  # of another shape than the batch's

    monkeypatch.setattr(type(bad), "begin", poisoned)
    jobs = [submit(engine, one)[1] for one in (good, bad, good)]
    kinds = [collect(events)[-1].kind for events in jobs]
    assert kinds == ["ended", "failed", "ended"]
    assert engine.stats.failed == 1
    assert not engine.busy


def test_a_job_that_is_cancelled_between_two_evaluations_is_forgotten(engine):
    job, events = submit(engine, asked_of(MODEL, Settings("ddim", 40), [1]), range(1, 40))
    events.get(timeout=20)
    engine.cancel(job)
    assert engine.running == 0
    assert not engine.busy
    assert engine.place(submit(engine, asked_of(MODEL, Settings("ddim", 1), [2]))[0])[0] == 0


def test_a_stop_finishes_what_runs_and_refuses_the_rest():
    engine = Engine(rows=4, threads=1)
    _, events = submit(engine, asked_of(MODEL, Settings("ddim", 6), [1, 2]))
    done: list[bool] = []
    thread = threading.Thread(target=lambda: done.append(engine.stop(30)))
    thread.start()
    time.sleep(0.02)
    with pytest.raises(Stopping):
        submit(engine, asked_of(MODEL, Settings("ddim", 1), [1]))
    thread.join()
    assert done == [True]
    assert collect(events)[-1].kind == "ended"


def test_a_stop_has_a_limit():
    engine = Engine(rows=1, threads=1)
    _, events = submit(engine, asked_of(MODEL, Settings("ddim", 50), range(10)))
    begun = time.monotonic()
    assert not engine.stop(0.1)
    assert time.monotonic() - begun < 5
    assert isinstance(collect(events)[-1].error, Stopping)


def test_noise_nearby_is_standard_normal_and_nearer_the_less_the_strength():
    base = ((7, 1.0),)
    for strength in (0.1, 0.5, 1.0):
        mix = mixed(base, 8, strength)
        assert abs(sum(weight**2 for _, weight in mix) - 1) < 1e-12
    twice = mixed(mixed(base, 8, 0.3), 9, 0.3)
    assert abs(sum(weight**2 for _, weight in twice) - 1) < 1e-12
    plain = asked_of(MODEL, Settings("ddim", 2), [8]).run.request
    begun = {
        strength: order("m", MODEL, plain, Settings("ddim", 2), [mixed(base, 8, strength)]).begin(
            0, 1
        )
        for strength in (0.1, 0.5, 1.0)
    }
    own = MODEL.prior([7])
    apart = [(one - own).norm().item() for one in begun.values()]
    assert apart == sorted(apart)
    torch.testing.assert_close(begun[1.0], MODEL.prior([8]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("strength", [0.0, 1.5, -1.0])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(ValueError, match="strength must lie in"):
        mixed(((1, 1.0),), 2, strength)


def test_painting_keeps_what_the_mask_keeps_and_changes_the_rest(engine):
    image = fewstep.sample(MODEL, seeds=[3], label="bag", nfe=3).images
    mask = np.zeros((32, 32), bool)
    mask[:, 16:] = True
    request = asked_of(
        MODEL, Settings("ddim", 4), [1, 2], label="boot", image=image, strength=1.0
    ).run.request
    made = make(engine, order("m", MODEL, request, Settings("ddim", 4), mask=mask))
    for picture in made:
        assert (picture[:, :16] == image[0][:, :16]).all()
        assert (picture[:, 16:] != image[0][:, 16:]).any()
    assert (made[0] != made[1]).any()
