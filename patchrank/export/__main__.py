"""`python -m patchrank.export`. With `--image` it needs no torch, so that is not imported then."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from patchrank.utils.command import run_command
from patchrank.utils.errors import UserError

IMAGE = ("--image", "--imag", "--ima")  # the flag, and what argparse takes for it


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(word.partition("=")[0] in IMAGE for word in argv):
        from patchrank.export.answers import main as print_answers

        return print_answers(argv)
    if find_spec("torch") is None:
        raise UserError("torch is not installed here; without it try --check FILE.onnx --image FILE, and nothing else")
    from patchrank.export.command import main as export_or_check

    return export_or_check(argv)


if __name__ == "__main__":
    run_command(main)
