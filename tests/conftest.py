"""Settings and fixtures of all tests."""

from __future__ import annotations

import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core, so a thread for each process
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

from tests.support.testbed import FEW_RIVALS, Mixture

# Random cases are the same on every run; a slow machine is not a failure.
settings.register_profile(
    "fewstep",
    derandomize=True,
    deadline=None,
    max_examples=25,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fewstep")

# A run that a shell put into the background ignores Ctrl-C, and so would all that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def few_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training ends by measuring the training-free solvers: here two, where users have ten."""
    monkeypatch.setattr("fewstep.learned.rivals.RIVALS", FEW_RIVALS)


@pytest.fixture
def mixture() -> Mixture:
    return Mixture()
