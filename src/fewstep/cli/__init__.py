"""The command line. Every command parses, calls the library, and shows; nothing is computed
here."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line; whatever goes wrong is one line on standard error, and exit code 2."""
    try:
        from fewstep.cli.streams import open_streams, stop_on_sigterm

        open_streams()
        with stop_on_sigterm():
            from fewstep.cli.run import run

            code = run(sys.argv[1:])
    except KeyboardInterrupt as stopped:
        os.write(2, b"fewstep: stopped; what was finished is kept\n")
        code = getattr(stopped, "code", 130)
    except Exception as error:  # while importing: the last resort of `run` was not there yet
        if os.environ.get("FEWSTEP_DEBUG") or "--traceback" in sys.argv:
            raise
        print(f"fewstep: {type(error).__name__}: {error!s:.500}", file=sys.stderr)
        code = 2
    sys.exit(code)
