"""The benchmark of speed on a device: what it times, in which order, and its code on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

pytest.importorskip("diffusers")
SPEED = Path(__file__).parents[2] / "docs/speed.md"


def test_the_most_telling_cases_come_first_and_none_twice() -> None:
    cases = list(gpu.cases(["sd15", "sdxl"], "cuda", gpu.BATCHES))
    assert len(set(cases)) == len(cases)
    assert [one.way for one in cases[:6]] == ["eager", "diffusers", *gpu.WAYS[1:]]
    assert cases[0] == gpu.Case("sd15", nfe=4, batch=1, dtype="float16")
    assert {one.batch for one in cases} == {1, *gpu.BATCHES}
    assert {one.nfe for one in cases} == {4, *gpu.BUDGETS}
    on_cpu = list(gpu.cases(["tiny"], "cpu", (2,)))
    assert {one.way for one in on_cpu} <= {"eager", "diffusers", "channels-last", "fastest"}


@pytest.mark.slow
def test_the_sweep_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.json"
    small = ["--device", "cpu", "--networks", "tiny", "--batches", "2", "--rounds", "1"]
    gpu.main([*small, "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["failed"] == record["left_out"] == []
    rows = record["rows"]
    assert len(rows) == len(list(gpu.cases(["tiny"], "cpu", (2,))))
    assert 0 < rows[0]["outside"] < 1
    assert len(rows[0]["profile"]) == 3
    for row in rows:
        assert row["pictures_per_second"] == pytest.approx(row["batch"] / row["seconds"])
    capsys.readouterr()
    gpu.main(["--table", str(out)])
    assert len(capsys.readouterr().out.splitlines()) == 4 + len(rows)


def test_a_run_without_time_names_what_it_left_out(tmp_path: Path) -> None:
    options = gpu.parse(["--device", "cpu", "--networks", "tiny", "--minutes", "0"])
    record = gpu.sweep(options)
    assert record["rows"] == []
    assert len(record["left_out"]) == len(list(gpu.cases(["tiny"], "cpu", gpu.BATCHES)))


def test_the_share_outside_the_networks(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--device", "cpu", "--networks", "tiny", "--share", "--rounds", "1"])
    assert "tiny, 1 evaluation: " in capsys.readouterr().out


def test_watching_leaves_the_networks_as_they_were() -> None:
    pipe = gpu.build("tiny", "cpu", torch.float32)
    gpu.outside(pipe, gpu.Case("tiny", nfe=1, dtype="float32"), "cpu", 1)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert not {"forward", "decode"} & set(vars(part))


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is no CUDA device")
def test_no_device_is_one_line() -> None:
    with pytest.raises(SystemExit, match="there is no CUDA device here"):
        gpu.main([])


def test_the_page_has_the_table_or_says_that_there_is_none() -> None:
    record = SPEED.parents[1] / "results/gpu.json"
    page = SPEED.read_text(encoding="utf-8")
    if record.exists():
        assert gpu.table(json.loads(record.read_text(encoding="utf-8"))) in page
    else:
        assert "**Not measured.**" in page
