"""Every dependency has a lower bound, and docs/contributing.md says what the tests passed with at that bound."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
ROWS = re.findall(r"\| ([\w.-]+) \| ([\d.]+) \| [\d.]+ (?=\|)", (ROOT / "docs/contributing.md").read_text())


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Name and lower bound of each, those of our own extras among them; an empty bound where there is none."""
    for line in lines:
        name, extras, rest = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?([^;]*)", line).groups()
        if canonical(name) == PROJECT["name"]:
            for extra in extras.split(","):
                yield from requirements(EXTRAS[extra])
        else:
            found = re.match(r">=([\d.]+)", rest)
            yield canonical(name), found[1] if found else ""


def test_every_dependency_has_a_lower_bound():
    lists = {"dependencies": PROJECT["dependencies"], **EXTRAS}
    without = [f"{key}: {name}" for key, lines in lists.items() for name, bound in requirements(lines) if not bound]
    assert without == [], "try one that .ci/versions.py passes with"


def test_the_table_has_every_tested_package_at_its_bound():
    for_all = [line for line in EXTRAS["test"] if ";" not in line]  # the others want a newer Python than the oldest
    bounds = dict(requirements([*PROJECT["dependencies"], *for_all]))
    oldest = {canonical(name): version for name, version in ROWS}
    assert bounds.keys() == oldest.keys() - {"python"}, "try .ci/versions.py, which prints that table"
    assert [name for name, bound in bounds.items() if not f"{oldest[name]}.".startswith(f"{bound}.")] == []
