"""Shards hold the pictures of the folder that one process makes; what is damaged is made again."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from fewstep.evaluate.parts import read_part
from fewstep.sampling.settings import Settings
from fewstep.scale.executors import Local
from fewstep.scale.manifest import Manifest, read_job
from fewstep.scale.run import Result
from fewstep.scale.sample import Asked, sample_shards
from fewstep.scale.shards import Looks, Source
from fewstep.scale.status import status_of
from fewstep.scale.stores import open_store
from tests.support.command import command, hashes

FEW = ("--seeds", "0-9", "--nfe", "1", "--batch", "4")
SOURCE = Source("fashion-mnist")


def make(place: Path | str, seeds: Any = range(10), **more: Any) -> Result:
    asked = Asked(str(place), seeds, Settings(nfe=1), batch=4, **{"shards": 3, **more})
    result = sample_shards(SOURCE, asked, Local())
    assert result is not None
    return result


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path, "r:") as tar:
        return {one.name: tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one process."""
    out = tmp_path_factory.mktemp("plain") / "out"
    assert command("sample", *FEW, "--out", out).exit_code == 0
    return out


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    ran = command("sample", *FEW, "--out", out, "--shards", 3)
    assert ran.exit_code == 0, ran.output
    assert "3 shards made; 10 pictures in 3 shards" in ran.stdout
    return out


def test_a_tar_has_the_files_of_the_folder_to_the_byte(plain: Path, shards: Path) -> None:
    found: dict[str, bytes] = {}
    for path in sorted((shards / "shards").iterdir()):
        found |= members(path)
    for seed in range(10):
        png = found[f"{seed:06d}.png"]
        assert png == (plain / f"{seed:06d}.png").read_bytes()
        row = json.loads(found[f"{seed:06d}.json"])
        assert (row["seed"], row["nfe"], row["model"]) == (seed, 1, "fashion-mnist")
    assert len(found) == 20
    assert sorted(one.name for one in shards.iterdir()) == ["job.json", "manifest", "shards"]


def test_png_leaves_the_files_of_the_folder(plain: Path, tmp_path: Path) -> None:
    result = make(tmp_path / "out", keep="png")
    pictures = {name: one for name, one in hashes(plain).items() if name != "sheet.png"}
    found = {p.name for p in (tmp_path / "out").glob("*.png")}
    assert found == set(pictures)
    for name in found:
        assert (tmp_path / "out" / name).read_bytes() == (plain / name).read_bytes()
    assert result.made == 3
    (tmp_path / "out" / "000005.png").write_bytes(b"no picture")
    [status] = status_of(str(tmp_path / "out"))
    assert (status.missing, status.damaged) == ((1,), (1,))
    again = make(tmp_path / "out", keep="png")
    assert (again.skipped, again.damaged, again.made) == (2, 1, 1)


def test_what_is_there_is_skipped_and_what_is_damaged_is_made_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)
    before = hashes(out / "shards")
    data = bytearray((out / "shards" / "000001.tar").read_bytes())
    data[700] ^= 1  # of the same length
    (out / "shards" / "000001.tar").write_bytes(data)
    (out / "shards" / "000002.tar").unlink()
    [status] = status_of(str(out), check=True)
    assert (status.missing, status.damaged, status.shards) == ((1, 2), (1, 2), 1)
    again = make(out)
    assert (again.skipped, again.damaged, again.made) == (1, 2, 2)
    assert hashes(out / "shards") == before
    assert make(out).made == 0


def test_a_line_cut_short_is_a_shard_made_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)
    [path] = (out / "manifest").iterdir()
    text = path.read_text()
    path.write_text(text[: text.rindex('"sha256"')])
    [status] = status_of(str(out))
    assert status.missing == (2,)
    assert make(out).made == 1


def test_another_job_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    ran = command(
        "sample", "--seeds", "0-9", "--nfe", "2", "--batch", 4, "--out", out, "--shards", 3
    )
    assert ran.exit_code == 2
    assert "another job, with nfe=1 (now 2)" in ran.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    for change in ({"seeds": range(11)}, {"keep": "png"}, {"given": {"label": "bag"}}):
        with pytest.raises(ValueError, match="another job"):
            make(out, **change)


def test_shards_and_pictures_of_another_kind_are_not_mixed(plain: Path, shards: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (*plain.rglob("*"), *shards.rglob("*"))}
    for keep in ("tar", "png"):
        with pytest.raises(ValueError, match=r"holds pictures that are not of shards, as \S+\.png"):
            make(plain, keep=keep)
    ran = command("sample", *FEW, "--out", shards)
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert "holds shards; say --shards as well" in ran.stderr
    after = {path: path.stat().st_mtime_ns for path in (*plain.rglob("*"), *shards.rglob("*"))}
    assert after == before


def test_two_jobs_at_once_are_not_in_one_folder(tmp_path: Path) -> None:
    with open_store(tmp_path).shared("another"), pytest.raises(ValueError, match="other settings"):
        make(tmp_path)
    assert not list(tmp_path.glob("job.json"))


def test_features_are_kept_beside_the_pictures_or_alone(tmp_path: Path) -> None:
    looks = Looks("fashion-a")
    both, alone = tmp_path / "both", tmp_path / "alone"
    make(both, looks=looks)
    make(alone, looks=looks, keep="none")
    for number in range(3):
        name = f"shards/{number:06d}.npz"
        assert (both / name).read_bytes() == (alone / name).read_bytes()
    part = read_part((alone / "shards" / "000001.npz").read_bytes())
    assert part.rows is not None
    assert part.rows.index.tolist() == [4, 5, 6, 7]
    assert not list((alone / "shards").glob("*.tar"))


def test_labels_and_names_go_with_their_seeds(tmp_path: Path) -> None:
    given = {"label": ["bag", "shirt"] * 5}
    make(tmp_path / "out", seeds=[7] * 10, names=[f"p{i}" for i in range(10)], given=given)
    found = members(tmp_path / "out" / "shards" / "000001.tar")
    rows = {name: json.loads(data) for name, data in found.items() if name.endswith(".json")}
    assert [rows[f"p{i}.json"]["label"] for i in range(4, 8)] == ["bag", "shirt"] * 2
    assert found["p4.png"] != found["p5.png"]
    with pytest.raises(ValueError, match="a name of its own"):
        make(tmp_path / "other", seeds=[7] * 10)
    with pytest.raises(ValueError, match="hat"):
        make(tmp_path / "other", given={"label": ["bag"] * 9 + ["hat"]})
    assert not (tmp_path / "other").exists()


def test_a_url_is_a_place_as_a_folder_is(tmp_path: Path, shards: Path) -> None:
    place = f"memory://{tmp_path.name}/run"
    assert make(place).made == 3
    store = open_store(place)
    for path in (shards / "shards").iterdir():
        assert store.read(f"shards/{path.name}") == path.read_bytes()
    assert make(place).skipped == 3
    [status] = status_of(place)
    assert (status.shards, status.missing) == (3, ())
    with pytest.raises(ValueError, match="nonsense"):
        open_store("nonsense://bucket/run")


def test_status_says_what_is_there(shards: Path, tmp_path: Path) -> None:
    ran = command("status", shards)
    assert ran.exit_code == 0, ran.output
    assert "3 of 3, of 4 pictures" in ran.stdout
    assert "10 of 10" in ran.stdout
    [found] = json.loads(command("status", shards, "--json", "--check").stdout)["jobs"]
    assert found["left"] == 0
    assert found["job"]["seeds"] == "0 to 9"
    ran = command("status", tmp_path)
    assert ran.exit_code == 2
    assert "has no shards" in ran.stderr


def test_a_job_of_a_stranger_is_one_line(shards: Path, tmp_path: Path) -> None:
    known = json.loads((shards / "job.json").read_text())
    for text in (
        "{",
        "[]",
        '{"format": "x"}',
        json.dumps({"format": "fewstep-shards/1", "what": 3}),
        json.dumps({**known, "pictures": 10**15}),
    ):
        (tmp_path / "job.json").write_text(text)
        with pytest.raises(ValueError, match=r"job\.json says no job"):
            read_job(open_store(tmp_path))
    for facts in ({"solver": [], "nfe": "many"}, {"solver": "x"}, {"nfe": 2}):
        (tmp_path / "job.json").write_text(json.dumps({**known, "facts": facts}))
        ran = command("status", tmp_path)
        assert ran.exit_code == 0, ran.output


def test_a_line_names_files_and_no_paths(tmp_path: Path) -> None:
    make(tmp_path / "out", keep="png")
    [path] = (tmp_path / "out" / "manifest").iterdir()
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert lines[0]["names"] == [f"{seed:06d}" for seed in range(4)]
    lines[0]["names"][0] = "../secret"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    [status] = status_of(str(tmp_path / "out"), check=True)
    assert status.missing == (0,)


def test_a_manifest_of_forty_thousand_shards_is_read_in_seconds(tmp_path: Path) -> None:
    make(tmp_path / "out")
    store = open_store(tmp_path / "out")
    job = read_job(store)
    assert job is not None
    [path] = (tmp_path / "out" / "manifest").iterdir()
    line = json.loads(path.read_text().splitlines()[0])
    path.write_text("".join(json.dumps({**line, "shard": i % 3}) + "\n" for i in range(40_000)))
    assert sorted(Manifest(store, job).lines()) == [0, 1, 2]


def test_smaller_batches_where_memory_runs_out(tmp_path: Path, monkeypatch) -> None:
    import torch

    from fewstep.sampling.generate import Run

    usual = Run.make

    def short(self: Run, start: int, size: int) -> Any:
        if size > 2:
            raise torch.OutOfMemoryError("out of memory")
        return usual(self, start, size)

    monkeypatch.setattr(Run, "make", short)
    result = make(tmp_path / "out")
    assert result.smaller == 3
    assert {line.batch for line in result.lines.values()} == {2}


def test_tars_are_in_the_layout_of_webdataset(shards: Path) -> None:
    names = list(members(shards / "shards" / "000000.tar"))
    assert names[:2] == ["000000.png", "000000.json"]
