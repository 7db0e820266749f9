"""The CPU's kernels on one instruction set, where the library would take the machine's best."""

import ctypes

import pytest

from clvp_fast import native

ABSENT = native.missing("cpu")


class _OnIsa:
    """The library, with an instruction set named in every call of its functions for a CPU."""

    def __init__(self, library: ctypes.CDLL, name: bytes):
        self._library, self._name = library, name

    def __getattr__(self, function: str):
        found = getattr(self._library, function)
        return (lambda *args: found(*args[:-1], self._name)) if function.endswith("_cpu") else found


def run_on(isa: str, monkeypatch) -> None:
    """Let all calls of the test run on `isa`; skips it where this machine has none."""
    library, name = native.library(), isa.encode()
    if library.clvp_fast_linear_cpu(ctypes.byref(native.LinearCall(in_features=32)), 1, name) == -8:
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setattr(native, "library", lambda: _OnIsa(library, name))
