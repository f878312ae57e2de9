"""What the names in a pickle mean: the whole list of those that mean anything.

tensors, storages, plain containers     what they are, as records
objects of NVlabs' persistence          their class's name and their state, not their source
other classes                           a record with arguments and state
other functions                         may be named; a call of one ends the reading
anything else of Python's own library   ends the reading
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fewstep.pickles.records import DTYPES, Array, Bytes, Name, Record, Skipped, Storage, Tensor
from fewstep.records import shown

if TYPE_CHECKING:
    from fewstep.pickles.machine import Stream

__all__ = ["Meanings"]

MOST_DIMENSIONS = 16
# modules of Python 2 and of the system, beside those that Python itself lists
STDLIB = sys.stdlib_module_names | {
    *("__builtin__", "__main__", "copy_reg", "cPickle", "commands", "os2", "popen2", "sets"),
    *("UserDict", "imp", "pip", "setuptools", "distutils", "pkg_resources", "IPython"),
}
# data types of Python's library that a file may hold; a record of each
INERT = {
    *("argparse.Namespace", "types.SimpleNamespace", "collections.Counter", "collections.deque"),
    *("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath", "pathlib.Path"),
    *("pathlib._local.PosixPath", "pathlib._local.WindowsPath", "uuid.UUID", "decimal.Decimal"),
    *("datetime.datetime", "datetime.timedelta", "datetime.date", "builtins.object"),
    *("__builtin__.object", "builtins.complex", "builtins.slice", "builtins.range"),
}
# names of types that stand for themselves, such as the factory of a defaultdict
PLAIN = {
    f"{home}.{name}"
    for home in ("builtins", "__builtin__")
    for name in ("int", "float", "str", "bool", "list", "dict", "tuple", "set", "bytes")
}
TORCH_STORAGES = ("torch", "torch.cuda", "torch.storage")
NUMBERS = {"f2": "<e", "f4": "<f", "f8": "<d", "b1": "<?", "i1": "<b", "u1": "<B"}
NUMBERS |= {"i2": "<h", "u2": "<H", "i4": "<i", "u4": "<I", "i8": "<q", "u8": "<Q"}


class Meanings:
    """The list, applied to one file.

    nested: makes a storage of bytes that hold a file of torch.save, where such bytes may stand
    """

    def __init__(self, nested: Callable[[Bytes], Storage] | None = None) -> None:
        self.nested = nested
        self.names: set[Name] = set()

    def named(self, module: str, name: str) -> Name:
        """The record of a global. Errors: ValueError where it must not even be named."""
        found = Name(module, name)
        if len(self.names) < 10_000:
            self.names.add(found)
        full = str(found)
        if module.partition(".")[0] in STDLIB and full not in ALLOWED:
            raise ValueError(f"it names {shown(full)}, which is no data and is never run")
        return found

    def made(self, what: Name, args: tuple[Any, ...], stream: Stream) -> Any:
        """What a call of the global would make. Errors: ValueError that names the global."""
        full = str(what)
        if (call := CALLS.get(full)) is not None:
            try:
                return call(self, args, stream)
            except (IndexError, TypeError, AttributeError, KeyError, OverflowError):
                raise ValueError(f"it calls {full} with what that does not take") from None
        last = what.name.rpartition(".")[2].lstrip("_")
        if full in INERT or (last[:1].isupper() and full not in PLAIN):
            return Record(full, args=args)
        raise ValueError(f"it calls {shown(full)}, which is no data and is never run")

    def built(self, target: Any, state: Any) -> None:
        """Give a record its state; the attributes of a plain table are left out."""
        if isinstance(target, Record):
            if target.kind == "numpy.ndarray" and isinstance(state, tuple) and len(state) == 5:
                kind = state[2].args[0] if isinstance(state[2], Record) and state[2].args else ""
                state = Array(_sizes(state[1]), str(kind)[:8])
            target.state = state
        elif not isinstance(target, dict | Tensor):
            raise ValueError(f"it gives a state to a {type(target).__name__}")


# -- what each name of the list makes: (meanings, arguments, stream) -> value --------------------


def _table(_: Meanings, args: tuple[Any, ...], stream: Stream) -> dict[Any, Any]:
    pairs = args[0] if args else ()
    stream.spend(120 * len(pairs))
    rows = pairs.items() if isinstance(pairs, dict) else pairs
    table: dict[Any, Any] = {}
    for row in rows:
        key, value = row
        if not isinstance(key, str | int | Name):
            raise TypeError
        table[key] = value
    return table


def _default_table(meanings: Meanings, args: tuple[Any, ...], stream: Stream) -> dict[Any, Any]:
    return _table(meanings, args[1:], stream)


def _set(_: Meanings, args: tuple[Any, ...], stream: Stream) -> set[Any]:
    items = args[0] if args else ()
    stream.spend(220 + 64 * len(items))
    if not all(isinstance(item, str | int | float | Name) for item in items):
        raise TypeError
    return set(items)


def _list(_: Meanings, args: tuple[Any, ...], stream: Stream) -> list[Any]:
    stream.spend(8 * len(args[0]) if args else 0)
    return list(args[0]) if args else []


def _encoded(_: Meanings, args: tuple[Any, ...], stream: Stream) -> Bytes | Skipped:
    """Bytes as text, as protocol 2 writes them; they are few, or nothing needs them."""
    return Skipped(len(args[0]) if isinstance(args[0], str) else args[0].length)


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or len(value) > MOST_DIMENSIONS:
        raise ValueError(f"a shape must have at most {MOST_DIMENSIONS} sizes")
    if not all(type(size) is int and 0 <= size < 2**48 for size in value):
        raise ValueError(f"a shape must hold sizes, got {shown(value)}")
    return tuple(value)


def _size(_: Meanings, args: tuple[Any, ...], stream: Stream) -> tuple[int, ...]:
    return _sizes(args[0] if args else ())


def _tensor(_: Meanings, args: tuple[Any, ...], stream: Stream) -> Tensor:
    """Arguments: storage, offset, shape, stride, and what only training needs."""
    storage, offset, shape, stride = args[0], args[1], _sizes(args[2]), _sizes(args[3])
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
        raise TypeError
    if len(shape) != len(stride):
        raise ValueError(f"a tensor has {len(shape)} sizes and {len(stride)} strides")
    if (numel := math.prod(shape)) > storage.count:
        raise ValueError(f"a tensor of {numel} elements lies in {storage.count} of them")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if numel and last >= storage.count:
        raise ValueError(f"a tensor reaches element {last} of {storage.count}")
    stream.spend(120 + 80 * len(shape))
    return Tensor(storage, offset, shape, stride)


def _parameter(_: Meanings, args: tuple[Any, ...], stream: Stream) -> Tensor:
    if not isinstance(args[0], Tensor):
        raise TypeError
    return args[0]


def _typed(meanings: Meanings, args: tuple[Any, ...], stream: Stream) -> Any:
    """torch._tensor._rebuild_from_type_v2(function, type, arguments, state)."""
    if not isinstance(args[0], Name) or not isinstance(args[2], tuple):
        raise TypeError
    if str(args[0]) not in TENSORS:
        raise ValueError(f"it calls {shown(str(args[0]))}, which is no data and is never run")
    return meanings.made(args[0], args[2], stream)


def _nested(meanings: Meanings, args: tuple[Any, ...], stream: Stream) -> Storage:
    if meanings.nested is None:
        raise ValueError("it has a storage inside a storage")
    if not isinstance(args[0], Bytes):
        raise TypeError
    return meanings.nested(args[0])


def _device(_: Meanings, args: tuple[Any, ...], stream: Stream) -> str:
    if not isinstance(args[0], str):
        raise TypeError
    return "cpu"


def _scalar(_: Meanings, args: tuple[Any, ...], stream: Stream) -> int | float | bool | Record:
    """numpy's scalar(dtype, bytes): the number itself."""
    kind, data = args[0].args[0], args[1]
    state = args[0].state
    if isinstance(data, Bytes) and kind in NUMBERS and data.length == int(kind[1:]):
        form = NUMBERS[kind]
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            form = form.replace("<", ">")
        return struct.unpack(form, stream.peek(data, 8))[0]
    return Record("numpy.scalar")


def _persistent(_: Meanings, args: tuple[Any, ...], stream: Stream) -> Record:
    """An object with its source: the class's name and the state are kept, the source is not."""
    meta = args[0]
    name = meta["class_name"]
    if not isinstance(name, str):
        raise TypeError
    return Record(name[:200], persistent=True, state=meta.get("state"))


def _reconstructed(_: Meanings, args: tuple[Any, ...], stream: Stream) -> Record:
    """copyreg's way to make an object: (class, base, state of the base)."""
    if not isinstance(args[0], Name):
        raise TypeError
    return Record(str(args[0]))


def _array(_: Meanings, args: tuple[Any, ...], stream: Stream) -> Record:
    return Record("numpy.ndarray")


def _dtype(_: Meanings, args: tuple[Any, ...], stream: Stream) -> Record:
    return Record("numpy.dtype", args=args)


Call = Callable[[Meanings, tuple[Any, ...], Any], Any]
TENSORS: dict[str, Call] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
CALLS: dict[str, Call] = {
    **TENSORS,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.storage._load_from_bytes": _nested,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": _table,
    "collections.defaultdict": _default_table,
    "dnnlib.util.EasyDict": _table,
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "__builtin__.set": _set,
    "__builtin__.frozenset": _set,
    "builtins.list": _list,
    "builtins.dict": _table,
    "_codecs.encode": _encoded,
    "copyreg._reconstructor": _reconstructed,
    "copy_reg._reconstructor": _reconstructed,
    "numpy.dtype": _dtype,
    **{
        f"numpy.{core}.multiarray.{name}": call
        for core in ("core", "_core")
        for name, call in (("scalar", _scalar), ("_reconstruct", _array))
    },
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
}
ALLOWED = {*CALLS, *INERT, *PLAIN}
STORAGES = {f"{home}.{name}" for home in TORCH_STORAGES for name in DTYPES}
