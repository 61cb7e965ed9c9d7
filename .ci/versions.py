#!/usr/bin/env python3
"""Runs the default tests with the oldest versions that pyproject.toml allows and with the newest, and prints a table.

    python3 .ci/versions.py [oldest] [newest]      (default: both, one after the other)

Each gets an environment of its own from the package index: 7 GB, removed once its tests have run. `oldest` takes every
package that pyproject.toml names, those of the extra `test` among them, at its lower bound; `newest` the last release
of each. The table, for docs/contributing.md, goes to standard output, and all else to standard error.

PYTHON_OLDEST, PYTHON_NEWEST: interpreters (default: python3.10, and the newest python3.X on PATH that runs).
ENVIRONMENTS: the folder for the environments (default: that for temporary files).
KEEP=1: leaves them there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RESOLUTION = {"oldest": "lowest-direct", "newest": "highest"}  # what uv calls them
CANDIDATES = {"oldest": ["python3.10"], "newest": [f"python3.{minor}" for minor in range(30, 9, -1)]}
NAMES = """
import json, platform, re
from importlib.metadata import PackageNotFoundError, requires, version
found = {"Python": platform.python_version()}
for name in dict.fromkeys(re.match(r"[\\w.-]+", line)[0] for line in requires("patchrank-clip")):
    try:
        found[name] = version(name)
    except PackageNotFoundError:  # of an extra that tests do without
        pass
found.pop("patchrank-clip", None)  # an extra may be made of others
print(json.dumps(found))
"""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(*command: str | Path, check: bool = True, **more) -> subprocess.CompletedProcess:
    """Runs a command in the repository. What it prints goes to standard error, unless `more` says where else."""
    say("+ " + " ".join(map(str, command))[:200])
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=clean, **{"stdout": sys.stderr} | more)
    if check and done.returncode != 0:
        sys.exit(f"error: that ended with status {done.returncode}")
    return done


def find_python(which: str) -> str:
    """The interpreter for `oldest` or `newest`. Ends the script where there is none."""
    variable = f"PYTHON_{which.upper()}"
    names = [os.environ[variable]] if os.environ.get(variable) else CANDIDATES[which]
    for path in filter(None, map(shutil.which, names)):
        told = subprocess.run([path, "--version"], capture_output=True, text=True)
        if told.returncode == 0:
            say(f"{which}: {path}, {told.stdout.strip()}")
            return path
    sys.exit(f"error: none of {', '.join(names)} runs; try {variable}=/path/to/python")


def build(which: str, python: str, folder: Path) -> Path:
    """Makes an environment with this repository in it. Returns its interpreter."""
    run(python, "-m", "venv", "--clear", folder)
    inside = folder / "bin" / "python"
    run(inside, "-m", "pip", "install", "--quiet", "uv")
    uv = [folder / "bin" / "uv", "pip", "install", "--python", inside]
    run(*uv, "--resolution", RESOLUTION[which], "-r", "pyproject.toml", "--extra", "test")
    run(*uv, "--no-deps", "-e", ".")
    return inside


def test(python: Path, report: Path) -> dict[str, str]:
    """Runs the default tests. Returns how many did what, as rows of the table."""
    start = time.monotonic()
    run(python, "-m", "pytest", "-q", f"--junitxml={report}", check=False)
    if not report.is_file():
        return {"failed": "all: pytest did not start"}
    counts = {key: 0 for key in ("tests", "failures", "errors", "skipped")}
    for suite in ElementTree.parse(report).iter("testsuite"):
        counts = {key: number + int(suite.get(key, 0)) for key, number in counts.items()}
    tests, *others = counts.values()
    return {
        "passed": f"{tests - sum(others):,}",
        "skipped": str(counts["skipped"]),
        "failed": str(counts["failures"] + counts["errors"]),
        "minutes": f"{(time.monotonic() - start) / 60:.0f}",
    }


def column(which: str, folder: Path) -> dict[str, str]:
    """The table's column for `oldest` or `newest`: versions, then what the tests did."""
    try:
        python = build(which, find_python(which), folder / which)
        versions = json.loads(run(python, "-c", NAMES, stdout=subprocess.PIPE).stdout)
        return versions | {f"tests {key}": value for key, value in test(python, folder / f"{which}.xml").items()}
    finally:
        if not os.environ.get("KEEP"):
            shutil.rmtree(folder / which, ignore_errors=True)


def markdown(columns: dict[str, dict[str, str]]) -> str:
    """A row for each package, in two halves side by side."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(column.get(name, "") for column in columns.values())] for name in names]
    half = -(-len(rows) // 2)
    rows.append([""] * len(rows[0]))  # stands beside the last of an odd number
    lines = [["", *columns] * 2, ["---"] * 2 * len(rows[0]), *(left + right for left, right in zip(rows, rows[half:]))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(wanted: list[str]) -> int:
    if unknown := set(wanted) - {*RESOLUTION}:
        sys.exit(f"error: {', '.join(unknown)}: try oldest or newest")
    folder = Path(os.environ.get("ENVIRONMENTS") or tempfile.mkdtemp(prefix="versions-"))
    folder.mkdir(parents=True, exist_ok=True)
    columns = {which: column(which, folder) for which in wanted or RESOLUTION}
    print(markdown(columns))
    return int(any(column["tests failed"] != "0" for column in columns.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
