"""The house has floors: a room imports from the rooms below it, never from those above."""

import ast
from pathlib import Path

import pytest

import ecodiff

PACKAGE = Path(ecodiff.__file__).parent
# Each floor knows those before it. A stage may also use stages that come before it.
FLOORS = [
    ["runtime"],
    ["config"],
    ["models"],
    ["trajectory"],
    ["toys"],
    ["prompts"],
    ["calibrate"],
    ["mask"],
    ["prune"],
    ["retrain"],
    ["generate"],
    ["evaluate"],
    ["report"],
    ["cli"],
]
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path):
    """The rooms of the package that a file imports, at its top or within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("ecodiff.")}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))
HOUSE = [path for path in FILES if path.parent != PACKAGE or room_of(path) in HEIGHT]


def test_every_file_lies_on_a_floor():
    doors = {"__init__", "__main__"}  # they lead to all rooms
    assert {room_of(path) for path in FILES} - doors == HEIGHT.keys()


@pytest.mark.parametrize("path", HOUSE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_runs_upwards(path):
    height = HEIGHT[room_of(path)]
    upwards = {room for room in imported_rooms(path) if HEIGHT[room] > height}
    assert not upwards


def test_no_module_imports_relatively():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path
