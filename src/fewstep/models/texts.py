"""Conditions that have been encoded before, kept within a bound.

A condition is a tree: mappings of mappings of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["MEMORY", "Memory", "on_leaves", "version_of"]

MEMORY = 2**30  # bytes: 9,000 texts of Stable Diffusion 1 in half precision


def on_leaves(change: Callable[..., Tensor], *conditions: Any) -> Any:
    """A condition of change(leaf of each), for conditions that are alike in structure."""
    if isinstance(conditions[0], Mapping):
        return {name: on_leaves(change, *(c[name] for c in conditions)) for name in conditions[0]}
    return change(*conditions)


@dataclass
class Memory:
    """Conditions by what was asked for, on the CPU, in the dtype in which they came.

    limit: bytes; what would go beyond is not kept, and encoded again when it is asked for again
    """

    limit: int = MEMORY
    size: int = 0
    kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def recall(self, key: Hashable, encode: Callable[[], Any]) -> Any:
        """What encode() returned when it was first asked for under that key."""
        if key in self.kept:
            return self.kept[key]
        sizes: list[int] = []

        def taken(leaf: Tensor) -> Tensor:
            sizes.append(leaf.nbytes)
            return leaf.cpu()

        with torch.inference_mode(False), torch.no_grad():  # tensors that training may use too
            found = on_leaves(taken, encode())
        if self.size + sum(sizes) <= self.limit:
            self.kept[key], self.size = found, self.size + sum(sizes)
        return found


def version_of(parts: Iterable[Any]) -> int:
    """A number that changes when weights or adapters of these networks do, in this process."""
    found: list[Any] = []
    for net in parts:
        for module in net.modules() if isinstance(net, torch.nn.Module) else ():
            found += [(id(p), p._version) for p in module.parameters(recurse=False)]
            if hasattr(module, "scaling"):  # of an adapter
                active = getattr(module, "active_adapters", None)
                merged = getattr(module, "merged_adapters", None)
                found.append(str((module.scaling, active, merged)))
    return hash(tuple(found))
