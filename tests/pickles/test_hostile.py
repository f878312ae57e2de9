"""Hostile and damaged pickles: nothing runs, one line says why, memory stays below the file's size.

The corpus is made here. One process reads it all under an audit hook; another measures memory.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from fewstep import pickles
from tests.support.nvlabs import Persistent, dumps

MANY = 2**20


def call(name: str, argument: str = "true", protocol: int = 2) -> bytes:
    """A pickle that calls a function with a text."""
    module, function = name.rsplit(".", 1)
    return (
        b"\x80%c" % protocol
        + f"c{module}\n{function}\n".encode()
        + b"X"
        + struct.pack("<I", len(argument))
        + argument.encode()
        + b"\x85R."
    )


def stacked(name: str) -> bytes:
    """The same by STACK_GLOBAL."""
    module, function = (part.encode() for part in name.rsplit(".", 1))
    text = b"\x8c%c%s\x8c%c%s" % (len(module), module, len(function), function)
    return b"\x80\x04" + text + b"\x93\x8c\x04true\x85R."


class Runs:
    def __init__(self, *how: Any) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        return self.how


def saved(value: Any, new: bool = True) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=new)
    return out.getvalue()


def rezipped(change: Callable[[str, bytes], bytes | None], method: int = 0) -> bytes:
    """A file of torch.save with some of its parts changed or left out."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved({"w": torch.ones(64)}))) as old,
        zipfile.ZipFile(out, "w", method) as new,
    ):
        for info in old.infolist():
            if (data := change(info.filename, old.read(info.filename))) is not None:
                new.writestr(info.filename, data)
    return out.getvalue()


def program(data: bytes) -> bytes:
    return rezipped(lambda name, old: data if name.endswith("data.pkl") else old)


ZIP, OLD = saved({"w": torch.ones(64)}), saved({"w": torch.ones(64)}, new=False)
NESTED = pickle.dumps({"w": torch.ones(64)}, protocol=4)
CALLS = [
    "os.system",
    "posix.system",
    "subprocess.Popen",
    "subprocess.call",
    "builtins.eval",
    "builtins.exec",
    "builtins.__import__",
    "builtins.getattr",
    "builtins.open",
    "builtins.compile",
    "__builtin__.eval",
    "importlib.import_module",
    "runpy.run_path",
    "shutil.rmtree",
    "socket.create_connection",
    "ctypes.CDLL",
    "pty.spawn",
    "webbrowser.open",
    "timeit.timeit",
    "code.interact",
    "pickle.loads",
    "torch.load",
    "torch.hub.load",
    "torch.jit.load",
    "torch.utils.data.get_worker_info",
    "numpy.load",
    "pip._internal.main",
    "operator.attrgetter",
    "functools.partial",
    "codecs.decode",
    "zipimport.zipimporter",
    "torch.nn.functional.relu",
    "solvers_amed.amed_sampler",
    "anything.at_all",
    "types.CodeType",
]
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"


def tensor(count: bytes, offset: bytes, shape: bytes, stride: bytes) -> bytes:
    """A zip of torch.save whose tensor says this of itself; it has 64 elements."""
    body = STORAGE + count + b"tQ" + offset + b"(" + shape + b"t(" + stride + b"t\x89)"
    return program(b"\x80\x02" + TENSOR + b"(" + body + b"tR.")


CORPUS: dict[str, bytes] = {
    **{f"call {name}": call(name) for name in CALLS},
    **{f"stacked {name}": stacked(name) for name in CALLS[:6]},
    **{f"in a zip {name}": program(call(name)) for name in CALLS[:4]},
    **{f"in an old file {name}": OLD[:30] + call(name) for name in CALLS[:2]},
    "object": b"\x80\x02(cos\nsystem\nX\x04\x00\x00\x00trueo.",
    "instance": b"\x80\x02(X\x04\x00\x00\x00trueios\nsystem\n.",
    "new object": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85\x81.",
    "with items": b"\x80\x04cos\nsystem\nX\x04\x00\x00\x00true\x85}\x92.",
    "dotted": b"\x80\x04\x8c\x02os\x8c\x0bpath.system\x93\x8c\x04true\x85R.",
    "state that calls": dumps({"ema": Persistent("Net", {"a": Runs(os.system, ("true",))})}),
    "persistent of nothing": dumps(Persistent("Net"))[:-20] + b"0.",
    "persistent without a class": b"\x80\x02ctorch_utils.persistence\n"
    b"_reconstruct_persistent_obj\n}\x85R.",
    "extension 1": b"\x80\x02\x82\x01.",
    "extension 4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "next buffer": b"\x80\x05\x97.",
    "persid": b"\x80\x02Pabc\n.",
    "binpersid alone": b"\x80\x02NQ.",
    "unknown opcode": b"\x80\x02\xff.",
    "protocol": b"\x80\x09N.",
    "nothing": b"\x80",
    "only a protocol": b"\x80\x04",
    "no end": b"\x80\x04}",
    "two values": b"\x80\x04NN.",
    "stop at once": b"\x80\x04.",
    "marks": b"\x80\x04" + b"(" * MANY + b".",
    "tuples": b"\x80\x04)" + b"\x85" * MANY + b".",
    "lists": b"\x80\x04" + b"]" * 5000 + b"a" * 4999 + b".",
    "dicts": b"\x80\x04" + b"}" * MANY + b".",
    "sets": b"\x80\x04" + b"\x8f" * MANY + b".",
    "copies": b"\x80\x04]" + b"2" * MANY + b".",
    "memo": b"\x80\x04N" + b"\x94" * MANY + b".",
    "memo index": b"\x80\x02}r\xff\xff\xff\x7f.",
    "memo of nothing": b"\x80\x02h\x07.",
    "tuple key": b"\x80\x04}" + b")\x85" * 20 + b"Ns.",
    "deep key": b"\x80\x04})" + b"\x85" * 100_000 + b"Ns.",
    "list key": b"\x80\x04}]Ns.",
    "grows by itself": b"\x80\x04]\x940" + b"h\x00h\x00ea" * 100 + b".",
    "contains itself": b"\x80\x04]\x94h\x00a.",
    "long integer": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "long text": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
    "long bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"x.",
    "negative string": b"\x80\x02T\xff\xff\xff\xffabc.",
    "digits": b"\x80\x02I" + b"9" * 900 + b"\n.",
    "line": b"\x80\x02c" + b"a" * 100_000 + b"\nb\n.",
    "no utf-8": b"\x80\x04\x8c\x02\xff\xfe.",
    "surrogate": b"\x80\x04\x8c\x03\xed\xa0\x80.",
    "escape in a name": call("a.b\x1b[31m"),
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",
    "build of a number": b"\x80\x02K\x01}b.",
    "items of a number": b"\x80\x02K\x01K\x02K\x03s.",
    "append to a number": b"\x80\x02K\x01K\x02a.",
    "odd items": b"\x80\x02}(K\x01u.",
    "storage of text": b"\x80\x02ctorch.storage\n_load_from_bytes\nX\x01\x00\x00\x00a\x85R.",
    "storage of nothing": b"\x80\x03ctorch.storage\n_load_from_bytes\nC\x00\x85R.",
    "storage of a call": b"\x80\x03ctorch.storage\n_load_from_bytes\nC%c" % len(call("os.system"))
    + call("os.system")
    + b"\x85R.",
    "cut zip": ZIP[:-30],
    "cut in the middle": ZIP[: len(ZIP) // 2],
    "cut old": OLD[:-30],
    "cut nested": NESTED[:-80],
    "zip of text": rezipped(lambda name, old: None if "data.pkl" in name else old),
    "compressed": rezipped(lambda name, old: old, zipfile.ZIP_DEFLATED),
    "bomb": rezipped(lambda name, old: b"\0" * 2**24, zipfile.ZIP_DEFLATED),
    "no storage": rezipped(lambda name, old: None if "/data/" in name else old),
    "short storage": rezipped(lambda name, old: old[:8] if "/data/" in name else old),
    "big-endian": rezipped(lambda name, old: b"big" if "byteorder" in name else old),
    "huge storage": tensor(b"\x8a\x07" + b"\xff" * 6 + b"\x00", b"K\x00", b"K\x40", b"K\x01"),
    "huge shape": tensor(b"K\x40", b"K\x00", b"J\xff\xff\xff\x7f", b"K\x00"),
    "negative stride": tensor(b"K\x40", b"K\x00", b"K\x02", b"J\xff\xff\xff\xff"),
    "beyond its end": tensor(b"K\x40", b"K\x3f", b"K\x02", b"K\x01"),
    "negative offset": tensor(b"K\x40", b"J\xff\xff\xff\xff", b"K\x02", b"K\x01"),
    "strides without sizes": tensor(b"K\x40", b"K\x00", b"K\x02", b""),
    "many dimensions": tensor(b"K\x40", b"K\x00", b"K\x01" * 500, b"K\x01" * 500),
}
HARMLESS = {"grows by itself", "contains itself", "persistent of nothing"}

PROBE = """
import json, os, sys
from pathlib import Path
from fewstep import pickles
events = []
BAD = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess", "socket", "ctypes", "pty",
       "import", "compile", "exec", "pickle.find_class", "shutil", "webbrowser")
def hook(event, arguments):
    if event.startswith(BAD) or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        events.append(f"{event} {arguments[:1]!r}")
sys.addaudithook(hook)
for path in sorted(Path(sys.argv[1]).iterdir()):
    events.clear()
    kind, message = "none", ""
    try:
        pickles.tensors(pickles.read(path).root)
    except Exception as error:
        kind, message = type(error).__name__, str(error)
    print(json.dumps([path.name, kind, message, list(events)]), flush=True)
"""


def test_none_of_the_corpus_runs_or_ends_in_a_traceback(tmp_path: Path) -> None:
    assert len(CORPUS) >= 60
    names = dict(enumerate(CORPUS))
    for number, name in names.items():
        (tmp_path / f"{number:03}").write_bytes(CORPUS[name])
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(CORPUS)
    for number, kind, message, events in found:
        name = names[int(number)]
        assert not events, name
        assert kind == "ValueError" or (kind == "none" and name in HARMLESS), (name, kind, message)
        assert message.isprintable(), name
        assert len(message) < 600, name
        for part in ("call ", "stacked "):
            if name.startswith(part) and "\x1b" not in name:
                assert name.removeprefix(part).rpartition(".")[2] in message, (name, message)


MEASURED = """
import sys
from fewstep import pickles

def peak():  # VmHWM, since ru_maxrss begins with the peak of the process that started this one
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

before = peak()
try:
    pickles.tensors(pickles.read(sys.argv[1]).root)
except ValueError:
    pass
print((peak() - before) * 1024)
"""


@pytest.mark.parametrize("name", ["dicts", "sets", "marks", "tuples", "memo", "texts", "parts"])
def test_memory_stays_below_twice_the_size(name: str, tmp_path: Path) -> None:
    size, path = 12 * 2**20, tmp_path / "f"
    units = {"dicts": b"}", "sets": b"\x8f", "marks": b"(", "tuples": b")\x85", "memo": b"N\x94"}
    units["texts"] = b"\x8c\x01\xc3\xa4".replace(b"\x01", b"\x02")
    if name == "parts":
        with zipfile.ZipFile(path, "w") as archive:
            for number in range(40_000):
                archive.writestr(f"a/data/{number}", b"")
    else:
        path.write_bytes(b"\x80\x04" + units[name] * (size // len(units[name])) + b".")
    command = [sys.executable, "-c", MEASURED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 2 * path.stat().st_size + 4 * 2**20  # 4 MiB: the interpreter's own


@pytest.mark.parametrize("name", ["deep", "keys"])
def test_names_take_little_memory(name: str, tmp_path: Path) -> None:
    """A name has the names of all tables around it, and a key may hold one text many times."""
    text = "a" * 4000
    value: Any = {(text,) * 50_000: 1, "x": 2}
    if name == "deep":
        value = dict.fromkeys(range(20_000), 1)
        for i in range(60):
            value = {f"{text}{i}": value}
    path = tmp_path / "f"
    path.write_bytes(pickle.dumps(value, 4))
    command = [sys.executable, "-c", MEASURED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 2 * path.stat().st_size + 16 * 2**20


def read_or_refuse(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    message = ""
    try:
        file = pickles.read(path)
        pickles.load(file, pickles.tensors(file.root))
    except ValueError as error:
        message = str(error)
    assert message.isprintable()


SEEDS = [ZIP, OLD, NESTED, dumps({"ema": Persistent("Net", {"_parameters": {"w": torch.ones(4)}})})]
OPCODES = b"(.0123FIJKLMNPQRSTUVXabcdeghijloprstuq}]) "
OPCODES += b"\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8c\x93\x94\x95"


def mutated(data: st.DataObject) -> bytes:
    """A good file with flipped bits, cut short, or with opcodes put in between."""
    good = bytearray(data.draw(st.sampled_from(SEEDS)))
    way = data.draw(st.sampled_from(["flip", "cut", "splice", "repeat"]))
    if way == "cut":
        return bytes(good[: data.draw(st.integers(2, len(good) - 1))])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(2, len(good) - 1))
        if way == "flip":
            good[at] ^= 1 << data.draw(st.integers(0, 7))
        elif way == "splice":
            good[at:at] = bytes(data.draw(st.lists(st.sampled_from(OPCODES), max_size=8)))
        else:
            end = min(len(good), at + data.draw(st.integers(1, 64)))
            good[end:end] = good[at:end]
    return bytes(good)


QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=150, derandomize=True, **QUICK)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(data: st.DataObject, tmp_path_factory: Any) -> None:
    read_or_refuse(mutated(data), tmp_path_factory.getbasetemp() / "damaged")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_many_damaged_files_are_read_or_refused(part: int, tmp_path: Path) -> None:
    @seed(part)
    @settings(max_examples=500, **QUICK)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        read_or_refuse(mutated(data), tmp_path / "damaged")

    check()
