"""What goes wrong in a store is one line, and two jobs are never in one folder at once."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from fewstep.scale.executors import Local
from fewstep.scale.stores import Bucket, Folder
from fewstep.scale.work import Place


class Refusing:
    """A file system whose every call raises an error of its own kind."""

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            raise RuntimeError("Unable to locate\n credentials")

        return call


@pytest.mark.parametrize(
    "act",
    [
        lambda store: store.prepare(),
        lambda store: store.read("job.json"),
        lambda store: list(store.parts("job.json")),
        lambda store: store.write("job.json", b""),
        lambda store: store.has("job.json"),
        lambda store: store.sizes("shards"),
        lambda store: store.folders(),
    ],
)
def test_every_error_of_an_object_store_names_the_place(act: Any) -> None:
    with pytest.raises(OSError, match="Unable to locate credentials") as raised:
        act(Bucket("s3://bucket/run", Refusing(), "bucket/run"))
    assert str(raised.value.filename).startswith("s3://bucket/run")


def test_parts_are_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setattr("fewstep.scale.stores.PART", 10)
    data = bytes(range(25))
    place = f"{tmp_path.name}/parts"
    for store in (
        Folder(str(tmp_path)),
        Bucket(f"memory://{place}", fsspec.filesystem("memory"), place),
    ):
        store.write("shards/a", data)
        assert [len(part) for part in store.parts("shards/a")] == [10, 10, 5]
        assert b"".join(store.parts("shards/a")) == store.read("shards/a") == data


def test_a_folder_has_one_identity_at_a_time(tmp_path: Path) -> None:
    one, other = Folder(str(tmp_path)), Folder(str(tmp_path))
    refused = pytest.raises(ValueError, match="choose another --out")
    with one.shared("a"), other.shared("a"), refused, other.shared("b"):
        pass
    with other.shared("b"):
        pass
    assert not list(tmp_path.iterdir())


class Flaky:
    """Work whose store fails the first times."""

    def __init__(self, code: int, times: int) -> None:
        self.code, self.left = code, times

    def open(self, place: Place) -> Any:
        return self.do

    def do(self, item: int) -> int:
        self.left -= 1
        if self.left >= 0:
            raise OSError(self.code, "it is down")
        return item


def test_one_process_tries_again_what_may_succeed() -> None:
    executor = Local()
    assert [outcome.value for _, outcome in executor.map(Flaky(errno.EIO, 2), [7])] == [7]
    assert executor.counts.tried == 2
    for work in (Flaky(errno.EIO, 3), Flaky(errno.ENOSPC, 1)):
        with pytest.raises(OSError, match="it is down"):
            list(Local().map(work, [7]))
