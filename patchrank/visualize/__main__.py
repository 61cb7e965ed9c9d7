"""Nothing but a door, as in `patchrank.tune`."""

from patchrank.cli.flags import run_command
from patchrank.visualize.command import main

if __name__ == "__main__":
    run_command(main)
