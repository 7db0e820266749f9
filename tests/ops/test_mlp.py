"""`gelu_mlp` and `geglu_mlp`: every backend against float64 in every regime; activations of transformers' table; split
sums, bits, memory, gradients. Errors and the choice of a kernel are in test_mlp_calls.py, int8 weights in
test_mlp_int8.py.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

import clvp_fast
from clvp_fast.kernels import mlp
from clvp_fast.ops import ACTIVATIONS, geglu_mlp, gelu_mlp
from tests.kit import POISON, Guarded, assert_within_budget, random, strided
from tests.kit.backends import TRITON, on

OPERATORS = {"gelu_mlp": (gelu_mlp, 1), "geglu_mlp": (geglu_mlp, 2)}
NAMES = pytest.mark.parametrize("name", OPERATORS)
HALF_TYPES = (torch.bfloat16, torch.float16)
# transformers' own rounds between its steps.
FUSED = {"gelu": F.gelu, "gelu_new": functools.partial(F.gelu, approximate="tanh"), "selu": F.selu, "elu": F.elu}


def arguments(name, dtype=torch.float32, rows=(2, 7), width=40, inner=72, outer=24, device="cpu"):
    """x, weights and biases of two layers; a residual."""
    halves = OPERATORS[name][1]

    def draw(*shape, seed, scale=1.0):
        return random(*shape, seed=seed, dtype=dtype, scale=scale, device=device)

    tensors = [
        draw(*rows, width, seed=0),
        draw(inner * halves, width, seed=1, scale=2 * width**-0.5),
        draw(inner * halves, seed=2),
        draw(outer, inner, seed=3, scale=inner**-0.5),
        draw(outer, seed=4),
    ]
    return tensors, draw(*rows, outer, seed=5)


def plain(name, x, w_in, b_in, w_out, b_out, residual, activation):
    hidden = x @ w_in.T + b_in
    act = FUSED.get(activation) or ACT2FN[activation]
    hidden = act(hidden) if name == "gelu_mlp" else hidden.chunk(2, -1)[0] * act(hidden.chunk(2, -1)[1])
    out = hidden @ w_out.T + b_out
    return out if residual is None else out + residual


def check(backend, name, tensors, residual, activation="gelu"):
    """Compare a kernel with torch's implementation, and that with plain torch."""
    operator = OPERATORS[name][0]
    kept = None if residual is None else residual.clone()
    actual = operator(*tensors, residual=residual, activation=activation)
    assert actual.is_contiguous() and (residual is None or torch.equal(residual, kept))
    wide = [None if t is None else t.double() for t in (*tensors, residual)]
    if backend.name in TRITON:
        with clvp_fast.backend("torch"):
            baseline = operator(*tensors, residual=residual, activation=activation).clone()
    else:
        baseline = plain(name, *tensors, residual, activation)
    assert_within_budget(actual, plain(name, *wide, activation), baseline, times=backend.times(actual.dtype))
    return actual


@pytest.fixture(params=[1, 4], ids=["one thread", "threads"])
def threads(request, monkeypatch):
    """Set several threads, for which some products are computed transposed."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [(1,), (1, 1), (3, 6), (300,)])
@pytest.mark.parametrize("residual", [False, True])
@NAMES
@on("default", "reference", types="dtype")
def test_on_threads(backend, dtype, name, residual, rows):
    tensors, added = arguments(name, dtype, rows)
    for activation in ("gelu", "gelu_new"):
        check(backend, name, tensors, added if residual else None, activation)


# One of each regime, and their edges; three axes, one axis.
@pytest.mark.parametrize(
    "rows", [(1,), (2, 8), (17,), (64,), (65,), (257,), pytest.param((4097,), marks=pytest.mark.slow)]
)
@NAMES
@on(*TRITON, types="dtype")
def test_every_regime(backend, dtype, name, rows):
    check(backend, name, *arguments(name, dtype, rows, device=backend.device))


@pytest.mark.parametrize("activation", mlp.ACTIVATIONS)
@NAMES
@on(*TRITON, types="dtype")
def test_every_activation(backend, dtype, name, activation):
    check(backend, name, *arguments(name, dtype, (5,), device=backend.device), activation)


@pytest.mark.parametrize("widths", [(1, 2, 1), (33, 65, 31), (128, 64, 128), (16, 130, 200)])
@pytest.mark.parametrize("residual", [False, True])
@NAMES
@on("default", *TRITON)
def test_odd_sizes(backend, name, residual, widths):
    tensors, added = arguments(name, torch.float32, (7,), *widths, device=backend.device)
    check(backend, name, tensors, added if residual else None)


@pytest.mark.parametrize("inner", [512, 1000, 1040])
@pytest.mark.parametrize("rows", [3, 70])
@on(*TRITON, types="dtype")
def test_a_sum_over_several_programs(backend, dtype, rows, inner):
    """Make parts of whole tiles, or parts that end in the middle of one."""
    assert mlp.workspace(rows, 40, inner, dtype.itemsize).partial > 0
    check(backend, "gelu_mlp", *arguments("gelu_mlp", dtype, (rows,), 40, inner, 40, backend.device))


def check_float32_residual(name, tensors, times):
    """Check that no digit is lost of a large residual, nor of the product that is added to it."""
    operator, activation = OPERATORS[name][0], "gelu"
    residual = 300 * random(*tensors[0].shape[:-1], len(tensors[4]), seed=5, device=tensors[0].device)
    out = operator(*tensors, residual=residual, activation=activation)
    assert out.dtype == torch.float32
    product = plain(name, *(t.double() for t in tensors), None, activation)
    with clvp_fast.backend("torch"):
        baseline = operator(*tensors, activation=activation).double()
    noise = torch.finfo(torch.float32).eps * residual.abs().max().item()
    allowed = (baseline - product).abs().max()
    assert (out.double() - residual.double() - product).abs().max() <= times * allowed + noise
    assert noise < 0.2 / times * allowed


@pytest.mark.parametrize("inner", [72, 512])
@pytest.mark.parametrize("rows", [(3,), (2, 8), (70,), (257,)])
@NAMES
@on(*TRITON, types="dtype", among=HALF_TYPES)
def test_float32_residual_beside_a_half_type(backend, dtype, name, rows, inner):
    """Compare with a split sum and with a single one."""
    check_float32_residual(name, arguments(name, dtype, rows, inner=inner, device=backend.device)[0], 1)


@pytest.mark.usefixtures("threads")
@NAMES
@on("torch", "reference", types="dtype", among=HALF_TYPES)
def test_float32_residual_beside_a_half_type_on_threads(backend, dtype, name):
    tensors, _ = arguments(name, dtype, (3, 20))
    check_float32_residual(name, tensors, 2)
    args = (*tensors, random(3, 20, 24, seed=5), "gelu")
    with clvp_fast.backend(None):
        torch.library.opcheck(getattr(torch.ops.clvp_fast, name).default, args)


@NAMES
@on("default", *TRITON, types="dtype", among=(torch.float32, *HALF_TYPES))
def test_strides(backend, dtype, name):
    tensors, residual = arguments(name, dtype, (3, 6), device=backend.device)
    expected = check(backend, name, tensors, residual)
    views = [strided(t) for t in (*tensors, residual)]
    run = functools.partial(OPERATORS[name][0], activation="gelu")
    by_columns = [t.t().contiguous().t() if t.ndim == 2 else t for t in tensors]  # as `Conv1D` keeps its weights
    for given, added in ((views[:5], views[5]), (by_columns, residual)):
        if backend.name in TRITON:
            assert torch.equal(run(*given, residual=added), expected)
        else:
            check(backend, name, given, added)


@pytest.mark.usefixtures("threads")
@NAMES
@on("default")
def test_strides_on_threads(backend, name):
    (x, w_in, b_in, w_out, b_out), r = arguments(name, rows=(2, 10))
    run = OPERATORS[name][0]
    expected = run(x, w_in, b_in, w_out, b_out, residual=r)
    views = [strided(x), w_in.T.contiguous().T, strided(b_in), w_out.T.contiguous().T, b_out]
    torch.testing.assert_close(run(*views, residual=strided(r)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inner", [72, 512])
@NAMES
@on(*TRITON, types="dtype")
def test_all_is_written_and_nothing_else(backend, dtype, name, inner):
    tensors, residual = arguments(name, dtype, (19,), inner=inner, device=backend.device)
    hidden = Guarded(19, inner, dtype=dtype, device=backend.device)
    out = Guarded(19, 24, dtype=dtype, device=backend.device)
    size = mlp.workspace(19, 24, inner, dtype.itemsize)
    partial = torch.full((size.partial + 5,), POISON, device=backend.device)
    arrivals = torch.full((size.arrivals + 5,), 77, dtype=torch.int32, device=backend.device)
    scratch = {"partial": partial, "arrivals": arrivals}
    mlp.mlp(*tensors, residual, "gelu", name == "geglu_mlp", hidden=hidden.tensor, out=out.tensor, **scratch)
    hidden.check("hidden")
    out.check("out")
    assert torch.equal(out.tensor, OPERATORS[name][0](*tensors, residual=residual, activation="gelu"))
    assert partial[size.partial :].isnan().all() and (arrivals[size.arrivals :] == 77).all()


@NAMES
@on(*TRITON, types="dtype")
def test_bits(backend, dtype, name):
    """Get the same bits twice, and for a row alone and among others of each tile up to 256 rows."""
    tensors, residual = arguments(name, dtype, (17,), inner=512, device=backend.device)
    run = OPERATORS[name][0]
    whole = run(*tensors, residual=residual)
    assert torch.equal(run(*tensors, residual=residual), whole)
    for row in (0, 9, 16):
        alone = run(tensors[0][row : row + 1], *tensors[1:], residual=residual[row : row + 1])
        assert torch.equal(alone[0], whole[row])
    more, added = (t.repeat(16, 1)[:256] for t in (tensors[0], residual))
    for rows in (40, 64, 256):
        assert torch.equal(run(more[:rows], *tensors[1:], residual=added[:rows])[:17], whole), rows


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "quick_gelu", "silu", "relu"])
@NAMES
@on(*TRITON)
def test_extreme_values(backend, name, activation):
    """Saturate activations where their exponentials overflow; NaN stays NaN."""
    operator, halves = OPERATORS[name]
    x = torch.tensor([[1e4], [-1e4], [200.0], [-200.0], [0.0]], device=backend.device)
    one, zero = torch.ones(1, 1, device=backend.device), torch.zeros(1, device=backend.device)
    tensors = [x, one.expand(halves, 1), zero.expand(halves), one, zero]
    with clvp_fast.backend("reference"):
        expected = operator(*(t.double() for t in tensors), activation=activation)
    torch.testing.assert_close(operator(*tensors, activation=activation).double(), expected, rtol=1e-6, atol=1e-6)
    assert operator(x * POISON, *tensors[1:], activation=activation).isnan().all()


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("grad", [False, True])
def test_activations_are_those_of_transformers(activation, grad):
    theirs = {"selu": F.selu, "elu": F.elu}.get(activation) or ACT2FN[activation]
    (x, w_in, b_in, w_out, b_out), _ = arguments("gelu_mlp", torch.float64)
    x.requires_grad_(grad)
    expected = F.linear(theirs(F.linear(x, w_in, b_in)), w_out, b_out)
    for backend in ("torch", "reference"):
        with clvp_fast.backend(backend):
            actual = gelu_mlp(x, w_in, b_in, w_out, b_out, activation=activation)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    if grad:
        grads = [torch.autograd.grad(out.sum(), x)[0] for out in (actual, expected)]
        torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)


@NAMES
def test_gradients(name):
    operator = OPERATORS[name][0]
    tensors, r = arguments(name, torch.float64, (3,), 4, 5, 4)
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
    tensors, r = arguments("geglu_mlp", rows=(4,))
    for backend in ("reference", "torch"):
        torch.manual_seed(0)
        with clvp_fast.backend(backend):
            drawn = torch.stack([geglu_mlp(*tensors, residual=r, dropout_p=0.4) for _ in range(400)])
        assert not torch.equal(drawn[0], drawn[1])
        deviation = (drawn.mean(0) - geglu_mlp(*tensors, residual=r)).abs() / (drawn.std(0) / 20)
        assert deviation.mean() < 1.1 and deviation.max() < 6
