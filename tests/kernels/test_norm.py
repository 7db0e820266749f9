"""`add_norm` and `double_layer_norm` as kernels: budgets against float64, bits of transformers' RMSNorm, memory."""

from pathlib import Path

import pytest
import torch
from transformers.models.clvp.modeling_clvp import ClvpRMSNorm

import clvp_fast
from clvp_fast.kernels import norm
from clvp_fast.ops.norm import add_norm, double_layer_norm
from tests.kit import Guarded, assert_within_budget, random, strided
from tests.kit.device import DEVICE, DTYPES

EPS = 1e-2


def options(kind, width, dtype, bias=True):
    weight, offset = (random(width, seed=seed, dtype=dtype, device=DEVICE) for seed in (1, 2))
    return {"weight": weight, "bias": offset if kind == "layer" and bias else None, "eps": EPS, "kind": kind}


def rows(*shape, dtype, seed=0):
    return random(*shape, seed=seed, dtype=dtype, scale=3.0, device=DEVICE) + 1


HALF = torch.float16
HALF_TYPES = [dtype for dtype in DTYPES if dtype != torch.float32]


def exact(total, settings):
    wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in settings.items()}
    total = total.double()
    if settings["kind"] == "rms":  # the operator's reference is float32 here by definition
        return wide["weight"] * total / (total.square().mean(-1, keepdim=True) + EPS).sqrt()
    with clvp_fast.backend("reference"):
        return add_norm(total, **wide)[1]


def check(x, residual, settings):
    total, normed = add_norm(x, residual, **settings)
    with clvp_fast.backend("torch"):
        torch_total, baseline = add_norm(x, residual, **settings)
    assert total is x if residual is None else torch.equal(total, torch_total)
    assert_within_budget(normed, exact(torch_total, settings), baseline.clone())
    return total, normed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("width", [1, 2, 33, 768, 1025])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_against_reference(kind, width, dtype, residual):
    if kind == "layer" and width == 1:  # the bias alone
        x, settings = rows(3, 1, dtype=dtype), options("layer", 1, dtype)
        assert torch.equal(add_norm(x, x if residual else None, **settings)[1], settings["bias"].expand(3, 1))
        return
    count = 70 if width < 40 else 3
    x = rows(count, width, dtype=dtype)
    check(x, rows(count, width, dtype=dtype, seed=3) if residual else None, options(kind, width, dtype))


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
@pytest.mark.parametrize("width", [33, 768])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_float32_residual_beside_a_half_type(kind, width, out_dtype, dtype):
    x, settings = rows(20, width, dtype=dtype), options(kind, width, dtype)
    r = rows(20, width, dtype=torch.float32, seed=3) * 300
    total, normed = add_norm(x, r, **settings, out_dtype=out_dtype)
    assert total.dtype == torch.float32 and torch.equal(total, x.float() + r)
    assert normed.dtype == (out_dtype or dtype)
    expected = exact(total, settings)
    assert_within_budget(normed, expected, expected.to(normed.dtype))
    if normed.dtype == dtype:  # rounded once: twice would differ in one of ten
        assert (normed == expected.to(dtype)).float().mean() > 0.98
    alone = add_norm(x[7:8], r[7:8], **settings, out_dtype=out_dtype)
    assert torch.equal(alone[0], total[7:8]) and torch.equal(alone[1], normed[7:8])
    # The stream alone, as a layer's first norm sees it.
    again = add_norm(total, **settings, out_dtype=out_dtype or dtype)
    assert again[0] is total and torch.equal(again[1], normed)


@pytest.mark.parametrize("width", [3000, 8192])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_wide_rows(kind, width):
    check(
        rows(2, width, dtype=torch.float16),
        rows(2, width, dtype=torch.float16, seed=3),
        options(kind, width, torch.float16),
    )


@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_rounds_where_transformers_does(dtype, weight_dtype):
    """The same bits, but where a sum of squares in another order moved a rounding: a few last places."""
    x = random(60, 768, seed=0, dtype=dtype, scale=2.0, device=DEVICE)
    theirs = ClvpRMSNorm(768, eps=1e-5)
    theirs.weight.data = random(768, seed=1, dtype=weight_dtype or dtype, device=DEVICE)
    with torch.no_grad():
        ours, expected = add_norm(x, weight=theirs.weight, eps=1e-5, kind="rms")[1], theirs(x)
    assert ours.dtype == expected.dtype
    same = (ours == expected).float().mean()
    assert same > (0.99 if dtype != torch.float32 else 0.3)
    torch.testing.assert_close(ours, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_extreme_rows(kind):
    """Constant rows, zeros, and a mean 10000 times the deviation, which E[x^2] - E[x]^2 would lose."""
    settings = options(kind, 768, torch.float32)
    x = random(4, 768, seed=4, device=DEVICE)
    x[0], x[1] = 0.0, 1e4
    x[2] += 1e4
    x[3] *= 1e17
    if kind == "layer":
        normed = add_norm(x, **settings)[1]
        assert torch.equal(normed[:2], settings["bias"].expand(2, -1))
        shifted = exact(x[2:3], settings)
        assert (normed[2] - shifted[0]).abs().max() < 0.01  # the mean's own rounding is 0.0005 deviations
        check(x[3:], None, settings)
    else:
        check(x, None, settings)


def test_nothing_is_read_or_written_outside():
    for kind in ("rms", "layer"):
        x, settings = rows(19, 40, dtype=torch.float32), options(kind, 40, torch.float32)
        r = rows(19, 40, dtype=torch.float32, seed=3)
        expected = add_norm(x, r, **settings)
        total, out = (Guarded(19, 40, dtype=torch.float32, device=DEVICE) for _ in range(2))
        poisoned = [None if settings[name] is None else strided(settings[name]) for name in ("weight", "bias")]
        norm.add_norm(strided(x), strided(r), *poisoned, EPS, kind, total=total.tensor, out=out.tensor)
        for guarded, wanted in ((total, expected[0]), (out, expected[1])):
            guarded.check()
            torch.testing.assert_close(guarded.tensor, wanted, rtol=1e-6, atol=1e-6)
        total, out = Guarded(19, 40, dtype=torch.float32, device=DEVICE), Guarded(19, 40, dtype=HALF, device=DEVICE)
        norm.add_norm(strided(x.to(HALF)), strided(r), *poisoned, EPS, kind, total=total.tensor, out=out.tensor)
        total.check()
        out.check()
        assert torch.equal(total.tensor, x.to(HALF).float() + r)


def test_layouts():
    """Any leading axes, rows at a stride, columns at a stride, broadcast residuals, no rows at all."""
    settings = options("layer", 48, torch.float32)
    x = rows(2, 3, 48, dtype=torch.float32)
    r = rows(48, dtype=torch.float32, seed=3).expand(2, 3, 48)
    expected = add_norm(x, r.contiguous(), **settings)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    affine = {name: strided(settings[name][:, None].expand(-1, 2).contiguous())[:, 0] for name in ("weight", "bias")}
    for source in (x, strided(x), turned, x.transpose(0, 1).contiguous().transpose(0, 1)):
        for actual, wanted in zip(add_norm(source, r, **settings | affine), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(add_norm(turned[1], r[1], **settings)[1], expected[1][1], rtol=1e-6, atol=1e-6)
    assert torch.equal(add_norm(x[0, 0], r[0, 0], **settings)[1], expected[1][0, 0])
    total, normed = add_norm(x[:0], r[:0], **settings)
    assert total.shape == normed.shape == (0, 3, 48)


@pytest.mark.parametrize("width", [40, 768])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_bits_do_not_depend_on_the_batch(kind, width):
    settings, x = options(kind, width, torch.float16), rows(17, width, dtype=torch.float16)
    r = rows(17, width, dtype=torch.float16, seed=3)
    whole, again, alone = (add_norm(a, b, **settings) for a, b in ((x, r), (x, r), (x[11:12], r[11:12])))
    for first, second, one in zip(whole, again, alone, strict=True):
        assert torch.equal(first, second) and torch.equal(first[11:12], one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("width", [33, 1024])
def test_double_layer_norm(width, biased, dtype):
    x = rows(5, width, dtype=dtype)
    one, two = (options("layer", width, dtype, bias) for bias in biased)
    two["weight"] = two["weight"] * 2 - 1
    given = {"weight1": one["weight"], "bias1": one["bias"], "eps1": EPS}
    given |= {"weight2": two["weight"], "bias2": two["bias"], "eps2": 0.5}
    first, second = double_layer_norm(strided(x), **given)
    with clvp_fast.backend("torch"):
        baseline = double_layer_norm(x, **given)
        fair = double_layer_norm(first, **given | {"weight1": two["weight"], "bias1": two["bias"], "eps1": 0.5})[0]
    assert_within_budget(first, exact(x, one), baseline[0])
    # From the rounded first result, which is what goes on.
    with clvp_fast.backend("reference"):
        wide = {"weight": two["weight"].double(), "bias": None if two["bias"] is None else two["bias"].double()}
        expected = add_norm(first.double(), **wide, eps=0.5, kind="layer")[1]
    assert_within_budget(second, expected, fair)
    again = add_norm(first, weight=two["weight"], bias=two["bias"], eps=0.5, kind="layer")[1]
    assert (second == again).float().mean() > 0.99


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("width", [33, 1024])
def test_double_layer_norm_of_a_float32_stream(width, dtype):
    x = rows(5, width, dtype=torch.float32)
    one, two = options("layer", width, dtype), options("layer", width, dtype)
    two["weight"] = two["weight"] * 2 - 1
    given = {"weight1": one["weight"], "bias1": one["bias"], "eps1": EPS}
    given |= {"weight2": two["weight"], "bias2": two["bias"], "eps2": EPS}
    first, second = double_layer_norm(strided(x), **given, out_dtype=dtype)
    assert first.dtype == torch.float32 and second.dtype == dtype
    with clvp_fast.backend("torch"):
        baseline = double_layer_norm(x, **given, out_dtype=dtype)
    assert_within_budget(first, exact(x, one), baseline[0])
    assert_within_budget(second, exact(exact(x, one), two), baseline[1])


def test_double_layer_norm_memory_and_bits():
    x, one = rows(17, 48, dtype=torch.float32), options("layer", 48, torch.float32)
    affine = (one["weight"], one["bias"], EPS, one["bias"], one["weight"], 0.1)
    first, out = (Guarded(17, 48, dtype=torch.float32, device=DEVICE) for _ in range(2))
    norm.double_layer_norm(strided(x), *affine, first=first.tensor, out=out.tensor)
    first.check()
    out.check()
    named = dict(zip(("weight1", "bias1", "eps1", "weight2", "bias2", "eps2"), affine, strict=True))
    alone = double_layer_norm(x[3:4], **named)
    assert torch.equal(alone[0], first.tensor[3:4]) and torch.equal(alone[1], out.tensor[3:4])
    assert double_layer_norm(x[:0], **named)[1].shape == (0, 48)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_registered(kind, residual):
    x, settings = rows(2, 5, 16, dtype=torch.float32), options(kind, 16, torch.float32)
    r = rows(2, 5, 16, dtype=torch.float32, seed=3) if residual else None
    torch.library.opcheck(torch.ops.clvp_fast.add_norm.default, (x, r, *settings.values()))
    affine = (settings["weight"], settings["bias"], EPS)
    torch.library.opcheck(torch.ops.clvp_fast.double_layer_norm.default, (x, *affine, *affine))
    # float32 beside a half type: results of two types.
    half = [value.half() if isinstance(value, torch.Tensor) else value for value in settings.values()]
    mixed = (x.half(), r, *half) if residual else (x, r, *half, torch.float16)
    torch.library.opcheck(torch.ops.clvp_fast.add_norm.default, mixed)
    torch.library.opcheck(torch.ops.clvp_fast.double_layer_norm.default, (x, *affine, *affine, torch.float16))


def test_what_is_not_served_is_named():
    x, settings = rows(2, 16, dtype=torch.float32), options("layer", 16, torch.float32)
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in settings.items()}
    for given, change, message in (
        (x.double(), wide, "float32, float16 or bfloat16, not torch.float64"),
        (x, wide, "float32, float16 or bfloat16, not torch.float64"),
        (x, settings | {"out_dtype": torch.float64}, "float32, float16 or bfloat16, not torch.float64"),
        (rows(1, 8193, dtype=torch.float32), options("rms", 8193, torch.float32), "at most 8192 wide, not 8193"),
    ):
        with pytest.raises(RuntimeError, match=message):
            add_norm(given, **change)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad"):
        add_norm(x.clone().requires_grad_(), **settings)


def test_the_example_of_the_document():
    document = (Path(__file__).parents[2] / "docs/kernels.md").read_text()
    example = document.split("```python\n")[1].split("```")[0]
    x, residual, weight = (rows(*shape, dtype=torch.float16, seed=9) for shape in ((3, 40), (3, 40), (40,)))
    total, out = torch.empty_like(x), torch.empty_like(x)
    exec(example, {"x": x, "residual": residual, "weight": weight, "total": total, "out": out})
    expected = add_norm(x, residual, weight=weight, eps=1e-5, kind="rms")
    assert torch.equal(total, expected[0]) and torch.equal(out, expected[1])
