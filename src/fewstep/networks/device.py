"""Where a network computes, and in what arithmetic."""

from __future__ import annotations

import torch

__all__ = ["check_device", "check_dtype"]

DTYPES = ("float32", "bfloat16", "float16")


def check_device(name: str | torch.device) -> torch.device:
    """The device of that name, tried out.

    Raises:
        ValueError: it is unknown, absent, or holds no numbers (meta).
    """
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        raise ValueError(
            f"device {str(name)!r} is not available: {str(error).partition(chr(10))[0]}"
        ) from None
    return device


def check_dtype(name: str | torch.dtype) -> torch.dtype:
    """The arithmetic of that name.

    Raises:
        ValueError: for another than DTYPES.
    """
    text = str(name).removeprefix("torch.")
    if text not in DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {text!r}")
    return getattr(torch, text)
