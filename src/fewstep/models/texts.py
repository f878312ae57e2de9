"""Conditions that have been encoded before, kept within a bound, and texts that are too long.

A condition is a tree: mappings of mappings of tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["LIMIT", "TextCache", "cut_texts", "on_leaves", "warn_of_cuts"]

LIMIT = 2**28  # bytes: 2,300 texts of Stable Diffusion 1 in half precision
SHOWN = 40  # characters by which a warning names a text


def on_leaves(change: Callable[..., Tensor], *conditions: Any) -> Any:
    """A condition of change(leaf of each), for conditions that are alike in structure."""
    if isinstance(conditions[0], Mapping):
        return {name: on_leaves(change, *(c[name] for c in conditions)) for name in conditions[0]}
    return change(*conditions)


@dataclass
class TextCache:
    """Conditions by what was asked for, on the CPU, in the dtype in which they came.

    limit: bytes; what was not asked for the longest leaves first, and one beyond it is not kept
    """

    limit: int = LIMIT
    size: int = 0
    kept: dict[Hashable, tuple[Any, int]] = field(default_factory=dict, repr=False)

    def recall(self, key: Hashable, encode: Callable[[], Any]) -> Any:
        """What encode() returned when it was first asked for under that key."""
        if key in self.kept:
            self.kept[key] = self.kept.pop(key)  # to the end: the last to leave
            return self.kept[key][0]
        sizes: list[int] = []

        def taken(leaf: Tensor) -> Tensor:
            sizes.append(leaf.nbytes)
            return leaf.cpu()

        found = on_leaves(taken, encode())
        size = sum(sizes)
        if size <= self.limit:
            self.kept[key], self.size = (found, size), self.size + size
            while self.size > self.limit:
                oldest = next(iter(self.kept))
                self.size -= self.kept.pop(oldest)[1]
        return found

    def clear(self) -> None:
        """Forget all: after a change of a text encoder in place."""
        self.kept.clear()
        self.size = 0


def cut_texts(tokenizer: Any, limit: int, texts: Sequence[str]) -> list[str]:
    """What a tokenizer leaves out of each text that is longer than it reads; "" where nothing."""
    limit = limit or tokenizer.model_max_length
    cut = []
    for text in texts:
        ids = tokenizer(text, truncation=False, verbose=False).input_ids
        # the last token read is the mark of the end
        cut.append(tokenizer.decode(ids[limit - 1 : -1]).strip() if len(ids) > limit else "")
    return cut


def warn_of_cuts(pipe: Any, tokenizers: Iterable[tuple[str, int]], texts: Sequence[str]) -> None:
    """One warning for each text that some text encoder does not read to the end."""
    cuts: dict[tuple[str, str], list[str]] = {}
    for name, limit in tokenizers:
        if (tokenizer := getattr(pipe, name)) is None:
            continue
        for text, cut in zip(texts, cut_texts(tokenizer, limit, texts), strict=True):
            if cut:
                read = f"{name} ({limit or tokenizer.model_max_length} tokens)"
                cuts.setdefault((text, cut), []).append(read)
    for (text, cut), names in cuts.items():
        start = text if len(text) <= SHOWN else text[:SHOWN] + "..."
        warnings.warn(
            f"the prompt {start!r} is too long for {' and '.join(names)}: it does not see {cut!r}",
            stacklevel=4,
        )
