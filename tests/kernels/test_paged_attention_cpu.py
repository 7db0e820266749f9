"""The CPU's kernel of the decode step, on every instruction set of this machine, with the bodies of the GPU's tests."""

import warnings

import pytest
import torch

import clvp_fast
from clvp_fast.ops import paged_attention as op
from clvp_fast.ops.paged_attention import decode_reference
from tests.kernels import test_paged_attention as bodies
from tests.kernels.test_paged_attention import PREFIX_INDEX, PREFIX_LENS, copied, decode, step
from tests.kit import Guarded, assert_within_budget, strided
from tests.kit.isa import needs_library, run_on

pytestmark = [
    needs_library,
    pytest.mark.skipif(bodies.DEVICE != "cpu", reason="the arguments lie on the GPU"),
]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=["avx512bf16", "avx512", "avx2", "portable"], autouse=True)
def isa(request):
    run_on(request, request.param)
    with clvp_fast.backend(None):  # where a kernel is forced on a CPU, it is Triton's, interpreted
        yield request.param


def check(args):
    assert clvp_fast.explain("paged_attention_decode", "cpu")[0].backend == "kernel"
    exact, active = copied(args, wide=True), args[6] >= 0
    expected = decode_reference(*exact)
    with clvp_fast.backend("torch"):
        baseline = decode(copied(args))
    out = decode(args)
    assert_within_budget(out[active], expected[active], baseline[active])
    assert (out[~active] == 0).all()
    for i in (3, 4):
        assert torch.equal(args[i], exact[i].to(args[i].dtype))


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(dtype, prefix):
    check(step(dtype, prefix_lens=PREFIX_LENS if prefix else None))


@pytest.mark.parametrize("dim", [16, 48, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_widths_and_pages_of_other_sizes(dtype, dim):
    check(step(dtype, [31, 32, 33, 150], [65, 32], [1, 0, -1, 1], dim=dim, page=32))
    check(step(dtype, [4, 5, 6], dim=dim, page=5))


@pytest.mark.parametrize("dim", [24, 40, 144, 160, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_widths_that_it_does_not_serve(dtype, dim):
    """Torch's path does, and a kernel that is asked for says why not."""
    args = step(dtype, dim=dim)
    exact = copied(args, wide=True)
    expected = decode_reference(*exact)
    with clvp_fast.backend("torch"):
        baseline = decode(copied(args))
    assert f"a multiple of 16 up to 128, not {dim}" in op._decode_why_not_cpu(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once, that the kernel does not serve
        out = decode(args)
    active = args[6] >= 0
    assert_within_budget(out[active], expected[active], baseline[active])
    assert torch.equal(out, baseline)


@pytest.mark.parametrize("dim", [16, 48, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_only_token_comes_back_bit_for_bit(dtype, dim):
    args = step(dtype, [0, 0, 0], None, dim=dim)
    assert torch.equal(decode(args), args[2])


@pytest.mark.parametrize("candidates", [1, 3, 4, 9])
def test_heads_that_the_items_of_a_candidate_do_not_divide(candidates):
    check(step(lengths=[40] * candidates, prefix_lens=None, heads=5))


def test_decode_of_strided_arguments():
    bodies.test_decode_of_strided_arguments()


def test_extreme_scores():
    bodies.test_extreme_scores(decode)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_candidate_has_the_same_bits_alone_and_in_any_company(dtype, monkeypatch):
    bodies.test_a_candidate_has_the_same_bits_alone_and_in_any_company(dtype, monkeypatch)


def test_the_same_bits_on_any_number_of_threads(monkeypatch):
    args = step(lengths=[60 + 7 * i for i in range(9)], prefix_lens=PREFIX_LENS, index=PREFIX_INDEX, heads=4, dim=128)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(decode(copied(args)))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_request_that_is_not_a_number_spoils_no_other():
    bodies.test_a_request_that_is_not_a_number_spoils_no_other()


def test_what_does_not_exist_is_left_out():
    bodies.test_what_does_not_exist_is_left_out()


def test_an_unknown_request_is_none():
    bodies.test_an_unknown_request_is_none()


def test_reads_and_writes_nothing_else(monkeypatch):
    args = step(lengths=[*bodies.LENGTHS[:-1], 70], heads=1)
    expected = decode(copied(args))
    bodies.poison_unused(args)
    guarded = Guarded(*args[0].shape, dtype=torch.float32)
    monkeypatch.setattr(torch, "empty_like", lambda *_, **__: guarded.tensor)
    assert torch.equal(decode(args), expected)
    guarded.check()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda args: [x.half() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args],
            "float32 and bfloat16",
        ),
        (
            lambda args: [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args],
            "float32 and bfloat16",
        ),
        (lambda args: [*args[:4], strided(args[4]), *args[5:]], "the same strides"),
    ],
)
def test_what_it_does_not_serve_takes_the_torch_path(change, reason):
    args = change(step())
    with clvp_fast.backend("torch"):
        expected = decode(copied(args))
    op._DECODE._warned.clear()
    with pytest.warns(UserWarning, match=reason):
        assert torch.equal(decode(args), expected)
