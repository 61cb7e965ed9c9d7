"""How commands read what they are given, and how they end: with an exit status, and one line on what was wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from patchrank.utils.errors import UserError


class _Parser(argparse.ArgumentParser):
    """Tells what does not fit in one line, without the usage, which fills a screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message.removeprefix('argument ')}; try --help\n")


def create_parser(stage: str, description: str) -> argparse.ArgumentParser:
    """The parser of `python -m patchrank.STAGE`, which shows its description as it is written."""
    formatter = argparse.RawDescriptionHelpFormatter
    return _Parser(prog=f"python -m patchrank.{stage}", description=description, formatter_class=formatter)


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
