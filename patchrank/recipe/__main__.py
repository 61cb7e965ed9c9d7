"""`python -m patchrank.recipe`."""

from patchrank.recipe.command import main
from patchrank.utils.command import run_command

if __name__ == "__main__":
    run_command(main)
