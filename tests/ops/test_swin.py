"""`window_block` and `mlp_block`: every backend against float64; layouts, bits and bad numbers of the CPU's kernels;
the choice between one kernel and parts; bad input."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import clvp_fast
from clvp_fast.ops import mlp_block, swin, window_block
from tests.kit import assert_within_budget, at_threads, isa, random, strided
from tests.kit.backends import on
from tests.ops.test_window_attention import eager as eager_attention

EPS = 1e-5
ACTIVATIONS = {"gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh")}


def window_operands(height, width, window, heads, head_dim, dtype=torch.float32, batch=2):
    channels = heads * head_dim
    return (
        random(batch, height, width, channels, seed=0, dtype=dtype),
        1 + random(channels, seed=1, dtype=dtype, scale=0.2),
        random(channels, seed=2, dtype=dtype, scale=0.2),
        random(3 * channels, channels, seed=3, dtype=dtype, scale=1.5 * channels**-0.5),
        random(3 * channels, seed=4, dtype=dtype, scale=0.2),
        random(heads, window**2, window**2, seed=5, dtype=dtype),
        random(channels, channels, seed=6, dtype=dtype, scale=channels**-0.5),
        random(channels, seed=7, dtype=dtype, scale=0.2),
    )


def mlp_operands(rows, channels, inner, dtype=torch.float32):
    return (
        random(rows, channels, seed=0, dtype=dtype),
        1 + random(channels, seed=1, dtype=dtype, scale=0.2),
        random(channels, seed=2, dtype=dtype, scale=0.2),
        random(inner, channels, seed=3, dtype=dtype, scale=channels**-0.5),
        random(inner, seed=4, dtype=dtype, scale=0.2),
        random(channels, inner, seed=5, dtype=dtype, scale=inner**-0.5),
        random(channels, seed=6, dtype=dtype, scale=0.2),
    )


def run_window(*args):
    return window_block(*args, window=4, shift=2, eps=EPS)


def run_mlp(*args):
    return mlp_block(*args, activation="gelu", eps=EPS)


CASES = {
    "window_block": (run_window, window_operands(16, 16, 4, 2, 16)),
    "mlp_block": (run_mlp, mlp_operands(600, 32, 96)),
}
cases = pytest.mark.parametrize("name", CASES)


def eager(x, norm_weight, norm_bias, w_first, b_first, *others, window=4, shift=2, activation="gelu"):
    """Compute either half as transformers does: each step by itself."""
    normed = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, EPS)
    inner = F.linear(normed, w_first, b_first)
    if x.ndim == 4:
        bias, w_last, b_last = others
        q, k, v = (part.unflatten(-1, (len(bias), -1)) for part in inner.chunk(3, -1))
        inner = eager_attention(q, k, v, bias, window, shift)[0].flatten(-2)
    else:
        inner, (w_last, b_last) = ACTIVATIONS[activation](inner), others
    return x + F.linear(inner, w_last, b_last)


@cases
@on("default", "torch", "reference", types="dtype")
def test_against_eager_code(backend, dtype, name):
    run, args = CASES[name]
    args = [arg.to(dtype) for arg in args]
    out = run(*args)
    assert out.dtype == dtype and out.shape == args[0].shape and out.is_contiguous()
    assert_within_budget(out, eager(*(arg.double() for arg in args)), eager(*args))


def wide(args):
    return [None if arg is None else arg.double() for arg in args]


def in_plain_torch(parts, args):
    with clvp_fast.backend("torch"):
        return parts(*args)


def check_window(args):
    actual = swin._window_native(*args)
    assert actual.is_contiguous() and actual.dtype == args[0].dtype
    *tensors, window, shift, _ = args
    expected = eager(*wide(tensors), window=window, shift=shift)
    assert_within_budget(actual, expected, in_plain_torch(swin._window_parts, args))
    return actual


def check_mlp(args):
    actual = swin._mlp_native(*args)
    assert actual.is_contiguous() and actual.dtype == args[0].dtype
    *tensors, activation, _ = args
    expected = eager(*wide(tensors), activation=activation)
    assert_within_budget(actual, expected, in_plain_torch(swin._mlp_parts, args))


# Channels of checkpoints and around a group of 48 columns; heads around a vector; places that fill no vector.
@pytest.mark.parametrize(
    "height, width, window, shift, heads, head_dim",
    [
        (16, 8, 8, 4, 4, 24),
        (8, 8, 8, 0, 1, 32),
        (14, 7, 7, 3, 2, 32),
        (4, 6, 2, 1, 8, 4),
        (3, 3, 3, 0, 1, 128),
        (5, 4, 1, 0, 2, 16),
        (24, 12, 12, 5, 3, 32),
    ],
)
@on("cpu", types="dtype")
def test_window_block(backend, dtype, height, width, window, shift, heads, head_dim):
    args = window_operands(height, width, window, heads, head_dim, dtype)
    check_window((*args, window, shift, EPS))


@on("cpu", types="dtype")
def test_window_block_without_biases(backend, dtype):
    args = list(window_operands(8, 16, 4, 2, 16, dtype))
    for absent in ((2,), (4,), (7,), (2, 4, 7)):
        given = [None if i in absent else arg for i, arg in enumerate(args)]
        check_window((*given, 4, 2, EPS))


@on("cpu", types="dtype")
def test_window_block_of_strided_tensors(backend, dtype):
    x, norm_weight, norm_bias, w_qkv, b_qkv, bias, w_out, b_out = window_operands(8, 8, 4, 2, 16, dtype)
    expected = check_window((x, norm_weight, norm_bias, w_qkv, b_qkv, bias, w_out, b_out, 4, 2, EPS))
    gathered = bias.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    rows = [torch.cat([w, w], 1)[:, : w.shape[1]] for w in (w_qkv, w_out)]  # further apart than they are long
    others = strided(x), strided(norm_weight), strided(norm_bias), rows[0], strided(b_qkv), gathered, rows[1], b_out
    assert torch.equal(swin._window_native(*others, 4, 2, EPS), expected)


@on("cpu", types="dtype")
def test_an_image_has_the_bits_that_it_has_alone(backend, dtype):
    x, *others = window_operands(16, 16, 8, 2, 16, dtype, batch=3)
    together = swin._window_native(x, *others, 8, 4, EPS)
    for _ in at_threads(1, 3):
        for image in range(3):
            alone = swin._window_native(x[image : image + 1], *others, 8, 4, EPS)
            assert torch.equal(alone[0], together[image])


@on("cpu", types="dtype")
def test_large_offsets_and_small_variances(backend, dtype):
    """Lose no digits of float32 statistics by a mean far from zero, and keep eps in the root."""
    x, *others = window_operands(4, 4, 4, 2, 16, dtype)
    check_window((x + 30, *others, 4, 0, EPS))
    check_window((x * 1e-3, *others, 4, 0, EPS))


@on("cpu", types="dtype")
def test_a_bad_number_spoils_its_window_alone(backend, dtype):
    x, *others = window_operands(8, 8, 4, 2, 16, dtype)
    whole = swin._window_native(x, *others, 4, 0, EPS)
    x[0, 1, 2, 3] = torch.nan
    out = swin._window_native(x, *others, 4, 0, EPS)
    assert out[0, :4, :4].isnan().all()
    assert torch.equal(out[0, 4:], whole[0, 4:]) and torch.equal(out[1:], whole[1:])


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@pytest.mark.parametrize("rows, channels, inner", [(1, 32, 32), (9, 96, 384), (130, 64, 96), (40, 384, 32)])
@on("cpu", types="dtype")
def test_mlp_block(backend, dtype, rows, channels, inner, activation):
    args = (*mlp_operands(rows, channels, inner, dtype), activation, EPS)
    check_mlp(args)
    check_mlp([None if i == 2 else arg for i, arg in enumerate(args)])


@on("cpu", types="dtype")
def test_a_row_has_the_bits_that_it_has_alone(backend, dtype):
    x, *weights = mlp_operands(300, 64, 96, dtype)
    together = swin._mlp_native(x, *weights, "gelu", EPS)
    for row in (0, 7, 8, 127, 128, 299):
        assert torch.equal(swin._mlp_native(x[row : row + 1], *weights, "gelu", EPS)[0], together[row])


class Called(TorchDispatchMode):
    """The package's operators that are run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "clvp_fast":
            self.names.add(function._schema.name.partition("::")[2])
        return function(*args, **(kwargs or {}))


def called(run, *args):
    with Called() as seen:
        run(*args)
    return seen.names


@isa.needs("many rows")
@cases
def test_one_kernel_where_it_serves_and_pays(name):
    run, args = CASES[name]
    assert called(run, *args) == {name}
    leaf = args[1].clone().requires_grad_()
    assert name not in called(run, args[0], leaf, *args[2:])
    with torch.no_grad():
        assert called(run, args[0], leaf, *args[2:]) == {name}
    assert name not in called(run, args[0][:1, :4, :4] if name == "window_block" else args[0][:9], *args[1:])
    with clvp_fast.backend("torch"):
        assert not called(run, *args)
    with torch.autocast("cpu", torch.bfloat16):
        assert name not in called(run, *args)
    assert name not in called(run, *(arg.half() for arg in args))
    mixed = [args[0], args[1].bfloat16(), args[2].bfloat16(), *args[3:]]
    assert name not in called(run, *mixed)


@cases
def test_gradients(name):
    run, args = {
        "window_block": (run_window, window_operands(4, 4, 4, 2, 3, torch.float64, batch=1)),
        "mlp_block": (run_mlp, mlp_operands(3, 4, 6, torch.float64)),
    }[name]
    leaves = [arg.requires_grad_() for arg in args]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@cases
def test_compiles_whole(name):
    run, args = CASES[name]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), run(*args))


@cases
def test_empty_inputs(name):
    run, args = CASES[name]
    assert run(args[0][:0], *args[1:]).shape == args[0][:0].shape


@pytest.mark.parametrize(
    "index, change, message",
    [
        (0, lambda x: x[0], r"x must have shape \[batch, height, width, channels\]"),
        (1, lambda x: x[1:], r"norm_weight must have shape \[32\], not \[31\]"),
        (2, lambda x: x[1:], r"norm_bias must have shape \[32\]"),
        (3, lambda x: x[1:], r"w_qkv must have shape \[96, 32\]"),
        (4, lambda x: x[1:], r"b_qkv must have shape \[96\]"),
        (5, lambda x: x[:, 1:], r"bias must have shape \[2, 16, 16\]"),
        (
            5,
            lambda x: torch.cat([x, x[:1]]),
            "the heads of bias must divide the channels of x, and 3 does not divide 32",
        ),
        (5, lambda x: x[:0], "the heads of bias must divide the channels of x, and 0 does not divide 32"),
        (6, lambda x: x[1:], r"w_out must have shape \[32, 32\]"),
        (7, lambda x: x[1:], r"b_out must have shape \[32\]"),
        (0, lambda x: x[:, 1:], "window must divide the image, 15 x 16, and 4 does not: pad the image"),
        (6, lambda x: x.to("meta"), "w_out is on meta and x on cpu: move them to one device"),
    ],
)
def test_bad_operands_of_window_block(index, change, message):
    args = list(CASES["window_block"][1])
    args[index] = change(args[index])
    with pytest.raises(ValueError, match=message):
        run_window(*args)


def test_bad_options():
    args = CASES["window_block"][1]
    for shift in (-1, 4):
        with pytest.raises(ValueError, match=rf"shift must be from 0 to window - 1 = 3, not {shift}"):
            window_block(*args, window=4, shift=shift, eps=EPS)
    with pytest.raises(ValueError, match="window must divide the image"):
        window_block(*args, window=0, eps=EPS)
    with pytest.raises(ValueError, match=r"activation must be one of gelu, .* not 'gello'"):
        mlp_block(*CASES["mlp_block"][1], activation="gello", eps=EPS)


@pytest.mark.parametrize(
    "index, message",
    [
        (1, r"norm_weight must have shape \[32\], not \[31\]"),
        (2, r"norm_bias must have shape \[32\]"),
        (3, r"b_in must have shape \[95\]"),
        (4, r"b_in must have shape \[96\]"),
        (5, r"w_out must have shape \[32, 96\]"),
        (6, r"b_out must have shape \[32\]"),
    ],
)
def test_bad_operands_of_mlp_block(index, message):
    args = list(CASES["mlp_block"][1])
    args[index] = args[index][1:]
    with pytest.raises(ValueError, match=message):
        run_mlp(*args)


def test_other_types_of_one_call():
    """Do as the operators of the parts: norms may have weights of another type, products may not."""
    args = CASES["mlp_block"][1]
    wide = [arg.float() if index in (1, 2) else arg.bfloat16() for index, arg in enumerate(args)]
    torch.testing.assert_close(run_mlp(*wide), run_mlp(*(arg.bfloat16() for arg in args)), rtol=0, atol=0.1)
    with pytest.raises(TypeError, match=r"w_in must have the dtype of x, torch\.float32, not torch\.bfloat16"):
        run_mlp(*(arg.bfloat16() if index == 3 else arg for index, arg in enumerate(args)))
