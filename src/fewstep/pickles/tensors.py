"""The tensors of what was read: their names, and their numbers when they are asked for."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fewstep.data.bounds import check_room
from fewstep.pickles.files import FETCH, Pickled
from fewstep.pickles.records import Record, Tensor
from fewstep.text import clean

if TYPE_CHECKING:
    import torch

__all__ = ["floats", "load", "module_tensors", "named", "stream", "tensors"]

DEEPEST = 64
FEW = 1_000_000  # numbers
SMALL = 64 * 2**20
PLAIN = ("state_dict", "model", "ema", "network")  # these say what, and are no part of a name
LONGEST, MOST_TEXT = 1024, 4 * 2**20  # characters of a name, and of all names of a file


def tensors(root: Any) -> dict[str, Tensor]:
    """The tensors in nested tables and modules, by dotted name; those of a state dict as they
    stand.

    Raises:
        ValueError: where their names are longer than any network's.
    """
    found: dict[str, Tensor] = {}
    names = _Names()
    level: list[tuple[str, Any]] = [("", root)]
    seen: set[int] = set()
    for _ in range(DEEPEST):
        inner: list[tuple[str, Any]] = []
        for prefix, node in level:
            if isinstance(node, Tensor):
                found.setdefault(prefix, node)
            elif isinstance(node, Record):
                named = prefix if prefix not in PLAIN else ""
                if id(node) not in seen:
                    found |= {names.join(named, n): t for n, t in module_tensors(node).items()}
            elif isinstance(node, dict) and id(node) not in seen:
                named = prefix if prefix not in PLAIN else ""
                inner += [(names.join(named, key), value) for key, value in node.items()]
            seen.add(id(node))
        level = inner
    return found


def named(pickled: Pickled) -> dict[str, Tensor]:
    """The tensors of a file by name, as `tensors`. Errors: ValueError that names the file."""
    try:
        return tensors(pickled.root)
    except ValueError as error:
        raise ValueError(f"{clean(pickled.path)} cannot be read ({error}); {FETCH}") from None


def module_tensors(module: Record) -> dict[str, Tensor]:
    """Parameters and buffers of a module that lies in a pickle as its state.

    Raises:
        ValueError: where its modules are nested deeper, or named longer, than any network's.
    """
    found: dict[str, Tensor] = {}
    level, names = [("", module)], _Names()
    for _ in range(DEEPEST):
        inner: list[tuple[str, Record]] = []
        for prefix, one in level:
            for part in ("_parameters", "_buffers"):
                values = one.get(part)
                for name, value in values.items() if isinstance(values, dict) else ():
                    if isinstance(value, Tensor):
                        found[names.join(prefix, name)] = value
            children = one.get("_modules")
            for name, child in children.items() if isinstance(children, dict) else ():
                if isinstance(child, Record):
                    inner.append((names.join(prefix, name), child))
        if len(inner) > 100_000:
            break
        level = inner
        if not level:
            return found
    raise ValueError(f"{clean(module.kind, 80)} has modules nested more than {DEEPEST} deep")


class _Names:
    """Makes dotted names, of which a small file must not make many long ones."""

    def __init__(self) -> None:
        self.left = MOST_TEXT

    def join(self, prefix: str, key: Any) -> str:
        """Errors: ValueError where the names get longer than any network's."""
        last = f"({type(key).__name__})" if isinstance(key, tuple) else str(key)
        self.left -= len(prefix) + len(last) + 64
        if self.left < 0 or len(prefix) + len(last) > LONGEST:
            raise ValueError("its tensors have longer names than any network's")
        return f"{prefix}.{last}" if prefix else last


def load(pickled: Pickled, chosen: Mapping[str, Tensor]) -> dict[str, torch.Tensor]:
    """The numbers of some tensors, on the CPU, each in memory of its own.

    Raises:
        OSError: where the file cannot be read.
        ValueError: where it was cut since, or the tensors do not fit into free memory.
    """
    return dict(stream(pickled, chosen))


def stream(pickled: Pickled, chosen: Mapping[str, Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The numbers of some tensors, one after the other. Raises: as `load`."""
    total = sum(tensor.nbytes for tensor in chosen.values())
    if total > pickled.nbytes + SMALL:
        raise ValueError(
            f"{clean(pickled.path)} declares {total} bytes of tensors and has {pickled.nbytes}; "
            f"{FETCH}"
        )
    check_room(total, clean(pickled.path))
    with open(pickled.path, "rb") as file:
        for name, tensor in chosen.items():
            yield name, _numbers(file, pickled.path, tensor)


def floats(pickled: Pickled, tensor: Tensor) -> list[float]:
    """The numbers of a small flat tensor, or the one of a scalar, without torch.

    Raises:
        OSError: where the file cannot be read.
        ValueError: for another tensor, or where the file was cut since.
    """
    where = clean(pickled.path)
    form = {"float64": "d", "float32": "f", "float16": "e"}.get(tensor.dtype)
    flat = len(tensor.shape) < 2 and (tensor.stride in ((), (1,)) or tensor.numel == 1)
    if form is None or not flat or tensor.numel > FEW:
        raise ValueError(
            f"{where}: a tensor of {tensor.dtype} and shape {tensor.shape} is no short table"
        )
    with open(pickled.path, "rb") as file:
        file.seek(tensor.storage.start + tensor.offset * tensor.storage.size)
        data = file.read(tensor.nbytes)
    if len(data) != tensor.nbytes:
        raise ValueError(f"{where} was cut short while it was read; {FETCH}")
    return list(struct.unpack(f"<{tensor.numel}{form}", data))


def _numbers(file: BinaryIO, path: Path, tensor: Tensor) -> torch.Tensor:
    """The numbers of one tensor: its part of the storage, in the tensor's order."""
    import torch

    size, shape = tensor.storage.size, tensor.shape
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    if not tensor.numel:
        return torch.empty(shape, dtype=dtype)
    count = 1 + sum((n - 1) * step for n, step in zip(shape, tensor.stride, strict=True))
    raw = torch.empty(count * size, dtype=torch.uint8)
    file.seek(tensor.storage.start + tensor.offset * size)
    if file.readinto(memoryview(raw.numpy())) != len(raw):  # type: ignore[attr-defined]
        raise ValueError(f"{clean(path)} was cut short while it was read; {FETCH}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flat = raw.view(dtype)
    return flat.as_strided(shape, tensor.stride).contiguous()
