"""The log of a training: a line of JSON for each validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewstep.files import write_whole

__all__ = ["LOG", "Log"]

LOG = "log.jsonl"


class Log:
    """path: None keeps the lines in memory alone."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []

    def read(self, step: int) -> None:
        """Take up what is there, as far as `step`.

        Raises:
            ValueError: that names the file, where it is no such log.
        """
        self.lines = []
        try:
            if self.path is None or not self.path.exists():
                return
            for text in self.path.read_text(encoding="utf-8").split("\n")[:-1]:
                line = json.loads(text)
                if not isinstance(line["step"], int):
                    raise TypeError("a step is no integer")
                if line["step"] <= step:
                    self.lines.append(line)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.path} is not a training log ({error!r:.80}); move it away"
            ) from None

    def add(self, line: dict[str, Any]) -> None:
        """Raises: OSError that names the file, where it cannot be written."""
        self.lines.append(line)
        if self.path is not None:
            text = "".join(json.dumps(one) + "\n" for one in self.lines)
            write_whole(self.path, text.encode())

    def latest(self, step: int) -> dict[str, Any]:
        """The validation of that step, if it was the last one; else empty."""
        line = self.lines[-1] if self.lines else {}
        return line if line.get("step") == step else {}
