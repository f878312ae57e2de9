"""A published protocol from captions to the table: small stand-ins of it, with real shards."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fewstep.data.images import write_png
from fewstep.evaluate import measure
from fewstep.evaluate.protocols import PROTOCOLS, Protocol
from tests.support.command import command, some_pictures

SMALL = Protocol(
    name="small-6",
    data="a test",
    pictures=6,
    size=(32, 32),
    seeds="0-5",
    conditions="none",
    features="fashion-a",
    resize="none",
    reference="any",
    reference_pictures=20,
    metrics=("fd",),
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "bootstrap_frechet", lambda *_, **__: 1.0)  # it takes seconds
    monkeypatch.setitem(PROTOCOLS, "small-6", SMALL)
    texts = replace(SMALL, name="texts-4", pictures=4, captions=True, metrics=("fd", "clip"))
    monkeypatch.setitem(PROTOCOLS, "texts-4", texts)


@pytest.mark.usefixtures("small")
def test_solvers_at_budgets_become_a_table_and_a_second_run_makes_nothing(tmp_path: Path) -> None:
    reference = some_pictures(tmp_path / "reference")
    asked = (
        *("compare", "--protocol", "small-6", "--reference", reference, "--batch", 4),
        *("--solvers", "ddim,heun", "--nfe", "1,2", "--out", tmp_path / "out", "--json"),
    )
    ran = command(*asked)
    assert ran.exit_code == 0, ran.output
    record = json.loads(ran.stdout)
    done = {(row["sampler"], row["nfe"]) for row in record["rows"]}
    assert done == {("ddim", 1), ("ddim", 2), ("heun", 2)}
    assert list(record["left_out"]) == ["heun@1"]
    [metric] = record["rows"][0]["metrics"]
    assert record["rows"][0]["metrics"][metric]["count"] == 6
    assert (tmp_path / "out" / "protocol.md").read_text().count("\n") == 5
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.npz")}
    again = json.loads(command(*asked).stdout)
    assert [row["metrics"] for row in again["rows"]] == [row["metrics"] for row in record["rows"]]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.npz")} == before
    alone = command(
        *("sample", "--seeds", "0-5", "--nfe", "2", "--solver", "ddim", "--batch", 4),
        *("--out", tmp_path / "alone"),
    )
    assert alone.exit_code == 0
    how = ("--features", "fashion-a", "--reference", reference, "--resamples", 0, "--json")
    value = json.loads(command("evaluate", tmp_path / "alone", *how).stdout)["metrics"][0]["value"]
    row = next(one for one in record["rows"] if (one["sampler"], one["nfe"]) == ("ddim", 2))
    assert row["metrics"][metric]["value"] == pytest.approx(value, rel=1e-5)  # float32 features


@pytest.mark.usefixtures("small")
def test_what_a_protocol_cannot_do_is_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for more, words in {
        ("--protocol", "nope"): "there is no protocol",
        ("--protocol", "small-6", "--captions", "x.csv"): "takes no --captions",
        ("--protocol", "texts-4"): "needs --captions FILE",
        ("--protocol", "small-6", "--clip", "x"): "leave out --clip",
        ("--protocol", "small-6", "--beside", "x"): "leave out --beside",
        ("--protocol", "small-6", "--solvers", "dimm"): "dimm",
        ("--protocol", "cifar10-50k", "--features", "fashion-a"): "features",
        ("--protocol", "small-6", "--reference", "nowhere"): "not there",
        ("--clip", "x"): "go with --protocol",
    }.items():
        ran = command("compare", *more)
        assert (ran.exit_code, ran.stdout) == (2, ""), more
        assert ran.stderr.count("\n") == 1
        assert words in ran.stderr, ran.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_captions_give_pictures_and_a_clip_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.evaluate.test_features import Means, script, tiny_clip
    from tests.support.pipelines import PIXELS, saved

    network = script(Means(), tmp_path / "means.pt")
    trust = hashlib.sha256(network.read_bytes()).hexdigest()
    seen = f"{network}:pil-box-4"
    sized = replace(PROTOCOLS["texts-4"], size=(PIXELS, PIXELS), features=seen)
    monkeypatch.setitem(PROTOCOLS, "texts-4", sized)
    words = "a coat|a bag|shirts|a boot"
    rows = "".join(f"{i + 7},{text},{i}\n" for i, text in enumerate(words.split("|")))
    (tmp_path / "captions.csv").write_text("image_id,caption,evaluation_seed\n" + rows)
    rng = np.random.default_rng(0)
    (tmp_path / "reference").mkdir()
    for i in range(20):
        picture = rng.integers(0, 256, (PIXELS, PIXELS, 3), dtype=np.uint8)
        write_png(tmp_path / "reference" / f"{i}.png", picture)
    ran = command(
        *("compare", saved("sd", tmp_path / "sd"), "--protocol", "texts-4", "--json"),
        *("--captions", tmp_path / "captions.csv", "--reference", tmp_path / "reference"),
        *("--clip", tiny_clip(tmp_path / "clip"), "--solvers", "dpmpp-2m", "--nfe", "2"),
        *("--out", tmp_path / "out", "--keep", "png", "--batch", 2, "--trust", trust),
    )
    assert ran.exit_code == 0, ran.output
    [row] = json.loads(ran.stdout)["rows"]
    assert len(row["metrics"]) == 2
    names = {p.name for p in Path(row["place"]).glob("*.png")}
    assert names == {"7.png", "8.png", "9.png", "10.png"}
