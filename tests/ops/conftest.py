"""The fixture over which an operator's cases run."""

import pytest

import clvp_fast
from clvp_fast import native
from tests.kit.isa import run_on


@pytest.fixture
def backend(request):
    """Give a `Backend` of tests/kit/backends.py, forced, on its instruction set; the mark `on` there names it."""
    if request.param.isa:
        run_on(request, request.param.isa)
    with clvp_fast.backend(request.param.forced):
        yield request.param


@pytest.fixture
def cuda_part(backend, request):
    """Skip a GPU's cases of the native library's CUDA part, with the reason, where it is missing.

    Those that are interpreted run what it compiles to, by the fixture of tests/ptx/plugin.py.
    """
    if backend.name == "interpreted":
        request.getfixturevalue("cuda_as_ptx")
    if backend.name == "gpu" and (reason := native.missing("cuda")):
        pytest.skip(reason)
