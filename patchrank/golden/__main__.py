from patchrank.cli.flags import run_command
from patchrank.golden.scores import main

if __name__ == "__main__":
    run_command(main)
