"""What README promises is what CI runs."""

import math
import pkgutil
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import patchrank

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
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


@pytest.mark.parametrize("page", ["README.md", *(str(path.relative_to(ROOT)) for path in DOCS.rglob("*.md"))])
def test_everything_that_is_linked_is_there(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / page).read_text()):
        name, _, anchor = target.partition("#")
        found = (ROOT / page).parent / name if name else ROOT / page
        assert found.exists(), target
        assert page == "README.md" or found.resolve().is_relative_to(DOCS), f"{target} is not on the site"
        assert not anchor or anchor in anchors(found.read_text()), target


PAGES = [page for page in (ROOT / "README.md", *DOCS.glob("*.md")) if page.name != "log.md"]  # of its day
NAMES = sorted({name for page in PAGES for name in re.findall(r"(?<!/)\bpatchrank(?:\.[a-z]\w*)+", page.read_text())})
FILES = sorted({name for page in PAGES for name in re.findall(r"\bpatchrank/[\w/]+\.\w+", page.read_text())})
INSIDE = sorted({name for page in PAGES for name in re.findall(r"`(\w+/[\w/]*(?:\.py)?)`", page.read_text())})


@pytest.mark.parametrize("name", NAMES)
def test_every_name_in_python_that_is_told_is_there(name):
    assert pkgutil.resolve_name(name)


def test_every_file_of_the_package_that_is_told_is_there():
    assert FILES and [name for name in FILES if not (ROOT / name).is_file()] == []


def test_every_file_that_is_told_by_its_room_is_there():
    rooms = {path.name for path in (ROOT / "patchrank").iterdir()}
    told = [name for name in INSIDE if name.split("/")[0] in rooms]
    assert len(told) > 10 and [name for name in told if not (ROOT / "patchrank" / name).exists()] == []


def test_readme_fits_on_three_screens():
    """Of 50 lines of 110 characters, as they are displayed."""
    assert sum(max(1, math.ceil(len(line) / 110)) for line in README.splitlines()) <= 150


def test_the_api_page_has_every_public_name_and_no_other():
    page = (DOCS / "api.md").read_text()
    shown = re.findall(r"^::: (\S+)\.(\w+)\n    options: \{heading: patchrank\.(\w+)\}$", page, re.M)
    assert {title: module for module, name, title in shown if name == title} == patchrank.PUBLIC


STAGES = "recipe golden fit repair evaluate prompt tune visualize benchmark retrieval export".split()
TOLD = [told for page in PAGES for told in re.findall(r"python -m patchrank\.(\w+)([^`\n]*)", page.read_text())]


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_that_is_told_exists(stage, monkeypatch, capsys):
    """Of all commands, in this very process: importing torch for each would take a minute."""
    shown = {word for command, words in TOLD if command == stage for word in words.split()}
    monkeypatch.setattr(sys, "argv", [stage, "--help"])
    with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that the module was imported before
        runpy.run_module(f"patchrank.{stage}", run_name="__main__")
    known = capsys.readouterr().out
    assert ended.value.code == 0
    flags = {word for word in shown if word.startswith("--")}
    assert flags and all(flag in known for flag in flags)
