"""How commands end: their exit status, and one line for whatever the user can mend."""

from __future__ import annotations

import sys
from collections.abc import Callable

from patchrank.utils.errors import UserError


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command: 0 done, 1 as it says, 2 bad input in one line, 130 interrupted."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        code = 130
    sys.exit(code or 0)
