"""`python -m patchrank.report runs/scores runs/locations --out docs/ablations`: an index of finished sweeps."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from patchrank.report.index import write_index
from patchrank.utils.command import create_parser, run_command


def main(argv: Sequence[str] | None = None) -> None:
    parser = create_parser("report", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folder or URL that a sweep was written to")
    parser.add_argument("--out", required=True, help="folder of the copies and their README.md")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "-m", "patchrank.report", *(sys.argv[1:] if argv is None else argv)])
    print(f"index: {write_index(args.runs, args.out, command)}")


if __name__ == "__main__":
    run_command(main)
