"""The order of tests: the slowest files first, so that no process is left alone with them."""

from collections import Counter

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by file, by how many slow tests it has; within a file nothing changes."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    whole_runs = {"test_workflow_files.py": 1000, "test_workflow.py": 500}
    items.sort(key=lambda item: (-whole_runs.get(item.path.name, slow[item.path]), item.path))
