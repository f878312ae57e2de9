"""fewstep models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewstep.models import builtin, read_card
from fewstep.models.adm_spec import Spec
from fewstep.networks.adm_config import ADMConfig
from tests.models.test_adm import GUIDED, SAID, UNET_SAID, checkpoint
from tests.support.adm_files import tensors
from tests.support.command import command, in_process
from tests.support.edm_files import write_edm, write_edm2


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
    said = {"num_head_channels": 16, "noise_schedule": "linear", "use_new_attention_order": False}
    shape = {"num_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "attention": [1]}
    torch.save(tensors({**shape, "outputs": 6}), tmp_path / "x.pt")
    (tmp_path / "said.json").write_text(json.dumps(said))
    in_process("models", tmp_path / "x.pt", "--config", tmp_path / "said.json")
    assert "guided diffusion, eps prediction" in capsys.readouterr().out


def test_a_network_file_is_described_without_torch(tmp_path: Path) -> None:
    write_edm(tmp_path / "edm.pkl")
    write_edm2(tmp_path / "edm2.pkl")
    torch.save(tensors(GUIDED), tmp_path / "adm.pt")
    checkpoint(tmp_path / "ldm.ckpt")
    for name, said in (("adm", SAID), ("ldm", UNET_SAID)):
        (tmp_path / f"{name}.json").write_text(json.dumps(said))
    code = (
        "import sys; from fewstep.cli.run import run; "
        "codes = [run(['models', f]) for f in ('edm.pkl', 'edm2.pkl', 'adm.pt')]; "
        "codes += [run(['models', f, '--config', c]) for f, c in "
        "(('adm.pt', 'adm.json'), ('ldm.ckpt', 'ldm.json'))]; "
        "sys.exit(f'{codes}' if any(codes) or 'torch' in sys.modules else 0)"
    )
    words = [sys.executable, "-c", code]
    ran = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert "latent diffusion, eps prediction" in ran.stdout


@pytest.mark.parametrize("schedule", [("linear", 50, 1e-4, 0.02), ("cosine", 9)])
def test_the_ends_of_a_table_are_those_of_its_schedule(schedule) -> None:
    from fewstep.models.adm import schedule_of

    spec = Spec("x", ADMConfig(8, 32, (32,), 1, head_width=16), "eps", schedule)
    own = schedule_of(spec)
    assert own is not None
    assert spec.range == pytest.approx((own.sigma_min, own.sigma_max), rel=1e-12)
