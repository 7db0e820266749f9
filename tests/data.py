"""Where tests find real speech and the real vocabulary; absent data skips a test, saying why."""

import os
from pathlib import Path

import pytest

_FOLDER = Path(os.environ.get("CLVP_FAST_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def data_path(name: str) -> Path:
    """The file `name` of the test data folder (`CLVP_FAST_TEST_DATA`), or a skip that says what is missing."""
    path = _FOLDER / name
    if not path.exists():
        pytest.skip(f"real test data is absent: {name} (set CLVP_FAST_TEST_DATA to the folder that holds it)")
    return path
