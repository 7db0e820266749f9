"""The place of real speech and the real vocabulary; a test without its data skips, and says why."""

import os
from pathlib import Path

import pytest

_FOLDER = Path(os.environ.get("CLVP_FAST_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def data_path(name: str) -> Path:
    """Return the file `name` of the test data folder (`CLVP_FAST_TEST_DATA`), or skip with a sentence on the lack."""
    path = _FOLDER / name
    if not path.exists():
        pytest.skip(f"real test data is absent: {name} (set CLVP_FAST_TEST_DATA to the folder that holds it)")
    return path
