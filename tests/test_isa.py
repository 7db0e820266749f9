"""The choice of a CPU's instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clvp_fast import native

pytestmark = pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def restored():
    before = native.isa()
    yield
    native.choose_isa(before)


def test_the_best_comes_first_and_portable_is_always_there():
    native.choose_isa(None)
    usable = native.isas()
    assert native.isa() == usable[0]
    assert usable[-1] == "portable"
    assert usable == tuple(name for name in native.ISAS if name in usable)


def test_each_that_the_cpu_has_can_be_chosen():
    for name in native.isas():
        native.choose_isa(name)
        assert native.isa() == name


def test_an_unknown_name_is_refused_and_changes_nothing():
    native.choose_isa("portable")
    with pytest.raises(ValueError, match=r"must be one of avx512bf16, .*portable, not 'sse'"):
        native.choose_isa("sse")
    assert native.isa() == "portable"


@pytest.mark.parametrize(
    "name, says",
    [("portable", "portable\n"), ("SSE", "CLVP_FAST_ISA must be one of avx512bf16, avx512vnni, avx512, avx")],
)
def test_the_environment_chooses(name, says):
    code = "from clvp_fast import native; print(native.isa())"
    env = os.environ | {"CLVP_FAST_ISA": name, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert says in done.stdout + done.stderr
