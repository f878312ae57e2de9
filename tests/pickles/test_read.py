"""The reader of pickles: what it reads equals what torch reads, and it runs nothing."""

from __future__ import annotations

import collections
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep import pickles
from tests.support.nvlabs import Persistent, write

VALUES = {
    "float32": torch.arange(6.0).reshape(2, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "part": torch.arange(10.0)[3:7],
    "strided": torch.arange(12.0)[::3],
    "float16": torch.tensor([1.5, -2.0]).half(),
    "bfloat16": torch.tensor([[1.5], [3.0]]).bfloat16(),
    "float64": torch.tensor(3.25, dtype=torch.float64),
    "int64": torch.tensor([2**40, -1]),
    "bool": torch.tensor([True, False, True]),
    "uint8": torch.tensor([1, 255], dtype=torch.uint8),
    "empty": torch.empty(0, 4),
    "parameter": torch.nn.Parameter(torch.ones(3)),
    "complex": torch.tensor([1 + 2j]),
}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
def test_files_of_torch_save(new: bool, tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    torch.save({"state_dict": VALUES}, path, _use_new_zipfile_serialization=new)
    file = pickles.read(path)
    found = pickles.load(file, pickles.tensors(file.root))
    assert file.form == ("zip" if new else "old")
    assert list(found) == list(VALUES)
    for name, value in VALUES.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value.detach())


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_storages_nested_in_a_pickle(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "f.pkl"
    path.write_bytes(pickle.dumps({"ema": VALUES}, protocol=protocol))
    file = pickles.read(path)
    found = pickles.load(file, pickles.tensors(file.root))
    assert all(torch.equal(found[name], value.detach()) for name, value in VALUES.items())


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_plain_values_are_what_they_were(protocol: int, tmp_path: Path) -> None:
    value = {
        "a": [1, -5, 2**40, -(2**70), 0.5, True, None, "text", "\u00e4\n"],
        "b": (1, (2, ()), [], {}),
        3: collections.OrderedDict([("x", 1)]),
        "c": {"s", 4},
        "d": frozenset({1}),
        "same": [[]] * 3,
    }
    path = tmp_path / "f.pkl"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    if protocol < 2:
        with pytest.raises(ValueError, match="neither a pickle"):
            pickles.read(path)
    else:
        root = pickles.read(path).root
        assert root == value
        assert root["same"][0] is root["same"][2]


class Callback:
    def __init__(self) -> None:
        self.best = torch.ones(2)


def test_other_classes_are_inert_records(tmp_path: Path) -> None:
    path = tmp_path / "f.ckpt"
    state = {"w": torch.zeros(1)}
    torch.save({"state_dict": state, "callbacks": {Callback: Callback()}}, path)
    root = pickles.read(path).root
    ((name, record),) = root["callbacks"].items()
    assert isinstance(name, pickles.Name)
    assert str(name).endswith("Callback")
    assert isinstance(record, pickles.Record)
    assert record.get("best").shape == (2,)


def test_a_module_of_torch_is_its_tensors(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    path = tmp_path / "f.pt"
    torch.save(net, path)
    file = pickles.read(path)
    found = pickles.load(file, pickles.module_tensors(file.root))
    assert {k: v.tolist() for k, v in found.items()} == {
        k: v.tolist() for k, v in net.state_dict().items()
    }


@pytest.mark.parametrize("length", [10, 100_000])
def test_the_source_of_a_persistent_object_is_not_kept(length: int, tmp_path: Path) -> None:
    source = "import os; os.abort()\n" + "#" * length
    state = {"_init_kwargs": {"width": 8}, "_parameters": {"w": torch.ones(2)}, "_modules": {}}
    path = write(tmp_path / "f.pkl", {"ema": Persistent("Net", state, source)})
    net = pickles.read(path).root["ema"]
    assert (net.kind, net.persistent) == ("Net", True)
    assert net.get("_init_kwargs") == {"width": 8}
    assert "abort" not in repr((net.args, net.items, net.entries, list(net.state)))
    assert list(pickles.module_tensors(net)) == ["w"]


def test_a_call_is_refused_by_name(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return os.system, ("true",)

    path = tmp_path / "f.pkl"
    path.write_bytes(pickle.dumps(Runs()))
    with pytest.raises(ValueError, match=r"names '(posix|nt)\.system', which is no data"):
        pickles.read(path)
