"""A CPU's kernels are used where the documents say so; a fault that refuses everything is seen here."""

import warnings

import pytest
import torch

import clvp_fast
from clvp_fast import backend, native, ops
from clvp_fast.ops import many_rows
from clvp_fast.ops.dispatch import OPERATORS
from tests.kit import PagePool, isa, operators, random

# Blocks of linear layers have a kernel where those have one.
LAYERS = ("linear", "gelu_mlp", "geglu_mlp", "window_block", "mlp_block")


def test_the_library_is_there_where_it_can_be_built():
    assert isa.why_no_library() is not None or native.missing("cpu") is None, native.missing("cpu")


@isa.needs_library
def test_the_library_takes_the_cpu_s_best_or_the_forced_one():
    assert native.isas() == isa.expected_isas()
    assert native.isa() == isa.expected_isa()


@pytest.mark.parametrize(
    "name",
    [*LAYERS, "log_mel", "sample", "paged_attention_decode", "paged_prefill", "rotary_attention", "window_attention"],
)
def test_a_kernel_serves_where_the_documents_say(name):
    (choice,) = clvp_fast.explain(name, "cpu")
    assert choice.backend == ("torch" if isa.why_unserved("linear" if name in LAYERS else name) else "kernel"), choice


@isa.needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_are_served_where_the_documents_say(dtype):
    x, weight = random(600, 64, seed=0, dtype=dtype), random(96, 64, seed=1, dtype=dtype)
    assert (many_rows.unserved(x, "gelu_new", weight) is None) == (isa.why_unserved("many rows", dtype) is None)


@pytest.mark.parametrize("head_dim", [16, 24, 128, 144])
def test_a_decode_step_of_any_head_dim(head_dim, monkeypatch):
    """Serve multiples of 16 up to 128 by the kernel, and others by torch with a warning."""
    served = head_dim in (16, 128) and isa.why_unserved("paged_attention_decode") is None
    operator = OPERATORS["paged_attention_decode"]
    calls = []
    operators.change(monkeypatch, operator, around_run=lambda run: lambda *args: calls.append(args) or run(*args))
    pool = PagePool(8, 16, 2, head_dim, seed=0, dtype=torch.float32)
    own = pool.store([20], room=1)
    q, k, v = (random(1, 2, head_dim, seed=seed, scale=scale) for seed, scale in ((1, 4.0), (2, 1.0), (3, 1.0)))
    with warnings.catch_warnings(record=True, action="always") as told:
        out = ops.paged_attention_decode(q, k, v, pool.k, pool.v, own.table, torch.tensor([20], dtype=torch.int32))
    keys, values = torch.cat([own.k[0], k]).double(), torch.cat([own.v[0], v]).double()
    weights = torch.einsum("hd,khd->hk", q[0].double() * head_dim**-0.5, keys).softmax(-1)
    torch.testing.assert_close(out[0].double(), torch.einsum("hk,khd->hd", weights, values), rtol=1e-4, atol=1e-5)
    assert len(calls) == served
    if isa.why_no_library() is None:
        said = f"on a CPU it serves a head_dim that is a multiple of 16 up to 128, not {head_dim}"
        assert [said in str(warning.message) for warning in told] == ([] if served else [True])


@pytest.mark.parametrize("page_size, heads, pages", [(1024, 2, 1), (1025, 2, 1), (16, 2, 0), (16, 0, 1)])
def test_a_decode_step_of_sizes_that_the_kernel_does_not_take(page_size, heads, pages):
    """Compute by torch what `csrc/check.h` refuses."""
    q, k, v = (random(2, heads, 32, seed=seed) for seed in (1, 2, 3))
    k_pages, v_pages = (random(2, page_size, heads, 32, seed=seed) for seed in (4, 5))
    table = torch.arange(2 * pages, dtype=torch.int32).view(2, pages)
    lengths = torch.tensor([5 if pages else -1, -1], dtype=torch.int32)
    found = []
    for name in (None, "reference"):
        with backend(name), warnings.catch_warnings(action="ignore"):
            state = k_pages.clone(), v_pages.clone()
            found.append((ops.paged_attention_decode(q, k, v, *state, table, lengths), *state))
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("rows", [3, 600])
def test_without_the_library_torch_s_products_serve(rows, monkeypatch):
    def absent():
        raise native.NativeLibraryError("there is no C++ compiler")

    monkeypatch.setattr(native, "missing", lambda device_type: "there is no C++ compiler")
    monkeypatch.setattr(native, "library", absent)
    for name in LAYERS:
        operators.forget(monkeypatch, OPERATORS[name])
    x, weight = random(rows, 64, seed=0), random(96, 64, seed=1)
    torch.testing.assert_close(ops.linear(x, weight, None), x @ weight.T)
    back, bias = random(64, 96, seed=2), random(64, seed=3)
    found = ops.gelu_mlp(x, weight, torch.zeros(96), back, bias, activation="relu")
    torch.testing.assert_close(found, (x @ weight.T).relu() @ back.T + bias)
