"""fewstep models."""

from __future__ import annotations

import json

import pytest

from tests.support.command import in_process


def test_models_lists_the_built_in_network(capsys: pytest.CaptureFixture[str]) -> None:
    in_process("models")
    assert "fashion-mnist" in capsys.readouterr().out
    in_process("models", "fashion-mnist", "--json")
    assert json.loads(capsys.readouterr().out)["classes"][9] == "boot"
