"""`add_norm` and `double_layer_norm`: budgets against float64 and bits of transformers' RMSNorm on every backend,
layouts, memory, gradients, errors."""

from pathlib import Path

import pytest
import torch
from transformers.models.clvp.modeling_clvp import ClvpRMSNorm

import clvp_fast
from clvp_fast.kernels import norm
from clvp_fast.ops.binding import Scratch
from clvp_fast.ops.norm import add_norm, bind_add_norm, double_layer_norm
from tests.kit import Guarded, assert_within_budget, at_threads, random, strided
from tests.kit.backends import TRITON, on
from tests.kit.operators import opcheck

# The library has no kernel for two norms in one.
OF_TWO = ("reference", "torch", *TRITON)
EVERY = (*OF_TWO, "cpu")
KINDS = pytest.mark.parametrize("kind", ["rms", "layer"])
KERNELS = (*TRITON, "cpu")
HALF = torch.float16
HALF_TYPES = (torch.bfloat16, torch.float16)
EPS = 1e-2


def options(kind, width, dtype=torch.float32, device="cpu", bias=True):
    weight, offset = (random(width, seed=seed, dtype=dtype, device=device) for seed in (1, 2))
    return {"weight": weight, "bias": offset if kind == "layer" and bias else None, "eps": EPS, "kind": kind}


def rows(*shape, dtype=torch.float32, device="cpu", seed=0):
    return random(*shape, seed=seed, dtype=dtype, scale=3.0, device=device) + 1


def to(dtype, settings):
    return {name: x.to(dtype) if isinstance(x, torch.Tensor) else x for name, x in settings.items()}


def plain(x, residual, weight, bias, eps, kind="layer"):
    """Compute as one would first write it: the normalised row in float32 at least, rounded, then the affine part."""
    total = x if residual is None else x + residual
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    if kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    normed = (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype) * weight
    return normed if bias is None else normed + bias


def exact(total, settings):
    return plain(total.double(), None, **to(torch.float64, settings))


def check(backend, x, residual, settings):
    """Judge the norm from the rounded sum, as the addition is responsible for that rounding."""
    total, normed = add_norm(x, residual, **settings)
    assert total is x if residual is None else torch.equal(total, x + residual)
    if settings["kind"] == "rms" and x.dtype == torch.float64:  # in float32 by definition
        torch.testing.assert_close(normed, exact(total, settings), rtol=2e-6, atol=2e-6)
        return
    baseline = plain(x, residual, **settings)
    if backend.name in KERNELS:  # which have torch's to compare with
        with clvp_fast.backend("torch"):
            baseline = add_norm(x, residual, **settings)[1].clone()
    assert_within_budget(normed, exact(total, settings), baseline)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("width", [1, 2, 33, 768, 1025])
@KINDS
@on(*EVERY, types="dtype")
def test_against_reference(backend, dtype, kind, width, residual):
    settings = options(kind, width, dtype, backend.device)
    shape = (70 if width < 40 else 3, width) if backend.name in TRITON else (4, 50, width)
    x, added = (rows(*shape, dtype=dtype, device=backend.device, seed=seed) for seed in (0, 3))
    if kind == "layer" and width == 1:  # the bias alone
        normed = add_norm(x, added if residual else None, **settings)[1]
        assert torch.equal(normed, settings["bias"].expand_as(x))
    else:
        check(backend, x, added if residual else None, settings)


@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("shape", [(3, 7, 96), (60, 768)])
@on(*EVERY, types="dtype")
def test_rms_is_transformers(backend, dtype, shape, weight_dtype):
    """Compare bits; a kernel may differ in a few last places, where its order of sums moved a rounding."""
    x = random(*shape, seed=0, dtype=dtype, scale=2.0, device=backend.device)
    theirs = ClvpRMSNorm(shape[-1], eps=1e-5)
    theirs.weight.data = random(shape[-1], seed=1, dtype=weight_dtype or dtype, device=backend.device)
    with torch.no_grad():
        ours, expected = add_norm(x, weight=theirs.weight, eps=1e-5, kind="rms")[1], theirs(x)
    assert ours.dtype == expected.dtype
    if backend.name in KERNELS:
        same = (ours == expected).float().mean()
        assert same > (0.99 if dtype != torch.float32 else 0.3)
        torch.testing.assert_close(ours, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
    else:
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("out_dtype", [None, torch.float32])
@pytest.mark.parametrize("width", [33, 96, 768])
@KINDS
@on(*EVERY, types="dtype", among=HALF_TYPES)
def test_float32_residual_beside_a_half_type(backend, dtype, kind, width, out_dtype):
    """Keep all digits of the residual in the sum; its norm is rounded once."""
    x, settings = rows(20, width, dtype=dtype, device=backend.device), options(kind, width, dtype, backend.device)
    r = rows(20, width, device=backend.device, seed=3) * 300
    total, normed = add_norm(x, r, **settings, out_dtype=out_dtype)
    assert total.dtype == torch.float32 and torch.equal(total, x.float() + r)
    assert normed.dtype == (out_dtype or dtype)
    expected = exact(total, settings)

    def check_rounding(normed):
        assert_within_budget(normed, expected, expected.to(normed.dtype))
        if normed.dtype == dtype:  # rounded once: twice would differ in one of ten
            assert (normed == expected.to(dtype)).float().mean() > 0.98

    check_rounding(normed)
    alone = add_norm(x[7:8], r[7:8], **settings, out_dtype=out_dtype)
    assert torch.equal(alone[0], total[7:8]) and torch.equal(alone[1], normed[7:8])
    # The stream alone, as a layer's first norm sees it.
    same, again = add_norm(total, **settings, out_dtype=out_dtype or dtype)
    assert same is total and again.dtype == normed.dtype
    if backend.compiled:  # for other arguments: threads hold other columns, and add them in another order
        check_rounding(again)
    else:
        assert torch.equal(again, normed)


@KINDS
@on(*EVERY, types="dtype", among=HALF_TYPES)
def test_a_float32_stream_is_normed_into_the_type_of_the_weights(backend, dtype, kind):
    settings = options(kind, 96, dtype, backend.device)
    x = random(200, 96, seed=0, scale=30.0, device=backend.device) + 300
    total, normed = add_norm(x, **settings, out_dtype=dtype)
    assert total is x and normed.dtype == dtype
    expected = exact(x, settings)
    assert_within_budget(normed, expected, expected.to(dtype))


@pytest.mark.parametrize("width", [3000, 8192])
@KINDS
@on(*EVERY, types="dtype", among=(HALF,))
def test_wide_rows(backend, dtype, kind, width):
    x, r = (rows(2, width, dtype=dtype, device=backend.device, seed=seed) for seed in (0, 3))
    check(backend, x, r, options(kind, width, dtype, backend.device))


@KINDS
@on(*KERNELS)
def test_extreme_rows(backend, kind):
    """Constant rows, zeros, and a mean 10000 times the deviation, which E[x^2] - E[x]^2 would lose."""
    settings = options(kind, 768, device=backend.device)
    x = random(4, 768, seed=4, device=backend.device)
    x[0], x[1] = 0.0, 1e4
    x[2] += 1e4
    x[3] *= 1e17
    if kind == "layer":
        normed = add_norm(x, **settings)[1]
        assert torch.equal(normed[:2], settings["bias"].expand(2, -1))
        shifted = exact(x[2:3], settings)
        assert (normed[2] - shifted[0]).abs().max() < 0.01  # the mean's own rounding is 0.0005 deviations
        check(backend, x[3:], None, settings)
    else:
        check(backend, x, None, settings)


@on(*TRITON)
def test_nothing_is_read_or_written_outside(backend):
    for kind in ("rms", "layer"):
        x, r = (rows(19, 40, device=backend.device, seed=seed) for seed in (0, 3))
        settings = options(kind, 40, device=backend.device)
        expected = add_norm(x, r, **settings)
        total, out = (Guarded(19, 40, dtype=torch.float32, device=backend.device) for _ in range(2))
        poisoned = [None if settings[name] is None else strided(settings[name]) for name in ("weight", "bias")]
        norm.add_norm(strided(x), strided(r), *poisoned, EPS, kind, total=total.tensor, out=out.tensor)
        for guarded, wanted in ((total, expected[0]), (out, expected[1])):
            guarded.check()
            torch.testing.assert_close(guarded.tensor, wanted, rtol=1e-6, atol=1e-6)
        total, out = (Guarded(19, 40, dtype=dtype, device=backend.device) for dtype in (torch.float32, HALF))
        norm.add_norm(strided(x.to(HALF)), strided(r), *poisoned, EPS, kind, total=total.tensor, out=out.tensor)
        total.check()
        out.check()
        assert torch.equal(total.tensor, x.to(HALF).float() + r)


@KINDS
@on(*EVERY)
def test_layouts(backend, kind):
    """Use any leading axes, rows at a stride, columns at a stride, broadcast residuals, no rows, no residual."""
    settings = options(kind, 48, device=backend.device)
    x = rows(2, 3, 48, device=backend.device)
    r = rows(48, device=backend.device, seed=3).expand(2, 3, 48)
    expected = add_norm(x, r.contiguous(), **settings)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    affine = {
        name: strided(settings[name][:, None].expand(-1, 2).contiguous())[:, 0]
        for name in ("weight", "bias")
        if settings[name] is not None
    }
    for source in (x, strided(x), turned, x.transpose(0, 1).contiguous().transpose(0, 1)):
        for added in (r, strided(r)):
            for actual, wanted in zip(add_norm(source, added, **settings | affine), expected, strict=True):
                torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(add_norm(turned[1], r[1], **settings)[1], expected[1][1], rtol=1e-6, atol=1e-6)
    assert torch.equal(add_norm(x[0, 0], r[0, 0], **settings)[1], expected[1][0, 0])
    total, normed = add_norm(x[:0], r[:0], **settings)
    assert total.shape == normed.shape == (0, 3, 48)
    before = x.clone()
    total, normed = add_norm(x, **settings)
    assert total is x and torch.equal(x, before) and not torch.equal(normed, x)


@pytest.mark.parametrize("width", [40, 768])
@KINDS
@on(*EVERY, types="dtype", among=(HALF,))
def test_bits_do_not_depend_on_the_batch(backend, dtype, kind, width):
    settings = options(kind, width, dtype, backend.device)
    x, r = (rows(17, width, dtype=dtype, device=backend.device, seed=seed) for seed in (0, 3))
    whole, again, alone = (add_norm(a, b, **settings) for a, b in ((x, r), (x, r), (x[11:12], r[11:12])))
    for first, second, one in zip(whole, again, alone, strict=True):
        assert torch.equal(first, second) and torch.equal(first[11:12], one)


@KINDS
@on("cpu", types="dtype")
def test_the_librarys_kernel(backend, dtype, kind):
    """Compare rows in any company and on any number of threads; nothing outside is read or written."""
    settings = options(kind, 333, dtype)
    x, r = (rows(70, 333, dtype=dtype, seed=seed) for seed in (0, 3))
    expected = add_norm(x, r, **settings)
    for _ in at_threads(1, 3):
        for found, wanted in zip(add_norm(strided(x), strided(r), **settings), expected, strict=True):
            assert torch.equal(found, wanted)
    scratch = Scratch(70, "cpu")
    for row in (slice(0, 2), slice(67, 70)):
        sum_, out = (Guarded(row.stop - row.start, 333, dtype=dtype) for _ in range(2))
        bind_add_norm((sum_.tensor, out.tensor), scratch, x[row], r[row], **settings)()
        for guarded, wanted in ((sum_, expected[0]), (out, expected[1])):
            guarded.check()
            assert torch.equal(guarded.tensor, wanted[row])
    # A bound call reads what its tensors hold when it runs; results of another layout are copied into.
    apart, stream = torch.empty(5, 2 * 333, dtype=dtype)[:, ::2], torch.zeros(5, 333)
    call = bind_add_norm((None, apart), scratch, stream, **settings)
    stream.copy_(x[:5])
    call()
    check_row = add_norm(x[:5].float(), **settings, out_dtype=dtype)[1]
    assert torch.equal(apart, check_row)


@on("cpu")
def test_unserved_arguments_of_the_librarys_kernel_are_named(backend):
    x, settings = rows(2, 16), options("layer", 16)
    for given, change, message in (
        (x.half(), to(HALF, settings), "on a CPU it serves float32 and bfloat16, not torch.float16"),
        (x, settings | {"out_dtype": HALF}, "on a CPU it serves float32 and bfloat16, not torch.float16"),
        (x[:, :0], options("rms", 0), "it serves rows of at least one number"),
    ):
        with pytest.raises(RuntimeError, match=message):
            add_norm(given, **change)


@pytest.mark.parametrize("residual", [False, True])
@KINDS
@on("default", *KERNELS)
def test_registered(backend, kind, residual):
    x, settings = rows(2, 5, 16, device=backend.device), options(kind, 16, device=backend.device)
    r = rows(2, 5, 16, device=backend.device, seed=3) if residual else None
    opcheck(backend, torch.ops.clvp_fast.add_norm.default, (x, r, *settings.values()))
    # float32 beside a half type: results of two types.
    dtype = torch.bfloat16 if backend.name == "cpu" else HALF
    half = to(dtype, settings).values()
    mixed = (x.to(dtype), r, *half) if residual else (x, r, *half, dtype)
    opcheck(backend, torch.ops.clvp_fast.add_norm.default, mixed)


@on(*TRITON)
def test_unserved_arguments_are_named(backend):
    x, settings = rows(2, 16, device=backend.device), options("layer", 16, device=backend.device)
    wide, long = to(torch.float64, settings), rows(1, 8193, dtype=HALF, device=backend.device)
    for given, change, message in (
        (x.double(), wide, "float32, float16 or bfloat16, not torch.float64"),
        (x, wide, "float32, float16 or bfloat16, not torch.float64"),
        (x, settings | {"out_dtype": torch.float64}, "float32, float16 or bfloat16, not torch.float64"),
        (long, options("rms", 8193, HALF, backend.device), "at most 8192 wide, not 8193"),
    ):
        with pytest.raises(RuntimeError, match=message):
            add_norm(given, **change)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad"):
        add_norm(x.clone().requires_grad_(), **settings)


@on(*TRITON)
def test_the_example_of_the_document(backend):
    document = (Path(__file__).parents[2] / "docs/kernels.md").read_text()
    example = document.split("```python\n")[1].split("```")[0]
    shapes = ((3, 40), (3, 40), (40,))
    x, residual, weight = (rows(*shape, dtype=HALF, device=backend.device, seed=9) for shape in shapes)
    total, out = torch.empty_like(x), torch.empty_like(x)
    exec(example, {"x": x, "residual": residual, "weight": weight, "total": total, "out": out})
    expected = add_norm(x, residual, weight=weight, eps=1e-5, kind="rms")
    assert torch.equal(total, expected[0]) and torch.equal(out, expected[1])


@KINDS
def test_gradients(kind):
    settings = options(kind, 8, torch.float64)
    x, r = (rows(2, 5, 8, dtype=torch.float64, seed=seed) for seed in (0, 3))
    names = [name for name in ("weight", "bias") if settings[name] is not None]
    leaves = [t.requires_grad_() for t in (x, r, *(settings[name] for name in names))]

    def run(x, r, *affine):
        total, normed = add_norm(x, r, **settings | dict(zip(names, affine, strict=True)))
        return total * 0.3 + normed

    if kind == "layer":
        assert torch.autograd.gradcheck(run, leaves)
    grad_out = random(2, 5, 8, seed=8, dtype=torch.float64)
    ours = torch.autograd.grad(run(*leaves), leaves, grad_out)
    with clvp_fast.backend("reference"):
        theirs = torch.autograd.grad(run(*leaves), leaves, grad_out)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@KINDS
def test_gradients_with_a_float32_residual(kind):
    x, settings = rows(2, 5, 8, dtype=torch.bfloat16), options(kind, 8, torch.bfloat16)
    x, r = x.requires_grad_(), random(2, 5, 8, seed=3).requires_grad_()
    weight = settings["weight"].requires_grad_()
    total, normed = add_norm(x, r, **settings)
    (total.sum() + normed.float().square().sum()).backward()
    grads = [leaf.grad for leaf in (x, r, weight)]
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.bfloat16]
    wide = [t.detach().double().requires_grad_() for t in (x, r, weight)]
    total, normed = add_norm(*wide[:2], **to(torch.float64, settings) | {"weight": wide[2]})
    (total.sum() + normed.square().sum()).backward()
    for found, leaf in zip(grads, wide, strict=True):
        torch.testing.assert_close(found.double(), leaf.grad, rtol=0.05, atol=0.05)


@KINDS
def test_mixed_types_registered_and_compiled(kind):
    x, settings = rows(2, 5, 16, dtype=torch.bfloat16), options(kind, 16, torch.bfloat16)
    r = random(2, 5, 16, seed=3)
    op = torch.ops.clvp_fast.add_norm.default
    for given, residual, out_dtype in ((x, r, None), (x, r, torch.float32), (r, None, torch.bfloat16)):
        torch.library.opcheck(op, (given, residual, *settings.values(), out_dtype))
        expected = add_norm(given, residual, **settings, out_dtype=out_dtype)
        compiled = torch.compile(
            lambda x, r, out_dtype=out_dtype: add_norm(x, r, **settings, out_dtype=out_dtype),
            fullgraph=True,
            backend="aot_eager",
        )
        for actual, wanted in zip(compiled(given, residual), expected, strict=True):
            assert torch.equal(actual, wanted) and actual.dtype == wanted.dtype


@pytest.mark.parametrize("residual", [False, True])
@KINDS
def test_compiled(kind, residual):
    x, settings = rows(2, 5, 16), options(kind, 16)
    r = rows(2, 5, 16, seed=3) if residual else None
    op = torch.ops.clvp_fast.add_norm.default
    expected = add_norm(x, r, **settings)
    # The registered operator takes the library's kernel also where that is slower, for the order of sums of a compiled
    # graph must not depend on its sizes.
    torch.testing.assert_close(op(x, r, *settings.values())[1], expected[1], rtol=1e-6, atol=1e-6)
    compiled = torch.compile(lambda x, r: add_norm(x, r, **settings), fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(compiled(x, r), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)


def test_bad_arguments_are_named():
    x, r, settings = rows(2, 5, 16), rows(2, 5, 16, seed=3), options("layer", 16)
    cases = [
        ({"kind": "group"}, ValueError, "kind must be 'rms' or 'layer', not 'group'"),
        ({"weight": settings["weight"][:3]}, ValueError, r"weight must have shape \[16\]"),
        ({"weight": settings["weight"].to("meta")}, ValueError, "weight is on meta"),
        ({"residual": r[:1]}, ValueError, r"residual must have shape that of x, \[2, 5, 16\], not \[1, 5, 16\]"),
        ({"residual": r.double()}, TypeError, "residual must have the dtype of x"),
        ({"bias": settings["bias"][:3]}, ValueError, "bias must have shape"),
        ({"kind": "rms"}, ValueError, "bias must be None"),
        ({"residual": r.bfloat16()}, TypeError, "residual must have the dtype of x, torch.float32, not torch.bfloat16"),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype must be a floating point type, not torch.int32"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            add_norm(x, **settings | change)
    with pytest.raises(TypeError, match=r"the dtype of x, torch\.float16, not torch\.bfloat16"):
        add_norm(x.half(), r.bfloat16(), **settings)


def second_options(one, two):
    """Return the arguments of `double_layer_norm` for these two norms."""
    first = {f"{name}1": one[name] for name in ("weight", "bias", "eps")}
    return first | {f"{name}2": two[name] for name in ("weight", "bias", "eps")}


@pytest.mark.parametrize("biased", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("width", [33, 40, 1024])
@on(*OF_TWO, types="dtype")
def test_double_layer_norm_is_two_layer_norms(backend, dtype, width, biased):
    x = rows(5, width, dtype=dtype, device=backend.device)
    one, two = (options("layer", width, dtype, backend.device, bias) for bias in biased)
    two |= {"weight": two["weight"] * 2 - 1, "eps": 0.5}
    first, second = double_layer_norm(strided(x), **second_options(one, two))
    with clvp_fast.backend("torch"):
        baseline, fair = add_norm(x, **one)[1].clone(), add_norm(first, **two)[1].clone()
    assert_within_budget(first, exact(x, one), baseline)
    # From the rounded first result, which is what goes on.
    assert_within_budget(second, exact(first, two), fair)
    same = [(a == add_norm(b, **c)[1]).float().mean() for a, b, c in ((first, x, one), (second, first, two))]
    assert same[1] > 0.99 if backend.name in TRITON else same == [1, 1]


@pytest.mark.parametrize("width", [33, 40, 1024])
@on(*OF_TWO, types="dtype", among=HALF_TYPES)
def test_double_layer_norm_of_a_float32_stream(backend, dtype, width):
    """Keep the first norm in float32 on the way to the second."""
    x = rows(40, width, device=backend.device)
    one, two = (options("layer", width, dtype, backend.device) for _ in range(2))
    two["weight"] = two["weight"] * 2 - 1
    named = second_options(one, two)
    first, second = double_layer_norm(strided(x), **named, out_dtype=dtype)
    assert first.dtype == torch.float32 and second.dtype == dtype
    between = exact(x, one)
    expected = exact(between, two)
    rounded = exact(between.to(dtype), two)
    assert (second.double() - expected).abs().mean() < (rounded.to(dtype).double() - expected).abs().mean()
    baseline = None, expected.to(dtype)
    if backend.name in TRITON:
        with clvp_fast.backend("torch"):
            baseline = double_layer_norm(x, **named, out_dtype=dtype)
    assert_within_budget(first, between, baseline[0])
    assert_within_budget(second, expected, baseline[1])


@on(*TRITON)
def test_double_layer_norm_memory_and_bits(backend):
    x, one = rows(17, 48, device=backend.device), options("layer", 48, device=backend.device)
    affine = (one["weight"], one["bias"], EPS, one["bias"], one["weight"], 0.1)
    first, out = (Guarded(17, 48, dtype=torch.float32, device=backend.device) for _ in range(2))
    norm.double_layer_norm(strided(x), *affine, first=first.tensor, out=out.tensor)
    first.check()
    out.check()
    named = dict(zip(("weight1", "bias1", "eps1", "weight2", "bias2", "eps2"), affine, strict=True))
    alone = double_layer_norm(x[3:4], **named)
    assert torch.equal(alone[0], first.tensor[3:4]) and torch.equal(alone[1], out.tensor[3:4])
    assert double_layer_norm(x[:0], **named)[1].shape == (0, 48)


@on("default", *TRITON)
def test_double_layer_norm_registered(backend):
    x, one = rows(2, 5, 16, device=backend.device), options("layer", 16, device=backend.device)
    affine = (one["weight"], one["bias"], EPS)
    op = torch.ops.clvp_fast.double_layer_norm.default
    opcheck(backend, op, (x, *affine, *affine))
    opcheck(backend, op, (x, affine[0], None, EPS, *affine))
    halves = HALF_TYPES if backend.name == "default" else (HALF,)
    for dtype in halves:
        opcheck(backend, op, (x, *affine, *affine, dtype))


def test_double_layer_norm_compiled_and_gradients():
    x, one = rows(2, 5, 16), options("layer", 16)
    args = (x, one["weight"], None, 1e-2, one["bias"], one["weight"], 0.3)
    named = dict(zip(("weight1", "bias1", "eps1", "weight2", "bias2", "eps2"), args[1:], strict=True))
    compiled = torch.compile(lambda x: double_layer_norm(x, **named), fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(compiled(x), double_layer_norm(x, **named), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)
    leaves = [x.double().requires_grad_(), one["weight"].double().requires_grad_()]
    affine = {"bias1": None, "eps1": 1e-2, "bias2": None, "eps2": 0.3}
    assert torch.autograd.gradcheck(lambda x, w: double_layer_norm(x, weight1=w, weight2=w * w, **affine), leaves)


def test_double_layer_norm_names_bad_arguments():
    x, one = rows(2, 5, 16), options("layer", 16)
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
