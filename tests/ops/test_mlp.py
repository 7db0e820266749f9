"""`gelu_mlp` and `geglu_mlp`: against the float64 reference; activations against transformers' table."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

import clvp_fast
from clvp_fast.ops import ACTIVATIONS, geglu_mlp, gelu_mlp, many_rows
from clvp_fast.ops.linear import linear
from tests.kit import assert_within_budget, in_int8, isa, random, strided

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPERATORS = {"gelu": (gelu_mlp, 1), "geglu": (geglu_mlp, 2)}


def arguments(halves, dtype, rows=(2, 7), width=24, hidden=40, residual=True):
    x = random(*rows, width, seed=0, dtype=dtype)
    tensors = [
        x,
        random(hidden * halves, width, seed=1, dtype=dtype, scale=0.3),
        random(hidden * halves, seed=2, dtype=dtype),
        random(width, hidden, seed=3, dtype=dtype, scale=0.2),
        random(width, seed=4, dtype=dtype),
    ]
    return tensors, random(*rows, width, seed=5, dtype=dtype) if residual else None


def plain(halves, x, w_in, b_in, w_out, b_out, residual, activation):
    hidden = x @ w_in.T + b_in
    act = F.gelu if activation == "gelu" else lambda x: F.gelu(x, approximate="tanh")
    hidden = act(hidden) if halves == 1 else hidden.chunk(2, -1)[0] * act(hidden.chunk(2, -1)[1])
    out = hidden @ w_out.T + b_out
    return out if residual is None else out + residual


@pytest.fixture(params=[1, 4], ids=["one thread", "threads"])
def threads(request, monkeypatch):
    """With several threads some products are computed the other way round."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(1,), (1, 1), (3, 6), (300,)])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_against_reference(name, residual, rows, dtype):
    operator, halves = OPERATORS[name]
    tensors, r = arguments(halves, dtype, rows, residual=residual)
    for activation in ("gelu", "gelu_new"):
        wide = [t.double() for t in tensors]
        with clvp_fast.backend("reference"):
            reference = operator(*wide, residual=None if r is None else r.double(), activation=activation)
        kept = None if r is None else r.clone()
        actual = operator(*tensors, residual=r, activation=activation)
        assert actual.is_contiguous()
        assert_within_budget(actual, reference, plain(halves, *tensors, r, activation))
        assert r is None or torch.equal(r, kept)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPERATORS)
def test_float32_residual_beside_a_half_type(name, dtype, backend):
    """The result is float32: of a large residual no digit is lost, nor of the product that is added to it."""
    operator, halves = OPERATORS[name]
    tensors, _ = arguments(halves, dtype, (3, 20))
    r = random(3, 20, 24, seed=5, scale=300.0)
    wide = [t.double() for t in tensors]
    with clvp_fast.backend("reference"):
        product = operator(*wide)
    with clvp_fast.backend(backend):
        out = operator(*tensors, residual=r)
    assert out.dtype == torch.float32
    activation = {"gelu": "gelu_new", "geglu": "gelu"}[name]
    added, baseline = out.double() - r.double(), plain(halves, *tensors, None, activation)
    noise = torch.finfo(torch.float32).eps * r.abs().max().item()
    error = (added - product).abs().max()
    assert error <= 2 * (baseline.double() - product).abs().max() + noise
    assert noise < 0.1 * (baseline.double() - product).abs().max()
    args = (*tensors, r, "gelu")
    torch.library.opcheck(getattr(torch.ops.clvp_fast, f"{name}_mlp").default, args)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_on_a_cpu_take_one_kernel(dtype, name, monkeypatch):
    """Both layers in one call, which plain torch's budget holds; few rows, gradients and a compiler do without it."""
    mlp, halves = OPERATORS[name]
    tensors, r = arguments(halves, dtype, (many_rows.FEW_ROWS + 1,), width=32, hidden=64)
    served = isa.why_unserved("many rows", dtype) is None
    calls, layers = [], many_rows.layers
    monkeypatch.setattr(many_rows, "layers", lambda *args, **gated: calls.append(args[3]) or layers(*args, **gated))
    with clvp_fast.backend("reference"):
        reference = mlp(*(t.double() for t in tensors), residual=r.double(), activation="gelu")
    with warnings.catch_warnings(action="error"):
        assert_within_budget(
            mlp(*tensors, residual=r, activation="gelu"), reference, plain(halves, *tensors, r, "gelu")
        )
        assert [w_out is not None for w_out in calls] == ([True] if served else [])
        calls.clear()
        mlp(tensors[0][1:], *tensors[1:], activation="gelu")
        mlp(*tensors, activation="relu")
        mlp(*(t.clone().requires_grad_() for t in tensors), activation="gelu")
        torch.compile(mlp, fullgraph=True, backend="aot_eager")(*tensors, activation="gelu")
    assert all(w_out is None for w_out in calls)
    if served:
        torch.library.opcheck(getattr(torch.ops.clvp_fast, f"{name}_mlp").default, (*tensors, r, "gelu"))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", OPERATORS)
def test_strided_inputs_and_transposed_weights(name):
    operator, halves = OPERATORS[name]
    (x, w_in, b_in, w_out, b_out), r = arguments(halves, torch.float32, rows=(2, 10))
    expected = operator(x, w_in, b_in, w_out, b_out, residual=r)
    views = [strided(x), w_in.T.contiguous().T, strided(b_in), w_out.T.contiguous().T, b_out]
    torch.testing.assert_close(operator(*views, residual=strided(r)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("grad", [False, True])
def test_activations_are_those_of_transformers(activation, grad):
    theirs = {"selu": F.selu, "elu": F.elu}.get(activation) or ACT2FN[activation]
    (x, w_in, b_in, w_out, b_out), _ = arguments(1, torch.float64)
    x.requires_grad_(grad)
    expected = F.linear(theirs(F.linear(x, w_in, b_in)), w_out, b_out)
    for backend in ("torch", "reference"):
        with clvp_fast.backend(backend):
            actual = gelu_mlp(x, w_in, b_in, w_out, b_out, activation=activation)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    if grad:
        grads = [torch.autograd.grad(out.sum(), x)[0] for out in (actual, expected)]
        torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients(name):
    operator, halves = OPERATORS[name]
    tensors, r = arguments(halves, torch.float64, rows=(3,), width=4, hidden=5)
    leaves = [t.requires_grad_() for t in (*tensors, r)]

    def run(*t):
        return operator(*t[:5], residual=t[5], activation="gelu_new")

    assert torch.autograd.gradcheck(run, leaves)
    ours = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    with clvp_fast.backend("reference"):
        theirs = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    for mine, expected in zip(ours, theirs, strict=True):
        assert_within_budget(mine, expected)


def test_dropout_keeps_the_mean():
    tensors, r = arguments(2, torch.float32, rows=(4,))
    for backend in ("reference", "torch"):
        torch.manual_seed(0)
        with clvp_fast.backend(backend):
            drawn = torch.stack([geglu_mlp(*tensors, residual=r, dropout_p=0.4) for _ in range(400)])
        assert not torch.equal(drawn[0], drawn[1])
        deviation = (drawn.mean(0) - geglu_mlp(*tensors, residual=r)).abs() / (drawn.std(0) / 20)
        assert deviation.mean() < 1.1 and deviation.max() < 6


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_registered_and_compiled(name, residual):
    operator, halves = OPERATORS[name]
    tensors, r = arguments(halves, torch.float32, residual=residual)
    op = getattr(torch.ops.clvp_fast, f"{name}_mlp").default
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
def test_linear(rows, bias):
    """Both ways round of the product."""
    x, weight = random(rows, 24, seed=0), random(10, 24, seed=1)
    b = random(10, seed=2) if bias else None
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    for given in (x, strided(x), x.view(1, rows, 24)):
        actual = linear(given, weight, b)
        assert actual.is_contiguous()
        assert_within_budget(actual.view(rows, 10), exact, F.linear(x, weight, b))


def test_bad_arguments_are_named():
    (x, w_in, b_in, w_out, b_out), r = arguments(1, torch.float32)
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
    """`tensors` with int8 weights, the scales of their rows, and the weights that they stand for."""
    x, w_in, b_in, w_out, b_out = tensors
    whole, scales = zip(*map(in_int8, (w_in, w_out)), strict=True)
    meant = [w.double() * scale[:, None].double() for w, scale in zip(whole, scales, strict=True)]
    named = {"scale_in": scales[0], "scale_out": scales[1]}
    return [x, whole[0], b_in, whole[1], b_out], named, [x, meant[0], b_in, meant[1], b_out]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_int8_weights(backend, dtype):
    tensors, residual = arguments(1, dtype, width=32, hidden=64)
    quantized, named, meant = int8_weights(tensors)
    expected = plain(1, *(t.double() for t in meant), residual.double(), "gelu_new")
    with clvp_fast.backend("torch"):
        baseline = gelu_mlp(*quantized, **named, residual=residual)
    with clvp_fast.backend(backend):
        assert_within_budget(gelu_mlp(*quantized, **named, residual=residual), expected, baseline)
        wide = gelu_mlp(*quantized, **named, residual=residual.float())
        assert wide.dtype == torch.float32
    torch.library.opcheck(torch.ops.clvp_fast.gelu_mlp.default, (*quantized, residual, "gelu_new", *named.values()))


def test_int8_weights_come_with_their_scales():
    tensors, residual = arguments(1, torch.float32)
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
