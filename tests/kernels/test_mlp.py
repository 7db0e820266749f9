"""`gelu_mlp` and `geglu_mlp` as kernels: budgets against float64 in every regime, split sums, bits, memory."""

import functools

import pytest
import torch

import clvp_fast
from clvp_fast.kernels import mlp
from clvp_fast.ops import geglu_mlp, gelu_mlp
from tests.kit import POISON, Guarded, assert_within_budget, random, strided
from tests.kit.device import DEVICE, DTYPES, times

OPERATORS = {"gelu_mlp": (gelu_mlp, 1), "geglu_mlp": (geglu_mlp, 2)}
NAMES = list(OPERATORS)


def arguments(name, dtype, rows, width=40, inner=72, outer=24):
    halves = OPERATORS[name][1]

    def draw(*shape, seed, scale=1.0):
        return random(*shape, seed=seed, dtype=dtype, scale=scale, device=DEVICE)

    tensors = [
        draw(*rows, width, seed=0),
        draw(inner * halves, width, seed=1, scale=2 * width**-0.5),
        draw(inner * halves, seed=2),
        draw(outer, inner, seed=3, scale=inner**-0.5),
        draw(outer, seed=4),
    ]
    return tensors, draw(*rows, outer, seed=5)


def check(name, tensors, residual, activation="gelu"):
    operator = OPERATORS[name][0]
    wide = [None if t is None else t.double() for t in (*tensors, residual)]
    with clvp_fast.backend("reference"):
        reference = operator(*wide[:5], residual=wide[5], activation=activation)
    with clvp_fast.backend("torch"):
        baseline = operator(*tensors, residual=residual, activation=activation)
    actual = operator(*tensors, residual=residual, activation=activation)
    assert actual.is_contiguous()
    assert_within_budget(actual, reference, baseline.clone(), times=times(actual.dtype))
    return actual


# One of each regime, and their edges; three axes, one axis.
ROWS = [(1,), (2, 8), (17,), (64,), (65,), (257,), pytest.param((4097,), marks=pytest.mark.slow)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_every_regime(name, rows, dtype):
    tensors, residual = arguments(name, dtype, rows)
    check(name, tensors, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", mlp.ACTIVATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_every_activation(name, activation, dtype):
    tensors, residual = arguments(name, dtype, (5,))
    check(name, tensors, residual, activation)


@pytest.mark.parametrize("widths", [(1, 2, 1), (33, 65, 31), (128, 64, 128), (16, 130, 200)])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_odd_sizes(name, residual, widths):
    tensors, added = arguments(name, torch.float32, (7,), *widths)
    check(name, tensors, added if residual else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [512, 1000, 1040])
@pytest.mark.parametrize("rows", [3, 70])
def test_a_sum_over_several_programs(rows, inner, dtype):
    """The parts are whole tiles, or end in the middle of one; what is left is summed in one part too."""
    assert mlp.workspace(rows, 40, inner, dtype.itemsize).partial > 0
    tensors, residual = arguments("gelu_mlp", dtype, (rows,), inner=inner, outer=40)
    check("gelu_mlp", tensors, residual)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
@pytest.mark.parametrize("inner", [72, 512])
@pytest.mark.parametrize("rows", [(3,), (2, 8), (70,), (257,)])
@pytest.mark.parametrize("name", NAMES)
def test_float32_residual_beside_a_half_type(name, rows, inner, dtype):
    """With a split sum and without: what is added to a large residual is as exact as the product alone."""
    tensors, residual = arguments(name, dtype, rows, inner=inner)
    residual = residual.float() * 300
    out = OPERATORS[name][0](*tensors, residual=residual, activation="gelu")
    assert out.dtype == torch.float32
    with clvp_fast.backend("reference"):
        product = OPERATORS[name][0](*(t.double() for t in tensors), activation="gelu")
    with clvp_fast.backend("torch"):
        baseline = OPERATORS[name][0](*tensors, activation="gelu").double()
    added, noise = out.double() - residual.double(), torch.finfo(torch.float32).eps * residual.abs().max().item()
    allowed = (baseline - product).abs().max()
    assert (added - product).abs().max() <= allowed + noise and noise < 0.2 * allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_strides(name, dtype):
    tensors, residual = arguments(name, dtype, (3, 6))
    expected = check(name, tensors, residual)
    views = [strided(t) for t in (*tensors, residual)]
    run = functools.partial(OPERATORS[name][0], activation="gelu")
    assert torch.equal(run(*views[:5], residual=views[5]), expected)
    by_columns = [t.t().contiguous().t() if t.ndim == 2 else t for t in tensors]  # as `Conv1D` keeps its weights
    assert torch.equal(run(*by_columns, residual=residual), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("inner", [72, 512])
def test_all_is_written_and_nothing_else(name, inner, dtype):
    tensors, residual = arguments(name, dtype, (19,), inner=inner)
    hidden = Guarded(19, inner, dtype=dtype, device=DEVICE)
    out = Guarded(19, 24, dtype=dtype, device=DEVICE)
    size = mlp.workspace(19, 24, inner, dtype.itemsize)
    partial = torch.full((size.partial + 5,), POISON, device=DEVICE)
    arrivals = torch.full((size.arrivals + 5,), 77, dtype=torch.int32, device=DEVICE)
    scratch = {"partial": partial, "arrivals": arrivals}
    mlp.mlp(*tensors, residual, "gelu", name == "geglu_mlp", hidden=hidden.tensor, out=out.tensor, **scratch)
    hidden.check("hidden")
    out.check("out")
    assert torch.equal(out.tensor, OPERATORS[name][0](*tensors, residual=residual, activation="gelu"))
    assert partial[size.partial :].isnan().all() and (arrivals[size.arrivals :] == 77).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_bits(name, dtype):
    """The same twice, and a row the same alone and among sixteen others."""
    tensors, residual = arguments(name, dtype, (17,), inner=512)
    run = OPERATORS[name][0]
    whole = run(*tensors, residual=residual)
    assert torch.equal(run(*tensors, residual=residual), whole)
    for row in (0, 9, 16):
        alone = run(tensors[0][row : row + 1], *tensors[1:], residual=residual[row : row + 1])
        assert torch.equal(alone[0], whole[row])
    more, added = (t.repeat(3, 1)[:40] for t in (tensors[0], residual))
    assert torch.equal(run(more, *tensors[1:], residual=added)[:17], whole)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "quick_gelu", "silu", "relu"])
def test_extreme_values(name, activation):
    """Activations saturate where their exponentials overflow, and NaN stays NaN."""
    operator, halves = OPERATORS[name]
    x = torch.tensor([[1e4], [-1e4], [200.0], [-200.0], [0.0]], device=DEVICE)
    one, zero = torch.ones(1, 1, device=DEVICE), torch.zeros(1, device=DEVICE)
    tensors = [x, one.expand(halves, 1), zero.expand(halves), one, zero]
    with clvp_fast.backend("reference"):
        expected = operator(*(t.double() for t in tensors), activation=activation)
    torch.testing.assert_close(operator(*tensors, activation=activation).double(), expected, rtol=1e-6, atol=1e-6)
    assert operator(x * POISON, *tensors[1:], activation=activation).isnan().all()


def test_no_rows():
    tensors, residual = arguments("gelu_mlp", torch.float32, (0, 3))
    assert gelu_mlp(*tensors, residual=residual).shape == (0, 3, 24)


@pytest.mark.parametrize("name", NAMES)
def test_the_registered_operator(name):
    tensors, residual = arguments(name, torch.float32, (2, 3), inner=512)
    for added in (residual, None):
        torch.library.opcheck(getattr(torch.ops.clvp_fast, name).default, (*tensors, added, "gelu"))
    half = [tensor.half() for tensor in tensors]
    torch.library.opcheck(getattr(torch.ops.clvp_fast, name).default, (*half, residual, "gelu"))


@pytest.mark.parametrize("name", NAMES)
def test_what_the_kernel_does_not_serve(name):
    operator = OPERATORS[name][0]
    tensors, _ = arguments(name, torch.float32, (2, 3))
    with pytest.raises(RuntimeError, match=f"{name} was forced .* activation must be one of gelu, .*, not 'mish'"):
        operator(*tensors, activation="mish")
    with pytest.raises(RuntimeError, match=r"x must be float32, float16 or bfloat16, not torch\.float64"):
        operator(*(t.double() for t in tensors))
    with pytest.raises(RuntimeError, match="an input requires grad"):
        operator(tensors[0].requires_grad_(), *tensors[1:])
