"""`fewstep serve`: how it starts, what it refuses, and how it stops."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from tests.support.command import command

BODY = {"prompt": "bag", "n": 4, "nfe": 20, "solver": "ddim", "seed": 1}


@pytest.fixture
def served():
    words = [sys.executable, "-m", "fewstep", "serve", "--port", "0", "--grace", "60"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "fewstep serves" in line, process.communicate()
    yield process, line.split()[-1]
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_a_stop_finishes_what_runs_and_ends_well(served):
    process, address = served
    answers: list[httpx.Response] = []
    asked = threading.Thread(
        target=lambda: answers.append(
            httpx.post(f"{address}/v1/images/generations", json=BODY, timeout=120)
        )
    )
    asked.start()
    while not httpx.get(f"{address}/v1/status").json()["running"]:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    asked.join()
    assert answers[0].status_code == 200
    assert len(answers[0].json()["data"]) == 4
    assert process.wait(30) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/healthz")


@pytest.mark.parametrize(
    "words, said",
    [
        (("--host", "0.0.0.0"), "give keys too"),
        (("no-such-model",), "there is no model called"),
        (("--port", "70000"), "at most 65535"),
        (("--keys", "missing.toml"), "No such file"),
        (("--most-images", "0"), "whole number from 1"),
        (("fashion-mnist", "fashion-mnist"), "two models are called"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(words, said):
    ran = command("serve", *words)
    assert ran.exit_code == 2
    assert said in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


def test_a_port_that_is_taken_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ran = command("serve", "--port", str(taken.getsockname()[1]), "--quiet")
    assert ran.exit_code == 2
    assert "already in use" in ran.stderr
    assert "Traceback" not in ran.stderr
