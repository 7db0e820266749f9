"""The CPU's kernels on one instruction set, where the library would take the machine's best."""

import pytest

from clvp_fast import native
from tests.kit.isa import expected_isas, why_no_library

ABSENT = why_no_library()


def run_on(request: pytest.FixtureRequest) -> None:
    """Let the test run on the instruction set that is its fixture's parameter; skips it where this machine has none."""
    if request.param not in expected_isas():
        pytest.skip(f"this CPU has no {request.param}")
    before = native.isa()
    request.addfinalizer(lambda: native.choose_isa(before))
    native.choose_isa(request.param)
