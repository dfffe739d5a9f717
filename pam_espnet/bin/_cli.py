"""What every command line shares: user errors without a stack trace, Ctrl-C, the log format."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from pam_espnet.errors import PamError


def run_main(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Call ``main(argv)``; return the process's exit status.

    A ``PamError`` is printed as its message alone (status 1); Ctrl-C gives status 130; any other exception is a
    bug and keeps its stack trace.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"
    )
    try:
        return main(argv) or 0
    except PamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
