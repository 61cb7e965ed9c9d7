"""What commands tell while they still import their libraries. Imports next to nothing, so that it comes early."""

from __future__ import annotations

import os
import sys

INTERRUPTED = "interrupted; the same command goes on from here"


def begin_command() -> None:
    """Has Ctrl-C told in one line from now on, and a working directory that was removed, where torch does not load."""
    sys.excepthook = _tell
    try:
        os.getcwd()
    except OSError as error:
        print(f"error: working directory: {error.strerror}; try cd to another", file=sys.stderr)
        sys.exit(2)


def _tell(kind, error, traceback) -> None:
    """Stands in for `sys.excepthook`: all but Ctrl-C shows its traceback, as ever."""
    if issubclass(kind, KeyboardInterrupt):
        print(INTERRUPTED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
