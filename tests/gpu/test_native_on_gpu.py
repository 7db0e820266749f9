"""The native library's CUDA part is there, built if need be, before the tests that call it: `make gpu-check`."""

import pytest

from clvp_fast import native

pytestmark = pytest.mark.gpu


def test_the_cuda_part_can_be_had():
    assert native.missing("cuda") is None
