import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_ruff_has_nothing_to_say():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", ROOT], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
