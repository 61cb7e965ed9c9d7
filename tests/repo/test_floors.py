"""Imports go down only, from the floors that the table in docs/contributing.md gives to the rooms of the house."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "patchrank"
MOST_ROOMS, MOST_FLOORS, LONGEST_FILE = 21, 9, 330
ROW = re.compile(r"^\| (\d+) \| `(\w+)` \|.*\| ([^|]*)\|$", re.M)
TABLE = ROW.findall((ROOT / "docs/contributing.md").read_text())
FLOORS = {room: int(floor) for floor, room, _ in TABLE}
OWNERS = {library: room for _, room, libraries in TABLE for library in re.findall(r"\w+", libraries)}


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


@cache
def imports_of(module: str) -> tuple[str, ...]:
    return tuple(imported(FILES[module].read_text()))


def imported(source: str) -> Iterator[str]:
    """Every module that a file imports, those inside functions among them; of `from a import b` it is `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def our_module(name: str) -> str:
    """The module that a dotted name lies in: names that are no module belong to the one before."""
    while name not in FILES:
        name = name.rpartition(".")[0]
    return name


def room_of(module: str) -> str | None:
    """None for the package itself and its list of stages, which stand on no floor."""
    room = f"{module}.".split(".")[1]
    return None if room in ("", "__main__") else room


def arrows() -> Iterator[tuple[str, str]]:
    """Pairs of modules, the first of which imports the second."""
    for module in FILES:
        own = {our_module(name) for name in imports_of(module) if name.partition(".")[0] == PACKAGE.name}
        yield from ((module, other) for other in own if other != module)


def breaks(source: str, target: str) -> bool:
    """Whether an import from a module of one room in one of another does not go down."""
    rooms = room_of(source), room_of(target)
    return None not in rooms and rooms[0] != rooms[1] and FLOORS[rooms[0]] <= FLOORS[rooms[1]]


def test_the_table_has_every_room_and_no_other():
    assert set(FLOORS) == {room_of(module) for module in FILES} - {None}
    assert len(FLOORS) == len(TABLE) <= MOST_ROOMS
    assert sorted(set(FLOORS.values())) == list(range(1, MOST_FLOORS + 1))


def test_modules_that_the_page_names_are_there():
    page = (ROOT / "docs/contributing.md").read_text()
    rows = re.findall(r"^\| \d+ \| `(\w+)` \| ([^|]*)", page, re.M)
    named = {f"patchrank.{room}.{module}" for room, text in rows for module in re.findall(r"`(\w+)`", text)}
    paths = re.findall(
        r"`(\w+(?:/\w+)*/\w+\.py|\w+\.py)`", page.partition("The way of one image")[2].partition("A component")[0]
    )
    missing = [name for name in named if name not in FILES] + [path for path in paths if not (PACKAGE / path).is_file()]
    assert named and paths and missing == []


def test_imports_go_down_only():
    assert [f"{source} -> {target}" for source, target in arrows() if breaks(source, target)] == []


def test_the_tests_here_can_fail():
    assert breaks("patchrank.models.clip", "patchrank.data.splits") and breaks("patchrank.io", "patchrank.tune.plan")
    assert list(imported("def f():\n    from patchrank.tune import plan")) == ["patchrank.tune.plan"]


def test_no_module_imports_itself_by_way_of_others():
    """A package's `__init__` names modules of its room for people, so arrows to and from it are left out."""
    graph = {module: set() for module in FILES}
    for source, target in arrows():
        if "__init__.py" not in (FILES[source].name, FILES[target].name):
            graph[source].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("library", sorted(OWNERS))
def test_libraries_are_imported_where_the_table_says(library):
    users = {room_of(module) for module in FILES for name in imports_of(module) if name.partition(".")[0] == library}
    assert users == {OWNERS[library]}


def test_files_are_short_enough_to_be_read_at_once():
    long = {module: len(file.read_text().splitlines()) for module, file in FILES.items()}
    assert {module: lines for module, lines in long.items() if lines > LONGEST_FILE} == {}
