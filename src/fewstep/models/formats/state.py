"""State dicts in files, safetensors or of torch.save: the shapes first, numbers when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from fewstep import pickles
from fewstep.data.bounds import check_room
from fewstep.tensors import read_header

__all__ = ["TensorFile", "open_tensors"]


@dataclass(frozen=True)
class TensorFile:
    """The tensors of a file.

    entries: by name, each with its shape
    stream: gives the numbers of some of them, one after the other, on the CPU
    """

    entries: Mapping[str, Any]
    stream: Callable[[Iterable[str]], Iterator[tuple[str, Tensor]]]

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The numbers of some of them, each in memory of its own."""
        return dict(self.stream(names))


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
        tensors = pickles.tensors(found.root)
        return TensorFile(
            tensors, lambda names: pickles.stream(found, {name: tensors[name] for name in names})
        )
    header = read_header(path)

    def stream(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        chosen = list(names)
        check_room(sum(header[name].nbytes for name in chosen), str(path))
        with safetensors.safe_open(path, "pt") as file:
            for name in chosen:
                yield name, file.get_tensor(name).clone()

    return TensorFile(header, stream)
