"""A stand-in for CUDA graphs where there is no device: what is captured is done again, in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["stand_in"]


class Captured(TorchDispatchMode):
    """Operations with the very tensors that they read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, found))
        return found

    def replay(self) -> None:
        for func, args, kwargs, found in self.operations:
            again = pytree.tree_leaves(func(*args, **kwargs))
            for old, new in zip(pytree.tree_leaves(found), again, strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream:
    def wait_stream(self, other: Any) -> None:
        pass


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """Put it in torch.cuda's place. Returns all graphs as they are made."""
    made: list[Captured] = []

    def graph() -> Captured:
        made.append(Captured())
        return made[-1]

    @contextmanager
    def capture(graph: Captured, capture_error_mode: str = "global") -> Iterator[None]:
        with graph:
            yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return made
