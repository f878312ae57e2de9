"""`fewstep serve --ray`: two replicas on this machine, one of which is killed under load."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

import fewstep
from fewstep.serve.errors import ApiError
from fewstep.serve.settings import Replicas
from tests.support.command import command

PATH = "/v1/images/generations"
BODY = {"prompt": "bag", "n": 2, "nfe": 4, "seed": 3}


@pytest.mark.parametrize(
    "words, said",
    [
        (("--replicas", "2"), "add --ray"),
        (("--ray", "--replicas", "0"), "whole number from 1"),
        (("--ray", "--replicas", "3", "--most-replicas", "2"), "most_replicas must be at least"),
        (("--ray", "--gpus-per-replica", "-1"), r"gpus_per_replica must lie in"),
    ],
)
def test_replicas_that_cannot_be_are_refused_in_one_line(words, said):
    ran = command("serve", *words)
    assert ran.exit_code == 2
    assert said in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


def test_the_most_replicas_are_the_least_unless_given():
    assert (Replicas(2).most, Replicas(2, 5).most) == (2, 5)


# -- the front, with streams in place of replicas -------------------------------------------------

START = {"type": "http.response.start", "status": 200, "headers": []}
EVENTS = {**START, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}
PART = {"type": "http.response.body", "body": b"one", "more_body": True}
LAST = {"type": "http.response.body", "body": b"two", "more_body": False}
BEAT = {"type": "beat"}


class Replica:
    """Streams that go as they are told: messages, and an error in the end."""

    def __init__(self, *streams: list[Any]) -> None:
        self.streams, self.asked = list(streams), 0

    def remote(self, scope: Any, body: bytes) -> Any:
        self.asked += 1
        return Stream(self.streams.pop(0))


class Stream:
    def __init__(self, messages: list[Any]) -> None:
        self._messages = messages

    def __aiter__(self) -> Any:
        return self

    async def __anext__(self) -> Any:
        if not self._messages:
            raise StopAsyncIteration
        message = self._messages.pop(0)
        if isinstance(message, Exception):
            raise message
        return message

    def cancel(self) -> None: ...


def passed(*streams: list[Any]) -> tuple[list[Any], Replica]:
    """(what a client gets of these streams, the replica)."""
    pytest.importorskip("ray")
    from fewstep.serve.rays import Front

    sent: list[Any] = []
    replica = Replica(*streams)
    messages = iter([{"type": "http.request", "body": b"{}"}])

    async def receive() -> Any:
        for message in messages:
            return message
        return await asyncio.Future()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": PATH, "headers": [], "state": {"owner": "a", "facts": {}}}
    asyncio.run(Front(replica, None)(scope, receive, send))
    return sent, replica


def test_a_request_whose_replica_is_lost_before_it_answers_goes_to_another():
    lost = [BEAT, START, RuntimeError("the actor died")]
    sent, replica = passed(lost, [BEAT, START, PART, LAST])
    assert sent == [START, PART, LAST]
    assert replica.asked == 2


def test_a_stream_whose_replica_is_lost_ends_with_an_error_event():
    sent, replica = passed([BEAT, EVENTS, PART, BEAT, RuntimeError("the actor died")])
    assert sent[:2] == [EVENTS, PART]
    assert b'data: {"error": {"message": "the replica' in sent[2]["body"]
    assert not sent[2]["more_body"]
    assert replica.asked == 1


def test_an_answer_whose_replica_is_lost_breaks_off():
    with pytest.raises(ConnectionError, match="was lost"):
        passed([BEAT, START, PART, RuntimeError("the actor died")])


def test_a_request_that_no_replica_answers_is_refused_cleanly():
    with pytest.raises(ApiError) as error:
        passed(*[[BEAT, RuntimeError("the actor died")] for _ in range(3)])
    assert (error.value.status, error.value.code) == (503, "replica_lost")
    assert error.value.retry_after


# -- a cluster ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served():
    pytest.importorskip("ray.serve")
    words = [sys.executable, "-m", "fewstep", "serve", "fashion-mnist", "--ray", "--replicas"]
    words += ["2", "--port", "0", "--quiet", "--grace", "5"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    found = next(filter(None, (re.search(r"http://127\S+", line) for line in lines)))
    with httpx.Client(base_url=found[0], timeout=60) as http:
        yield http
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=90)
    assert process.returncode == 0


def replicas(http: httpx.Client) -> dict[str, int]:
    return http.get("/v1/status").json()["replicas"]


def wait_for(http: httpx.Client, count: int, gone: int | None = None) -> None:
    deadline = time.monotonic() + 120
    while len(found := replicas(http)) != count or gone in found.values():
        assert time.monotonic() < deadline, found
        time.sleep(0.5)


@pytest.mark.slow
def test_replicas_give_the_pictures_of_the_library_and_know_each_others(served):
    wait_for(served, 2)
    made = served.post(PATH, json=BODY).json()["data"]
    wanted = fewstep.sample(fewstep.load("fashion-mnist"), seeds=[3, 4], label="bag", nfe=4).images
    for one, other in zip(made, wanted, strict=True):
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))))
        assert np.abs(picture.astype(int) - other[..., 0]).max() <= 1
    for _ in range(6):  # whichever replica gets it
        found = served.post(f"/v1/images/{made[0]['id']}/refine", json={"nfe": 4}).json()
        assert found["data"][0]["pixel_error"]["max"] <= 1
    with openai.OpenAI(base_url=f"{served.base_url}/v1", api_key="none", max_retries=0) as client:
        stream = client.images.generate(prompt="bag", stream=True, partial_images=2)
        kinds = [event.type.split(".")[1] for event in stream]
        assert kinds == ["partial_image", "partial_image", "completed"]
        with pytest.raises(openai.BadRequestError):
            client.images.generate(prompt="a red dragon")
    assert 'fewstep_evaluations_total{replica="' in served.get("/metrics").text
    assert served.get("/readyz").status_code == 200
    assert served.get("/").status_code == 200


@pytest.mark.slow
def test_a_replica_that_is_killed_under_load_leaves_no_request_without_an_answer(served):
    wait_for(served, 2)
    victim = next(iter(replicas(served).values()))
    found: Counter[str] = Counter()
    longest = 0.0

    async def ask(http: httpx.AsyncClient, streams: bool) -> None:
        nonlocal longest
        begun = time.monotonic()
        more = {"stream": True, "progress": True, "nfe": 12} if streams else {}
        try:
            answer = await http.post(PATH, json={**BODY, **more})
        except httpx.TransportError as error:
            found[type(error).__name__] += 1
            return
        longest = max(longest, time.monotonic() - begun)
        if answer.status_code in (429, 503):
            assert int(answer.headers["retry-after"]) >= 1
            found["refused"] += 1
        elif streams:
            last = answer.text.strip().split("\n\n")[-1]
            found["told" if '"replica_lost"' in last else "made"] += 1
            assert '"replica_lost"' in last or "completed" in last
        else:
            assert answer.status_code == 200, answer.text
            found["made"] += 1

    async def load() -> None:
        async with httpx.AsyncClient(base_url=served.base_url, timeout=60) as http:
            end = time.monotonic() + 8

            async def client(number: int) -> None:
                while time.monotonic() < end:
                    await ask(http, number % 2 == 0)

            tasks = [asyncio.create_task(client(i)) for i in range(6)]
            await asyncio.sleep(2)
            os.kill(victim, signal.SIGKILL)
            await asyncio.gather(*tasks)

    asyncio.run(load())
    assert found["made"] > 10
    assert set(found) <= {"made", "refused", "told"}
    assert longest < 10
    wait_for(served, 2, victim)
    assert served.post(PATH, json=BODY).status_code == 200
