"""What README promises is what CI runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [block.strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S)]


def test_ci_runs_the_readmes_test_command():
    ci = (ROOT / ".ci/run").read_text()
    extract = next(line for line in ci.splitlines() if line.startswith("command="))
    found = subprocess.run(
        ["bash", "-c", f'{extract}; echo "$command"'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == COMMANDS[1]
    assert 'bash -euo pipefail -c "$command"' in ci


def test_both_commands_set_themselves_up():
    for command, last in zip(COMMANDS, ["-m patchrank.tune sweeps/locations.yaml", "-m pytest"]):
        steps = [step.strip() for step in command.split("&&")]
        assert steps[0] == "python3 -m venv .venv" and steps[1].startswith(".venv/bin/pip install -e ")
        assert steps[2].endswith(last)


def anchors(page: str) -> set[str]:
    """What a link may name in a page, as GitHub makes it from headings."""
    headings = re.findall(r"^#+ (.+)$", page, re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_everything_that_is_linked_is_there(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / page).read_text()):
        name, _, anchor = target.partition("#")
        found = (ROOT / page).parent / name if name else ROOT / page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found.read_text()), target


STAGES = ["golden", "fit", "evaluate", "prompt", "tune", "visualize", "benchmark", "retrieval"]


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_that_readme_shows_exists(stage):
    shown = {word for line in README.splitlines() if f"patchrank.{stage}" in line for word in line.split()}
    command = [sys.executable, "-m", f"patchrank.{stage}", "--help"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    flags = {word.strip("`,") for word in shown if word.startswith(("--", "`--"))}
    assert flags and all(flag in known for flag in flags)
