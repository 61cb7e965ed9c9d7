"""How commands read what they are given, and how they end: with an exit status, and one line on what was wrong."""

from __future__ import annotations

import argparse
import atexit
import codecs
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from patchrank.utils.errors import UserError, is_out_of_memory, one_line
from patchrank.utils.startup import INTERRUPTED


class _Parser(argparse.ArgumentParser):
    """Tells what does not fit in one line, without the usage, which fills a screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message.removeprefix('argument '))}; try --help\n")


def create_parser(stage: str, description: str) -> argparse.ArgumentParser:
    """The parser of `python -m patchrank.STAGE`, which shows its description as it is written."""
    formatter = argparse.RawDescriptionHelpFormatter
    return _Parser(prog=f"python -m patchrank.{stage}", description=description, formatter_class=formatter)


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command: 0 done, 1 as it says, 2 bad input in one line, 130 interrupted.

    Bad input is a `UserError`, an error of the operating system (a full disk, a file that may not be read) or memory
    that ran out. Any other error is a fault of ours and shows its traceback.
    """
    _open_streams()
    try:
        code = main()
        _flush_stdout()
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        code = 130
    except Exception as error:
        if (line := _told(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        code = 2
    with suppress(UserError):
        _flush_stdout()
    # all is said, so a second Ctrl-C must not interrupt what libraries tidy up at the end, which tells of it at length
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    sys.exit(code or 0)


def _told(error: Exception) -> str | None:
    """What a user is told of an error that he can do something about; None for one of ours."""
    if isinstance(error, UserError):
        return one_line(error)
    if is_out_of_memory(error):
        return f"out of memory ({one_line(error)[:160]}); try a smaller --batch-size or --limit"
    if isinstance(error, OSError) and error.errno is not None:
        place = "" if error.filename is None else f"{error.filename}: "
        return one_line(f"{place}{error.strerror}")
    return None


def _open_streams() -> None:
    """Lets any text be printed, and replaces streams that were closed before we began."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    codecs.register_error("patchrank", _printable)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="patchrank")


def _printable(error: UnicodeError) -> tuple[str | bytes, int]:
    """File names that are no text are printed as the bytes that they are; what an encoding lacks, by its number."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def _flush_stdout() -> None:
    """Writes out what was printed, while there is still somebody to say what is wrong, and the name of the place.

    Raises:
        UserError: stdout is a full disk, or a pipe whose reader has gone; nothing more is written there.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # or Python would try again at its end
        raise UserError(f"stdout: {error.strerror}; try --out, where there is one") from error
