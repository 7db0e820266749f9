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
    """Tests of a CPU's kernels are in files of their own, or say so by a fixture; compiling and emulating need none."""
    of_cpu = item.path.stem.endswith("_cpu") or "on_cpu" in item.fixturenames
    return not (
        of_cpu or item.path.stem in ("test_compiled", "test_matrix_unit") or _parameters(item).get("path") == "cpu"
    )


def _parameters(item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}


@pytest.fixture(autouse=True)
def forced_kernels():
    with clvp_fast.backend("kernel"):
        yield
