"""`gelu_mlp` and `geglu_mlp`: which calls take one kernel, registration, compilers, int8 weights, errors."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import clvp_fast
from clvp_fast.ops import geglu_mlp, gelu_mlp, many_rows
from clvp_fast.ops.linear import linear
from tests.kit import assert_within_budget, in_int8, isa, random, strided
from tests.kit.backends import TRITON, on
from tests.kit.operators import opcheck
from tests.ops.test_mlp import NAMES, OPERATORS, arguments, plain, threads

__all__ = ["threads"]


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_on_a_cpu_take_one_kernel(dtype, name, monkeypatch):
    """Run both layers in one call, within plain torch's budget, except for few rows, gradients and compilers."""
    mlp = OPERATORS[name][0]
    tensors, r = arguments(name, dtype, (many_rows.FEW_ROWS + 1,), 32, 64, 32)
    served = isa.why_unserved("many rows", dtype) is None
    calls, layers = [], many_rows.layers
    monkeypatch.setattr(many_rows, "layers", lambda *args, **gated: calls.append(args[3]) or layers(*args, **gated))
    with clvp_fast.backend("reference"):
        reference = mlp(*(t.double() for t in tensors), residual=r.double(), activation="gelu")
    with warnings.catch_warnings(action="error"):
        assert_within_budget(mlp(*tensors, residual=r, activation="gelu"), reference, plain(name, *tensors, r, "gelu"))
        assert [w_out is not None for w_out in calls] == ([True] if served else [])
        calls.clear()
        mlp(tensors[0][1:], *tensors[1:], activation="gelu")
        mlp(*tensors, activation="relu")
        mlp(*(t.clone().requires_grad_() for t in tensors), activation="gelu")
        torch.compile(mlp, fullgraph=True, backend="aot_eager")(*tensors, activation="gelu")
    assert all(w_out is None for w_out in calls)
    if served:
        torch.library.opcheck(getattr(torch.ops.clvp_fast, name).default, (*tensors, r, "gelu"))


@pytest.mark.parametrize("residual", [False, True])
@NAMES
@on(*TRITON)
def test_registered(backend, name, residual):
    tensors, added = arguments(name, rows=(2, 3), inner=512, device=backend.device)
    op = getattr(torch.ops.clvp_fast, name).default
    opcheck(backend, op, (*tensors, added if residual else None, "gelu"))
    if residual:  # float32 beside a half type
        opcheck(backend, op, (*(tensor.half() for tensor in tensors), added, "gelu"))
    assert OPERATORS[name][0](tensors[0][:0], *tensors[1:], residual=added[:0]).shape == (0, 3, 24)


@pytest.mark.parametrize("residual", [False, True])
@NAMES
def test_registered_and_compiled(name, residual):
    operator = OPERATORS[name][0]
    tensors, r = arguments(name)
    r = r if residual else None
    op = getattr(torch.ops.clvp_fast, name).default
    torch.library.opcheck(op, (*tensors, r, "gelu_new"))
    expected = operator(*tensors, residual=r, activation="gelu_new")
    torch.testing.assert_close(op(*tensors, r, "gelu_new"), expected, rtol=0, atol=0)
    for dynamic in (False, True):
        compiled = torch.compile(
            lambda *t: operator(*t, residual=r, activation="gelu_new"),
            fullgraph=True,
            backend="aot_eager",
            dynamic=dynamic,
        )
        torch.testing.assert_close(compiled(*tensors), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [1, 15, 16, 256, 257])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer(rows, bias):
    """Compute the product both ways round."""
    x, weight = random(rows, 24, seed=0), random(10, 24, seed=1)
    b = random(10, seed=2) if bias else None
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    for given in (x, strided(x), x.view(1, rows, 24)):
        actual = linear(given, weight, b)
        assert actual.is_contiguous()
        assert_within_budget(actual.view(rows, 10), exact, F.linear(x, weight, b))


@NAMES
@on(*TRITON)
def test_unserved_arguments_are_named(backend, name):
    operator = OPERATORS[name][0]
    tensors, _ = arguments(name, rows=(2, 3), device=backend.device)
    with pytest.raises(RuntimeError, match=f"{name} was forced .* activation must be one of gelu, .*, not 'mish'"):
        operator(*tensors, activation="mish")
    with pytest.raises(RuntimeError, match=r"x must be float32, float16 or bfloat16, not torch\.float64"):
        operator(*(t.double() for t in tensors))
    with pytest.raises(RuntimeError, match="an input requires grad"):
        operator(tensors[0].requires_grad_(), *tensors[1:])


def test_bad_arguments_are_named():
    (x, w_in, b_in, w_out, b_out), r = arguments("gelu_mlp", inner=40, width=24)
    cases = [
        ((x, w_in, b_in, w_out, b_out), {"activation": "gelo"}, ValueError, "activation must be one of gelu, gelu_new"),
        ((x, w_in.T, b_in, w_out, b_out), {}, ValueError, r"w_in must have shape \[intermediate, 24\], not \[24, 40\]"),
        ((x, w_in, b_in[1:], w_out, b_out), {}, ValueError, r"b_in must have shape \[40\], not \[39\]"),
        ((x, w_in, b_in, w_out.T, b_out), {}, ValueError, r"w_out must have shape \[out, 40\]"),
        ((x, w_in, b_in, w_out, b_out[1:]), {}, ValueError, "b_out must have shape"),
        ((x, w_in, b_in.double(), w_out, b_out), {}, TypeError, "b_in must have the dtype of x"),
        ((x, w_in, b_in, w_out.to("meta"), b_out), {}, ValueError, "w_out is on meta and x on cpu"),
        ((x, w_in, b_in, w_out, b_out), {"residual": r[:, 1:]}, ValueError, "residual must have shape"),
        ((x, w_in, b_in, w_out, b_out), {"residual": r.half()}, TypeError, "residual must have the dtype of x"),
    ]
    for given, options, error, message in cases:
        with pytest.raises(error, match=message):
            gelu_mlp(*given, **options)
    with pytest.raises(ValueError, match="w_in must have shape"):
        geglu_mlp(x, w_in[1:], b_in[1:], w_out, b_out)


def int8_weights(tensors):
    """Return `tensors` with int8 weights, the scales of their rows, and the represented weights."""
    x, w_in, b_in, w_out, b_out = tensors
    whole, scales = zip(*map(in_int8, (w_in, w_out)), strict=True)
    meant = [w.double() * scale[:, None].double() for w, scale in zip(whole, scales, strict=True)]
    named = {"scale_in": scales[0], "scale_out": scales[1]}
    return [x, whole[0], b_in, whole[1], b_out], named, [x, meant[0], b_in, meant[1], b_out]


@on("default", "torch", "reference", types="dtype", among=(torch.float32, torch.bfloat16, torch.float16))
def test_int8_weights(backend, dtype):
    tensors, residual = arguments("gelu_mlp", dtype, width=32, inner=64)
    quantized, named, meant = int8_weights(tensors)
    expected = plain("gelu_mlp", *(t.double() for t in meant), residual.double(), "gelu_new")
    with clvp_fast.backend("torch"):
        baseline = gelu_mlp(*quantized, **named, residual=residual)
    assert_within_budget(gelu_mlp(*quantized, **named, residual=residual), expected, baseline)
    assert gelu_mlp(*quantized, **named, residual=residual.float()).dtype == torch.float32
    with clvp_fast.backend(None):
        args = (*quantized, residual, "gelu_new", *named.values())
        torch.library.opcheck(torch.ops.clvp_fast.gelu_mlp.default, args)


def test_int8_weights_come_with_their_scales():
    tensors, residual = arguments("gelu_mlp", inner=40)
    quantized, named, _ = int8_weights(tensors)
    mixed = [*quantized[:3], tensors[3], quantized[4]]
    cases = [
        (TypeError, "w_in must have the dtype of x", quantized, {}),
        (ValueError, "scale_out belongs to weights of int8: it is missing", quantized, {"scale_in": named["scale_in"]}),
        (ValueError, "scale_out is missing: both weights are int8, or none", mixed, {"scale_in": named["scale_in"]}),
        (ValueError, "scale_in belongs to weights of int8: it is given", tensors, named),
        (ValueError, r"scale_in must have shape \[40\]", quantized, named | {"scale_in": named["scale_out"]}),
        (TypeError, "scale_in must be float32", quantized, named | {"scale_in": named["scale_in"].double()}),
    ]
    for error, message, given, scales in cases:
        with pytest.raises(error, match=message):
            gelu_mlp(*given, **scales, residual=residual)
