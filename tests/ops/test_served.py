"""A CPU's kernels are used where the documents say so; a fault that refuses everything is seen here."""

import pytest
import torch

import clvp_fast
from clvp_fast import native, ops
from clvp_fast.ops import many_rows
from clvp_fast.ops.dispatch import OPERATORS
from tests.kit import isa, random

# Blocks of linear layers have a kernel where those have one.
LAYERS = ("linear", "gelu_mlp", "geglu_mlp", "window_block", "mlp_block")


def test_the_library_is_there_where_it_can_be_built():
    assert isa.why_no_library() is not None or native.missing("cpu") is None, native.missing("cpu")


@isa.needs_library
def test_the_library_takes_the_cpu_s_best_or_the_forced_one():
    assert native.isas() == isa.expected_isas()
    assert native.isa() == isa.expected_isa()


@pytest.mark.parametrize("name", [*LAYERS, "log_mel", "sample", "paged_attention_decode", "window_attention"])
def test_a_kernel_serves_where_the_documents_say(name):
    (choice,) = clvp_fast.explain(name, "cpu")
    assert choice.backend == ("torch" if isa.why_unserved("linear" if name in LAYERS else name) else "kernel"), choice


@isa.needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_are_served_where_the_documents_say(dtype):
    x, weight = random(600, 64, seed=0, dtype=dtype), random(96, 64, seed=1, dtype=dtype)
    assert (many_rows.unserved(x, "gelu_new", weight) is None) == (isa.why_unserved("many rows", dtype) is None)


@pytest.mark.parametrize("rows", [3, 600])
def test_without_the_library_torch_s_products_serve(rows, monkeypatch):
    def absent():
        raise native.NativeLibraryError("there is no C++ compiler")

    monkeypatch.setattr(native, "missing", lambda device_type: "there is no C++ compiler")
    monkeypatch.setattr(native, "library", absent)
    for name in LAYERS:
        monkeypatch.setattr(OPERATORS[name], "_refusals", {})
    x, weight = random(rows, 64, seed=0), random(96, 64, seed=1)
    torch.testing.assert_close(ops.linear(x, weight, None), x @ weight.T)
    back, bias = random(64, 96, seed=2), random(64, seed=3)
    found = ops.gelu_mlp(x, weight, torch.zeros(96), back, bias, activation="relu")
    torch.testing.assert_close(found, (x @ weight.T).relu() @ back.T + bias)
