"""Ctrl-C and SIGTERM are held back between steps."""

from __future__ import annotations

import os
import signal

import pytest

from fewstep.cli.streams import Terminated, stop_on_sigterm
from fewstep.train.interrupts import Stopped, between_steps

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def usual_handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_waits_and_the_second_does_not(number, capfd):
    with between_steps() as stopping:
        assert stopping() == 0
        os.kill(os.getpid(), number)
        assert stopping() == number
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), number)
    assert stopped.value.code == 128 + number
    assert capfd.readouterr().err.count("stopping after this step") == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("number", SIGNALS)
def test_a_handler_of_the_programs_own_stays(number):
    came = []
    signal.signal(number, lambda *about: came.append(about))
    with between_steps() as stopping:
        os.kill(os.getpid(), number)
        assert stopping() == 0
    assert len(came) == 1


def test_the_handler_of_the_command_is_set_aside_and_comes_back():
    """Else SIGTERM would end `fewstep distill` in the middle of a step, with nothing saved."""
    with stop_on_sigterm():
        with between_steps() as stopping:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopping() == signal.SIGTERM
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
