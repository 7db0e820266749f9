"""Every test of this folder forces the kernels; on a machine with a GPU it belongs to `-m gpu`."""

from pathlib import Path

import pytest

import clvp_fast
from tests.kernels.device import DEVICE


def pytest_collection_modifyitems(items):
    if DEVICE == "cuda":
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def forced_kernels():
    with clvp_fast.backend("kernel"):
        yield
