"""What one module of a network returns, heard during a call.

Solvers that adapt read such features; they cost no further evaluation. The hook is set inside the
call alone, and hears the calling thread alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

__all__ = ["as_map", "has_module", "hear"]

T = TypeVar("T")


def hear(net: nn.Module, module: str, call: Callable[[], T]) -> tuple[T, Tensor]:
    """(what `call` returns, what a module of the network returned last in it).

    Args:
        net: the network itself, not compiled, since a compiled one does not look at hooks
        module: the dotted name of the module; of a tuple that it returns, the last is meant
        call: runs the network

    Raises:
        ValueError: where the call does not pass through the module.
    """
    seen: list[Any] = []
    caller = threading.get_ident()

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        if threading.get_ident() == caller:
            seen.append(output)

    handle = net.get_submodule(module).register_forward_hook(note)
    try:
        out = call()
    finally:
        handle.remove()
    if not seen:
        raise ValueError(f"the network's call does not pass through its module {module!r}")
    return out, seen[-1][-1] if isinstance(seen[-1], tuple) else seen[-1]


def as_map(features: Tensor, shape: tuple[int, ...], patch: int) -> Tensor:
    """Features [b, c, h, w]; tokens [b, tokens, c] go back on their grid, `patch` pixels a token of
    a picture of `shape`, (h, w)."""
    if features.ndim != 3:
        return features
    height, width = (side // patch for side in shape)
    return features.transpose(1, 2).reshape(len(features), -1, height, width)


def has_module(net: nn.Module, name: str) -> bool:
    """Whether a network has a module of that dotted name, and one that can be called."""
    try:
        return bool(name) and type(net.get_submodule(name)).forward is not nn.Module.forward
    except AttributeError:
        return False
