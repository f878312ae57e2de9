"""Memory that is free goes back to the system.

Tensors of many sizes, freed by several threads, leave free memory between what is in use. glibc
keeps it, so a service under load seems to grow by some 0.5 MB a second. `malloc_trim` returns it.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

__all__ = ["settle", "tended"]

SECONDS = 5.0  # between two sweeps; each takes milliseconds


def settle() -> None:
    """What is there now stays: later sweeps for what comes and goes need not look at it."""
    gc.collect()
    gc.freeze()


@asynccontextmanager
async def tended() -> AsyncIterator[None]:
    """Inside, free memory is returned every few seconds, where the C library can do that."""
    trim = None
    with suppress(OSError, TypeError):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    async def tend() -> None:
        while trim is not None:
            await asyncio.sleep(SECONDS)
            await asyncio.to_thread(trim, 0)

    task = asyncio.create_task(tend())
    try:
        yield
    finally:
        task.cancel()
