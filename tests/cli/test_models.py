"""fewstep models."""

from __future__ import annotations

import json

import pytest

from fewstep.models import builtin, read_card
from tests.support.adm_files import tensors
from tests.support.command import command, in_process


def test_models_lists_the_built_in_network(capsys: pytest.CaptureFixture[str]) -> None:
    in_process("models")
    assert "fashion-mnist" in capsys.readouterr().out
    in_process("models", "fashion-mnist", "--json")
    assert json.loads(capsys.readouterr().out)["classes"][9] == "boot"


@pytest.mark.parametrize("columns", [60, 80])
def test_what_is_typed_and_the_numbers_are_whole_on_a_narrow_terminal(columns: int) -> None:
    lines = command("models", env={"COLUMNS": str(columns)}).stdout.splitlines()
    for name in builtin():
        row = next(line for line in lines if line.split()[:1] == [name])
        card = read_card(name)
        assert f"{card.sigma_min:g} to {card.sigma_max:g}" in row
        assert len(row.rstrip()) <= columns


def test_settings_that_a_network_file_does_not_say_are_given_beside_it(tmp_path, capsys):
    import torch

    said = {"num_head_channels": 16, "noise_schedule": "linear", "use_new_attention_order": False}
    shape = {"num_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "attention": [1]}
    torch.save(tensors({**shape, "outputs": 6}), tmp_path / "x.pt")
    (tmp_path / "said.json").write_text(json.dumps(said))
    in_process("models", tmp_path / "x.pt", "--config", tmp_path / "said.json")
    assert "guided diffusion, eps prediction" in capsys.readouterr().out
