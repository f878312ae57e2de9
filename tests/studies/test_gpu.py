"""The benchmark of speed on a device: what it times, in which order, and its code on a CPU."""

from __future__ import annotations

import json
import signal
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import gpu, gpu_ways
from benchmarks.gpu_ways import Case, Graph, running
from tests.support.graphs import stand_in

pytest.importorskip("diffusers")
SPEED = Path(__file__).parents[2] / "docs/speed.md"
TINY = Case("tiny", nfe=2, dtype="float32")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return gpu.build("tiny", "cpu", torch.float32)


def made(pipe: Any, case: Case) -> np.ndarray:
    with running(pipe, case) as run:
        return run.make().astype(int)


def test_the_most_telling_cases_come_first_and_none_twice() -> None:
    cases = list(gpu.cases(["sd15", "sdxl"], "cuda", gpu.BATCHES))
    assert len(set(cases)) == len(cases)
    assert cases[:2] == [Case("sd15"), Case("sd15", by="diffusers")]
    compiled = [one for one in cases if gpu.WAYS.get(one.way, gpu_ways.Way()).compile]
    assert cases[-len(compiled) :] == compiled  # they take minutes
    assert {one.batch for one in cases} == {1, *gpu.BATCHES}
    assert {one.nfe for one in cases} == {4, *gpu.BUDGETS}
    assert {one.way for one in cases} == {*gpu.WAYS, "fastest", "loose"}
    assert {one.by for one in cases} == {"sample", "serve", "diffusers"}
    assert {one.decoder for one in cases} == {"whole", "slices", "tiny"}
    served = next(one for one in cases if one.by == "serve")
    assert replace(served, by="sample") in cases
    assert served.way == "loose"  # its batches are of any size
    on_cpu = list(gpu.cases(["tiny"], "cpu", (2,)))
    assert {one.way for one in on_cpu} == {*gpu.LOOSE, "fastest", "loose"}


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
        assert row["way"] in gpu.WAYS
        assert row["pictures_per_second"] == pytest.approx(row["batch"] / row["seconds"])
    capsys.readouterr()
    gpu.main(["--table", str(out)])
    assert capsys.readouterr().out.count("\n| tiny, float32 ") == len(rows)


def test_a_case_that_fails_is_one_line_and_the_next_one_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "speed.json"
    faults = iter(
        [AssertionError(), FloatingPointError("NaN\nsecond line"), torch.OutOfMemoryError]
    )

    def measure(pipe: Any, case: Case, device: str, rounds: int) -> dict[str, Any]:
        if case.by == "serve":
            time.sleep(60)
        if (fault := next(faults, None)) is not None:
            raise fault
        return {**asdict(case), "seconds": 1.0, "pictures_per_second": 1.0}

    monkeypatch.setattr(gpu, "build", lambda *_: None)
    monkeypatch.setattr(gpu, "measure", measure)
    small = ["--device", "cpu", "--networks", "tiny", "--batches", "2", "--seconds", "0.2"]
    gpu.Sweep(gpu.parse([*small, "--out", str(out)])).run()
    record = json.loads(out.read_text())
    why = [one["why"] for one in record["failed"]]
    assert why[:2] == ["AssertionError: ", "FloatingPointError: NaN"]
    assert why[2].startswith("OutOfMemoryError")
    assert why[3:] == ["Late: took longer than 0.2 s"]
    assert len(record["rows"]) == len(list(gpu.cases(["tiny"], "cpu", (2,)))) - 4
    assert "Failed: 4 cases" in gpu.table(record)


def test_a_network_that_cannot_be_made_is_a_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(gpu, "build", build)
    record = gpu.Sweep(gpu.parse(["--device", "cpu", "--networks", "tiny"])).run()
    assert record["rows"] == []
    assert {one["why"] for one in record["failed"]} == {"RuntimeError: CUDA out of memory"}


def test_a_run_without_time_names_what_it_left_out(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    given = ["--device", "cpu", "--networks", "tiny", "--minutes", "0", "--out", str(out)]
    gpu.main(given)
    record = json.loads(out.read_text())
    assert record["rows"] == []
    assert len(record["left_out"]) == len(list(gpu.cases(["tiny"], "cpu", gpu.BATCHES)))


def test_a_limit_of_time_gives_back_the_one_before() -> None:
    rung: list[int] = []
    handler, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(gpu.Late), gpu.at_most(0.05):
            time.sleep(5)
        assert not rung
        time.sleep(0.5)
        assert rung
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def test_the_goals_are_met_or_not() -> None:
    row = {**asdict(Case("sd15")), "seconds": 0.2, "pictures_per_second": 5.0}
    many = {**row, "way": "graph", "batch": 8, "seconds": 0.16, "pictures_per_second": 50.0}
    tiny = {**row, "decoder": "tiny", "seconds": 0.01, "pictures_per_second": 100.0}
    record = {"rows": [row, many, tiny], "failed": [], "left_out": []}
    alone, batches = gpu.verdicts(record)
    assert "0.200 s by eager" in alone
    assert alone.endswith("is not met.")
    assert "50.0 pictures a second by graph at 8" in batches
    assert batches.endswith("is met.")


def test_the_share_outside_the_networks(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--device", "cpu", "--networks", "tiny", "--share", "--rounds", "1"])
    assert "tiny, 1 evaluation: " in capsys.readouterr().out


def test_a_pipeline_is_left_as_it_was(pipe: Any) -> None:
    vae, scheduler = pipe.vae, pipe.scheduler
    gpu.outside(pipe, replace(TINY, nfe=1), "cpu", 1)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert not {"forward", "decode"} & set(vars(part))
    for change in ({"decoder": "tiny"}, {"decoder": "slices"}, {"way": "channels-last"}):
        with running(pipe, replace(TINY, **change)):
            pass
    with running(pipe, replace(TINY, by="diffusers")):
        assert pipe.scheduler is not scheduler
    assert (pipe.vae, pipe.scheduler, pipe.vae.use_slicing) == (vae, scheduler, False)
    assert pipe.unet.conv_in.weight.is_contiguous()


def test_the_service_makes_the_pictures_of_the_sampler(pipe: Any) -> None:
    case = replace(TINY, batch=3)
    assert abs(made(pipe, case) - made(pipe, replace(case, by="serve"))).max() <= 1


def test_a_graph_is_captured_once_for_each_shape(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, case = stand_in(monkeypatch), replace(TINY, nfe=3, batch=2)
    plain = made(pipe, case)
    with running(pipe, replace(case, way="graph")) as run:
        for _ in range(2):
            assert abs(run.make() - plain).max() <= 1
    assert len(graphs) == 1


def test_what_a_graph_returned_stays_when_it_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = stand_in(monkeypatch)

    def net(x: torch.Tensor, *, t: torch.Tensor, double: bool) -> tuple[torch.Tensor]:
        y = x * t[:, None]
        return ((y + y) if double else y.relu_(),)

    graph, x, t = Graph(net), torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])
    with torch.no_grad():
        (first,) = graph(x, t=t, double=True)
        (second,) = graph(x + 1, t=2 * t, double=True)
        assert len(graphs) == 1
        graph(x, t=t, double=False)
        graph(x.expand(2, 2), t=t.expand(2), double=True)  # rows in one memory
    assert len(graphs) == 3
    assert first.tolist() == [[6.0, 12.0]]
    assert second.tolist() == [[24.0, 36.0]]
    assert x.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("way", ["compile", "compile-overhead"])
def test_what_is_compiled_may_write_to_its_last_output(
    way: str, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[str] = []

    def compiled(net: Any, mode: str) -> Any:
        modes.append(mode)
        kept: list[torch.Tensor] = []

        def call(*args: Any, **kwargs: Any) -> Any:
            found = net(*args, **kwargs)[0]
            if not kept:
                kept.append(found)
            return (kept[0].copy_(found),)

        return call

    plain = made(pipe, replace(TINY, nfe=4))
    monkeypatch.setattr(torch, "compile", compiled)
    assert abs(made(pipe, replace(TINY, nfe=4, way=way)) - plain).max() == 0
    assert modes == [gpu.WAYS[way].compile]


def test_waits_between_the_first_evaluation_and_the_last_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a network that waits twice in each call, and a run that waits around them."""
    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def wait() -> None:
        warnings.warn(gpu_ways.WAITED, stacklevel=1)

    def network() -> None:
        wait()
        wait()
        warnings.warn("something else", stacklevel=1)

    heard = gpu_ways.Heard(network)

    def make() -> np.ndarray:
        wait()
        for _ in range(3):
            heard()
        wait()
        return np.zeros(1)

    assert gpu_ways.waits(gpu_ways.Run(make, heard)) == 6
    assert modes == ["warn", 0]


def test_only_networks_are_made_on_the_device() -> None:
    pipe = gpu.build("tiny", "meta", torch.float16)
    assert (pipe.unet.device.type, pipe.unet.dtype) == ("meta", torch.float16)
    assert pipe.scheduler.betas.device.type == "cpu"
    assert pipe.scheduler.betas.dtype == torch.float32


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
