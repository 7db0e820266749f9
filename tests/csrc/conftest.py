"""Every test of this folder compiles a program with g++."""

import shutil
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    if shutil.which("g++") is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="there is no g++"))
