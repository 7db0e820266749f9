"""Linear layers: each call takes the path that is meant for it, on a CPU and on a GPU."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import clvp_fast
from clvp_fast import ops
from clvp_fast.ops import many_rows
from clvp_fast.ops.linear import _OPERATOR, _torch
from tests.kit import assert_within_budget, isa, operators, random
from tests.ops.test_linear import exact, operands

served = isa.needs("linear")


@pytest.fixture
def kernel_calls(monkeypatch):
    """Count the calls that the kernel served."""
    calls = []

    operators.change(monkeypatch, _OPERATOR, around_run=lambda run: lambda *args: calls.append(args) or run(*args))
    return calls


@served
def test_few_rows_of_inference_take_the_kernel(kernel_calls):
    cases = ((torch.float32, False), (torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False))
    for dtype, int8 in cases[: 3 if isa.why_unserved("linear", torch.bfloat16) else 4]:
        kernel_calls.clear()
        x, weight, bias, scale = operands((many_rows.FEW_ROWS,), dtype=dtype, int8=int8)
        ops.linear(x, weight, bias, scale=scale, activation="gelu_new")
        assert len(kernel_calls) == 1


@served
def test_many_rows_of_inference_take_theirs(kernel_calls):
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias, _ = operands((many_rows.FEW_ROWS + 1,), dtype=dtype)
        residual = random(len(x), 50, seed=7)
        for args in ((None, None), ("gelu_new", None), ("gelu_new", residual)):
            out = ops.linear(x, weight, bias, activation=args[0], residual=args[1])
            expected = exact(x, weight, bias, None, args[0]) + (0 if args[1] is None else residual.double())
            baseline = _torch(x, weight, bias, None, args[0], args[1])
            assert_within_budget(out, expected, baseline)
        assert len(kernel_calls) == (0 if isa.why_unserved("many rows", dtype) else 3)
        kernel_calls.clear()


@served
def test_many_rows_that_torch_multiplies(kernel_calls, monkeypatch):
    """Half types without products of theirs, int8 weights, columns of another number, a matrix unit."""
    rows = many_rows.FEW_ROWS + 1
    for dtype, columns, int8 in ((torch.float16, 64, False), (torch.float32, 48, False), (torch.float32, 64, True)):
        ops.linear(
            *operands((rows,), columns, dtype=dtype, int8=int8)[:3], scale=operands((rows,), columns, int8=int8)[3]
        )
    monkeypatch.setattr(many_rows, "has_matrix_unit", lambda: True)
    ops.linear(*operands((rows,), dtype=torch.bfloat16)[:3])
    assert not kernel_calls


@served
def test_a_matrix_unit_serves_bfloat16(kernel_calls, monkeypatch):
    for unit, calls in ((True, 0), (False, 1)):
        monkeypatch.setattr(many_rows, "has_matrix_unit", lambda unit=unit: unit)
        ops.linear(*operands(dtype=torch.bfloat16)[:3])
        assert len(kernel_calls) == calls


@served
def test_all_others_take_torch_s_own_product(kernel_calls):
    x, weight, bias, _ = operands(columns=48)
    assert torch.equal(ops.linear(x, weight, bias), F.linear(x, weight, bias))
    x, weight, bias, _ = operands()
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x, weight, bias).dtype == torch.bfloat16
    with clvp_fast.backend("torch"):
        ops.linear(x, weight, bias)
    torch.compile(ops.linear, fullgraph=True, backend="aot_eager")(x, weight, bias)
    residual = torch.zeros(3, 50, requires_grad=True)
    weight.requires_grad_()
    ops.linear(x, weight, bias, residual=residual).square().sum().backward()
    gradient = 2 * F.linear(x, weight, bias).detach()
    torch.testing.assert_close(weight.grad, gradient.t() @ x, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(residual.grad, gradient)
    ops.linear(x, weight.detach(), bias, residual=residual).sum().backward()
    assert not kernel_calls


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Make operands of a GPU that is not there: they have shapes, dtypes and a device. Nothing was refused before."""
    operators.forget(monkeypatch, _OPERATOR)

    def make(**options):
        return [None if x is None else torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in operands(**options)]

    with FakeTensorMode():
        yield make


@pytest.mark.skipif(torch.version.cuda is not None, reason="tells what a torch without CUDA does")
def test_a_gpu_without_the_kernel_warns_for_int8_alone(on_a_gpu):
    plain, int8 = on_a_gpu(dtype=torch.bfloat16), on_a_gpu(dtype=torch.bfloat16, int8=True)
    with warnings.catch_warnings(action="error"):
        assert ops.linear(*plain[:3]).shape == (3, 50)
        with clvp_fast.backend("torch"):
            ops.linear(*int8[:3], scale=int8[3])
    with pytest.warns(UserWarning, match="linear takes the slower torch path: kernels need an NVIDIA GPU"):
        assert ops.linear(*int8[:3], scale=int8[3]).shape == (3, 50)
    with warnings.catch_warnings(action="error"):  # once
        ops.linear(*int8[:3], scale=int8[3])
    with clvp_fast.backend("kernel"):
        assert ops.linear(*plain[:3]).shape == (3, 50)
        with pytest.raises(RuntimeError, match="linear was forced and cannot serve on cuda"):
            ops.linear(*int8[:3], scale=int8[3])


def test_a_gpu_with_the_kernel_takes_it_for_int8_alone(on_a_gpu, monkeypatch):
    calls = []
    operators.change(monkeypatch, _OPERATOR, missing=lambda device: None)
    monkeypatch.setattr(_OPERATOR, "registered", lambda *args: calls.append(args[1].dtype))
    with warnings.catch_warnings(action="error"):
        for options in ({}, {"rows": (3000,)}, {"columns": 33}, {"dtype": torch.float16}):
            x, weight, bias, scale = on_a_gpu(int8=True, **options)
            ops.linear(x, weight, bias, scale=scale, activation="gelu_new")
            ops.linear(*on_a_gpu(**options)[:3])
    assert calls == [torch.int8] * 4
    x, weight, bias, scale = on_a_gpu(int8=True, dtype=torch.float64)
    with pytest.warns(UserWarning, match="x must be float32, float16 or bfloat16, not torch.float64"):
        ops.linear(x, weight, bias, scale=scale)
    assert len(calls) == 4


@pytest.mark.parametrize(
    "rows, columns, dtype, ours",
    [
        (16, 48, torch.bfloat16, True),
        (1, 48, torch.float16, True),
        (17, 48, torch.bfloat16, False),
        (17, 50, torch.bfloat16, True),  # no multiple of 8, as the head's 8194
        (1, 48, torch.float32, False),
    ],
)
def test_a_bound_step_on_a_gpu_takes_the_kernel_for_few_rows(on_a_gpu, monkeypatch, rows, columns, dtype, ours):
    """Use half types; an unbound call takes torch's product, which costs the host less."""
    operators.change(monkeypatch, _OPERATOR, missing=lambda device: None)
    x, weight = (on_a_gpu(rows=(count,), dtype=dtype)[0] for count in (rows, columns))
    args = x, weight, None, None, None, None
    assert (_OPERATOR._choose(args, bound=True).name == "triton") == ours
    assert _OPERATOR._choose(args).name == "torch"
