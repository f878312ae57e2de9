"""fewstep inside other programs. Each module here needs the library that it is called after."""

from __future__ import annotations

__all__: list[str] = []
