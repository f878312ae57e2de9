"""Several processes that train one network together, started by torchrun.

Every process draws the same batch, works on its own part of it, and adds its gradients to those of
the others, so their number changes results by rounding alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Team", "team"]

LONGEST = timedelta(days=7)  # that one process waits for another


@dataclass(frozen=True)
class Team:
    """This process among `size`; the one of rank 0 writes the files."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in one message per dtype."""
        self._together(tensors, lambda flat: dist.all_reduce(flat))

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by that of rank 0."""
        self._together(tensors, lambda flat: dist.broadcast(flat, 0))

    def any(self, here: bool, device: torch.device) -> bool:
        """Whether it is so in any of the processes."""
        if self.size == 1:
            return here
        count = torch.tensor(float(here), device=device)
        self.add_up([count])
        return bool(count)

    @contextmanager
    def led(self, device: torch.device) -> Iterator[None]:
        """Around what rank 0 alone does: where it fails there, the others stop as well.

        Errors: those of rank 0; ValueError in the others, which names it.
        """
        failed = True
        try:
            yield
            failed = False
        finally:
            stop = self.any(failed, device)
        if stop:
            raise ValueError("stopped with the process of rank 0, which says why")

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()

    @torch.no_grad()
    def _together(self, tensors: Sequence[Tensor], act) -> None:
        if self.size == 1:
            return
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            same = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.flatten() for t in same])
            act(flat)
            for t, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
                t.copy_(part.view_as(t))


@contextmanager
def team(device: torch.device) -> Iterator[Team]:
    """The processes that torchrun started, connected for the time being; one alone without it."""
    if dist.is_available() and dist.is_initialized():
        yield Team(dist.get_rank(), dist.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Team()
        return
    # the others wait while rank 0 encodes the data; where it dies, torchrun ends them
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LONGEST)
    try:
        yield Team(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
