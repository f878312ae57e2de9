"""The command line. Every command parses, calls the library, and shows; nothing is computed
here."""

from __future__ import annotations

import os
import sys
from typing import Any

from fewstep.cli import demo, sample, train  # noqa: F401  (each registers its commands)
from fewstep.cli.app import app

__all__ = ["app", "main"]


def main() -> Any:
    """Run the command line; what a user can mend is one line and exit code 2."""
    try:
        app()
    except KeyboardInterrupt:
        print("fewstep: stopped; what was finished is kept", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ArithmeticError) as error:
        if os.environ.get("FEWSTEP_DEBUG"):
            raise
        message = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {error.strerror}"
        print(f"fewstep: {message}", file=sys.stderr)
        sys.exit(2)
