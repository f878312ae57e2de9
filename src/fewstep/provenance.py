"""What made a result: the versions of the software, and the machine."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["VERSION", "machine", "machine_line", "software_line"]

VERSION = "0.1.0"  # pyproject.toml has the same


def machine() -> dict[str, Any]:
    """The processor, the threads and the versions, JSON-ready."""
    import platform
    import re

    import torch

    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            text = file.read()
        name = (re.findall(r"model name\s*:\s*(.+)", text) or [name])[0]
    except OSError:
        pass
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def software_line() -> str:
    """The versions, in words."""
    import platform

    import torch

    python = platform.python_version()
    return f"fewstep {VERSION}, torch {torch.__version__}, Python {python}"


def machine_line() -> str:
    """The machine, in words."""
    import platform

    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    counts = (_count(cores or 1, "core"), _count(torch.get_num_threads(), "thread"))
    return ", ".join((f"{platform.system()} {platform.machine()}", *counts))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)
