"""`add_norm`: against the float64 reference, and bit for bit against transformers' RMSNorm."""

import pytest
import torch
from transformers.models.clvp.modeling_clvp import ClvpRMSNorm

import clvp_fast
from clvp_fast.ops import add_norm
from clvp_fast.ops.norm import double_layer_norm
from tests.kit import assert_within_budget, random, strided

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HALF_TYPES = [torch.bfloat16, torch.float16]


def arguments(kind, width, dtype, residual=True, rows=(2, 5)):
    x = random(*rows, width, seed=0, dtype=dtype, scale=3.0) + 1
    weight, bias = random(width, seed=1, dtype=dtype), random(width, seed=2, dtype=dtype)
    return (x, random(*rows, width, seed=3, dtype=dtype) if residual else None), {
        "weight": weight,
        "bias": bias if kind == "layer" else None,
        "eps": 1e-2,
        "kind": kind,
    }


def doubled(options):
    return {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}


def plain(x, residual, weight, bias, eps, kind):
    """As one would first write it: the normalised row in float32 at least, rounded, then the affine part."""
    total = x if residual is None else x + residual
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    if kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    normed = (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype) * weight
    return normed if bias is None else normed + bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("width", [1, 33, 768])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_against_reference(kind, width, dtype, residual):
    (x, r), options = arguments(kind, width, dtype, residual, rows=(4, 50))
    total, normed = add_norm(x, r, **options)
    expected_total = x.double() if r is None else x.double() + r.double()
    if kind == "rms" and dtype == torch.float64:  # in float32 by definition
        exact = plain(x, r, **options)
        torch.testing.assert_close(normed, exact, rtol=2e-6, atol=2e-6)
        return
    # From the rounded sum: its rounding belongs to the addition, not to the norm.
    exact = plain(total.double(), None, **doubled(options))
    assert_within_budget(normed, exact, plain(x, r, **options))
    assert_within_budget(total.clone(), expected_total, None if r is None else x + r)
    with clvp_fast.backend("reference"):
        reference_total, reference = add_norm(x, r, **options)
    assert_within_budget(reference, exact, plain(x, r, **options))
    torch.testing.assert_close(reference_total, total, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_is_transformers_bit_for_bit(dtype, weight_dtype, backend):
    x = random(3, 7, 96, seed=0, dtype=dtype, scale=2.0)
    theirs = ClvpRMSNorm(96, eps=1e-5)
    theirs.weight.data = random(96, seed=1, dtype=weight_dtype or dtype)
    with torch.no_grad(), clvp_fast.backend(backend):
        normed = add_norm(x, weight=theirs.weight, eps=1e-5, kind="rms")[1]
        torch.testing.assert_close(normed, theirs(x), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_float32_residual_beside_a_half_type(kind, dtype, out_dtype, backend):
    """The sum keeps all digits of the residual; the norm is that of the sum, and rounded once."""
    (x, r), options = arguments(kind, 96, dtype, rows=(4, 50))
    r = random(4, 50, 96, seed=3, scale=300.0)
    with clvp_fast.backend(backend):
        total, normed = add_norm(x, r, **options, out_dtype=out_dtype)
    assert total.dtype == torch.float32 and torch.equal(total, x.float() + r)
    assert normed.dtype == (out_dtype or dtype)
    options = doubled(options)
    exact = plain(total.double(), None, **options)
    assert_within_budget(normed, exact, exact.to(normed.dtype))
    if normed.dtype == dtype:  # rounded once: twice would differ in one of ten
        assert (normed == exact.to(dtype)).float().mean() > 0.98


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_float32_stream_is_normed_into_the_type_of_the_weights(kind, dtype, backend):
    _, options = arguments(kind, 96, dtype)
    x = random(4, 50, 96, seed=0, scale=30.0) + 300
    with clvp_fast.backend(backend):
        total, normed = add_norm(x, **options, out_dtype=dtype)
    assert total is x and normed.dtype == dtype
    exact = plain(x.double(), None, **doubled(options))
    assert_within_budget(normed, exact, exact.to(dtype))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_strided_rows_and_no_residual(kind):
    (x, r), options = arguments(kind, 40, torch.float32)
    expected = add_norm(x, r, **options)
    actual = add_norm(strided(x), strided(r), **options)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    before = x.clone()
    total, normed = add_norm(x, **options)
    assert total is x and torch.equal(x, before) and not torch.equal(normed, x)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_gradients(kind):
    (x, r), options = arguments(kind, 8, torch.float64)
    names = [name for name in ("weight", "bias") if options[name] is not None]
    leaves = [t.requires_grad_() for t in (x, r, *(options[name] for name in names))]

    def run(x, r, *affine):
        total, normed = add_norm(x, r, **options | dict(zip(names, affine, strict=True)))
        return total * 0.3 + normed

    if kind == "layer":
        assert torch.autograd.gradcheck(run, leaves)
    grad_out = random(2, 5, 8, seed=8, dtype=torch.float64)
    ours = torch.autograd.grad(run(*leaves), leaves, grad_out)
    with clvp_fast.backend("reference"):
        theirs = torch.autograd.grad(run(*leaves), leaves, grad_out)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_gradients_with_a_float32_residual(kind):
    (x, _), options = arguments(kind, 8, torch.bfloat16)
    x, r = x.requires_grad_(), random(2, 5, 8, seed=3).requires_grad_()
    weight = options["weight"].requires_grad_()
    total, normed = add_norm(x, r, **options)
    (total.sum() + normed.float().square().sum()).backward()
    grads = [leaf.grad for leaf in (x, r, weight)]
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.bfloat16]
    wide = [t.detach().double().requires_grad_() for t in (x, r, weight)]
    total, normed = add_norm(*wide[:2], **doubled(options) | {"weight": wide[2]})
    (total.sum() + normed.square().sum()).backward()
    for found, leaf in zip(grads, wide, strict=True):
        torch.testing.assert_close(found.double(), leaf.grad, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_mixed_types_registered_and_compiled(kind):
    (x, _), options = arguments(kind, 16, torch.bfloat16)
    r = random(2, 5, 16, seed=3)
    op = torch.ops.clvp_fast.add_norm.default
    for given, residual, out_dtype in ((x, r, None), (x, r, torch.float32), (r, None, torch.bfloat16)):
        torch.library.opcheck(op, (given, residual, *options.values(), out_dtype))
        expected = add_norm(given, residual, **options, out_dtype=out_dtype)
        compiled = torch.compile(
            lambda x, r, out_dtype=out_dtype: add_norm(x, r, **options, out_dtype=out_dtype),
            fullgraph=True,
            backend="aot_eager",
        )
        for actual, wanted in zip(compiled(given, residual), expected, strict=True):
            assert torch.equal(actual, wanted) and actual.dtype == wanted.dtype


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_registered_and_compiled(kind, residual):
    (x, r), options = arguments(kind, 16, torch.float32, residual)
    op = torch.ops.clvp_fast.add_norm.default
    torch.library.opcheck(op, (x, r, *options.values()))
    expected = add_norm(x, r, **options)
    torch.testing.assert_close(op(x, r, *options.values())[1], expected[1], rtol=0, atol=0)
    compiled = torch.compile(lambda x, r: add_norm(x, r, **options), fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(compiled(x, r), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)


def test_bad_arguments_are_named():
    (x, r), options = arguments("layer", 16, torch.float32)
    cases = [
        ({"kind": "group"}, ValueError, "kind must be 'rms' or 'layer', not 'group'"),
        ({"weight": options["weight"][:3]}, ValueError, r"weight must have shape \[16\]"),
        ({"weight": options["weight"].to("meta")}, ValueError, "weight is on meta"),
        ({"residual": r[:1]}, ValueError, r"residual must have shape that of x, \[2, 5, 16\], not \[1, 5, 16\]"),
        ({"residual": r.double()}, TypeError, "residual must have the dtype of x"),
        ({"bias": options["bias"][:3]}, ValueError, "bias must have shape"),
        ({"kind": "rms"}, ValueError, "bias must be None"),
        ({"residual": r.bfloat16()}, TypeError, "residual must have the dtype of x, torch.float32, not torch.bfloat16"),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype must be a floating point type, not torch.int32"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            add_norm(x, **options | change)
    with pytest.raises(TypeError, match=r"the dtype of x, torch\.float16, not torch\.bfloat16"):
        add_norm(x.half(), r.bfloat16(), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_double_layer_norm_is_two_layer_norms(backend, dtype):
    (x, _), one = arguments("layer", 40, dtype)
    two = {"weight2": one["bias"], "bias2": one["weight"], "eps2": 0.3}
    with clvp_fast.backend(backend):
        first, second = double_layer_norm(x, weight1=one["weight"], bias1=one["bias"], eps1=1e-2, **two)
        assert torch.equal(first, add_norm(x, **one)[1])
        again = {"weight": one["bias"], "bias": one["weight"], "eps": 0.3, "kind": "layer"}
        assert torch.equal(second, add_norm(first, **again)[1])


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_double_layer_norm_of_a_float32_stream(backend, dtype):
    """The first norm is not rounded to the half type on the way to the second."""
    _, one = arguments("layer", 40, dtype)
    x = random(4, 50, 40, seed=0, scale=3.0)
    two = {"weight2": one["bias"], "bias2": one["weight"], "eps2": 0.3}
    given = {"weight1": one["weight"], "bias1": one["bias"], "eps1": 1e-2} | two
    with clvp_fast.backend(backend):
        first, second = double_layer_norm(x, **given, out_dtype=dtype)
    exact = [doubled(one) | {"weight": one["bias"].double(), "bias": one["weight"].double(), "eps": 0.3}, doubled(one)]
    between = plain(x.double(), None, **exact[1])
    expected = plain(between, None, **exact[0])
    assert_within_budget(first, between)
    assert_within_budget(second, expected, expected.to(dtype))
    rounded = plain(between.to(dtype).double(), None, **exact[0])
    assert (second.double() - expected).abs().mean() < (rounded.to(dtype).double() - expected).abs().mean()
    args = (x, *given.values(), dtype)
    torch.library.opcheck(torch.ops.clvp_fast.double_layer_norm.default, args)


def test_double_layer_norm_registered_and_compiled():
    (x, _), one = arguments("layer", 16, torch.float32)
    args = (x, one["weight"], None, 1e-2, one["bias"], one["weight"], 0.3)
    torch.library.opcheck(torch.ops.clvp_fast.double_layer_norm.default, args)
    named = dict(zip(("weight1", "bias1", "eps1", "weight2", "bias2", "eps2"), args[1:], strict=True))
    compiled = torch.compile(lambda x: double_layer_norm(x, **named), fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(compiled(x), double_layer_norm(x, **named), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)
    leaves = [x.double().requires_grad_(), one["weight"].double().requires_grad_()]
    affine = {"bias1": None, "eps1": 1e-2, "bias2": None, "eps2": 0.3}
    assert torch.autograd.gradcheck(lambda x, w: double_layer_norm(x, weight1=w, weight2=w * w, **affine), leaves)


def test_double_layer_norm_names_bad_arguments():
    (x, _), one = arguments("layer", 16, torch.float32)
    good = {"weight1": one["weight"], "bias1": one["bias"], "eps1": 1e-5}
    good |= {"weight2": one["weight"], "bias2": one["bias"], "eps2": 1e-5}
    cases = [
        ({"weight1": one["weight"][:3]}, ValueError, r"weight1 must have shape \[16\]"),
        ({"bias2": one["bias"][:3]}, ValueError, "bias2 must have shape that of weight2"),
        ({"bias2": one["bias"].double()}, TypeError, "bias2 must have the dtype of weight2"),
        ({"weight2": one["weight"].to("meta")}, ValueError, "weight2 is on meta"),
        ({"out_dtype": torch.bool}, TypeError, "out_dtype must be a floating point type, not torch.bool"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            double_layer_norm(x, **good | change)
