"""`python -m patchrank.benchmark`; the command itself stands in `command`, where others can import it."""

from patchrank.benchmark.command import main
from patchrank.utils.command import run_command

if __name__ == "__main__":
    run_command(main)
