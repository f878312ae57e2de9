"""Progress is a bar on a terminal, a line now and then elsewhere; no name is obeyed."""

from __future__ import annotations

import io
import sys

import pytest

from fewstep.report.terminal import Progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fewstep.report.terminal.time.monotonic", lambda: now[0])
    return now


def lines(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_without_a_terminal_there_is_a_line_every_thirty_seconds(clock, capsys):
    with Progress() as report:
        for second in range(100):
            clock[0] = float(second)
            report("reference solves", second, 200)
    shown = lines(capsys)
    assert shown[0] == "reference solves: 30 of 200, about 3 min left"
    assert len(shown) == 3
    assert shown[2].endswith("about 2 min left")


def test_what_is_short_says_nothing_and_what_is_quiet_neither(clock, capsys):
    with Progress() as report:
        report("times", 1, 2)
    with Progress(quiet=True) as report:
        clock[0] = 1000.0
        report("times", 1, 2)
        report.say("a note")
    assert lines(capsys) == []


def test_without_standard_error_work_goes_on(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with Progress() as report:
        report("times", 1, 2)
        report.say("a note")


@pytest.mark.parametrize("name", ["\x1b[31mred", "[/bold]", "two\nlines", "[red]", "\udce9"])
def test_names_are_shown_and_not_obeyed(name, clock, capsys, monkeypatch):
    clock[0] = 0.0
    with Progress() as report:
        report(name, 0, 9)
        clock[0] = 31.0
        report(name, 3, 9)
    (shown,) = lines(capsys)
    assert shown.endswith(": 3 of 9, about 62 s left")
    assert "\x1b" not in shown
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = Progress()
    bar.console.file = io.StringIO()
    bar(name, 3, 9)
    bar.console.print(bar.bar.get_renderable())
