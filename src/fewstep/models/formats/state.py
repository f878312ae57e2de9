"""State dicts in files, safetensors or of torch.save: the shapes first, numbers when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep import pickles
from fewstep.data.bounds import check_room
from fewstep.tensors import read_header
from fewstep.text import clean

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TensorFile", "open_tensors"]


@dataclass(frozen=True)
class TensorFile:
    """The tensors of a file.

    entries: by name, each with its shape
    stream: gives the numbers of some of them, one after the other, on the CPU
    floats: the numbers of a short flat one, without torch
    """

    entries: Mapping[str, Any]
    stream: Callable[[Iterable[str]], Iterator[tuple[str, Tensor]]]
    floats: Callable[[str], list[float]]


def open_tensors(path: Path) -> TensorFile:
    """The tensors in a file of which nothing is run.

    Raises:
        OSError: where it cannot be read.
        ValueError: that names the file, where it is damaged.
    """
    with open(path, "rb") as file:
        start = file.read(16)
    if pickles.is_pickle(start) and start[8:9] != b"{":
        found = pickles.read(path)
        tensors = pickles.named(found)
        return TensorFile(
            tensors,
            lambda names: pickles.stream(found, {name: tensors[name] for name in names}),
            lambda name: pickles.floats(found, tensors[name]),
        )
    header = read_header(path)

    def stream(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        import safetensors

        chosen = list(names)
        check_room(sum(header[name].nbytes for name in chosen), str(path))
        with safetensors.safe_open(path, "pt") as file:
            for name in chosen:
                yield name, file.get_tensor(name).clone()

    def floats(name: str) -> list[float]:
        import safetensors

        if header[name].dtype not in ("F64", "F32", "F16"):
            raise ValueError(
                f"{clean(path)}: {name} is of {header[name].dtype}, and no short table"
            )
        with safetensors.safe_open(path, "numpy") as file:
            return file.get_tensor(name).ravel().tolist()

    return TensorFile(header, stream, floats)
