"""How work is spread, as one frozen object. No torch: the commands read their options off it."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import Field

from fewstep.records import Int, Real, Text, record

__all__ = ["KEEPS", "LOCAL", "RAY", "TORCHRUN", "Scaling", "under_torchrun"]

LOCAL, TORCHRUN, RAY = "local", "torchrun", "ray"
KEEPS = ("tar", "png", "none")


@record
class Scaling:
    """How the work is spread.

    The command shows these lines as its help.

    Attributes:
        executor: local (processes of this machine), torchrun (its ranks), ray, or ray:ADDRESS.
            Default: local; under torchrun its ranks.
        workers: Processes, each with a model of its own. Default: 1; under torchrun its ranks.
        gpus_per_worker: GPUs that Ray reserves for each worker; 0.5: two share one.

    Raises:
        ValueError: that names the field.
    """

    executor: Text | None = None
    workers: Annotated[Int, Field(ge=1, le=100_000)] | None = None
    gpus_per_worker: Annotated[Real, Field(ge=0, le=64)] | None = None

    def __post_init__(self) -> None:
        addressed = ":" in self.name and not (self.kind == RAY and self.address)
        if self.kind not in (LOCAL, TORCHRUN, RAY) or addressed:
            raise ValueError(
                f"executor must be local, torchrun, ray or ray:ADDRESS, got {self.executor!r}"
            )
        if self.kind == TORCHRUN and not under_torchrun():
            raise ValueError(
                "executor torchrun works in processes that torchrun started, and WORLD_SIZE is "
                "not set; run torchrun --nproc-per-node N -m fewstep ..."
            )
        if self.kind != TORCHRUN and under_torchrun():
            raise ValueError(
                f"torchrun started {os.environ['WORLD_SIZE']} processes, which share the work by "
                f"executor torchrun; leave out torchrun, or --executor {self.name}"
            )
        if self.kind == TORCHRUN and self.workers is not None:
            raise ValueError("torchrun says how many processes there are; leave out --workers")
        if self.gpus_per_worker is not None and self.kind != RAY:
            raise ValueError(
                f"gpus_per_worker is for executor ray, got executor {self.name}; leave it out"
            )

    @property
    def name(self) -> str:
        """The executor, with its address."""
        return self.executor or (TORCHRUN if under_torchrun() else LOCAL)

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]

    @property
    def address(self) -> str:
        """Of a Ray cluster, also where it is the whole name, ray://HOST:PORT; "": none is named."""
        return self.name if "://" in self.name else self.name.partition(":")[2]

    @property
    def shares(self) -> bool:
        """Whether there is more than one process."""
        return self.kind != LOCAL or (self.workers or 1) > 1


def under_torchrun() -> bool:
    """Whether this process is one of several that torchrun started."""
    count = os.environ.get("WORLD_SIZE", "1")
    return count.isdecimal() and int(count) > 1
