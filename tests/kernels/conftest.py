"""Every test of this folder forces the kernels; on a machine with a GPU those that run there belong to `-m gpu`."""

from pathlib import Path

import pytest

import clvp_fast
from tests.kit.device import DEVICE


def pytest_collection_modifyitems(items):
    if DEVICE == "cuda":
        for item in items:
            if Path(__file__).parent in item.path.parents and _runs_there(item):
                item.add_marker(pytest.mark.gpu)


def _runs_there(item) -> bool:
    """Let tests of threads run on a CPU; compiling and emulating need no GPU."""
    return item.path.stem not in ("test_compiled", "test_matrix_unit", "test_threads_cpu")


@pytest.fixture(autouse=True)
def forced_kernels():
    with clvp_fast.backend("kernel"):
        yield
