"""The CPU's kernel of `sample`, on every instruction set of this machine, with the bodies of the GPU's tests."""

import pytest
import torch

import clvp_fast
from clvp_fast.ops.sampling import _OPERATOR
from tests.kernels import test_sampling as bodies
from tests.kernels.test_sampling import ALL, SETTINGS, TIED, TORTOISE, check, draw, state
from tests.kit import random
from tests.kit.isa import needs_library, run_on

pytestmark = [
    needs_library,
    pytest.mark.skipif(bodies.DEVICE != "cpu", reason="the arguments lie on the GPU"),
]


@pytest.fixture(params=["avx512", "avx2", "portable"], autouse=True)
def isa(request):
    run_on(request, request.param)
    with clvp_fast.backend(None):  # where a kernel is forced on a CPU, it is Triton's, interpreted
        assert clvp_fast.explain("sample", "cpu")[0].backend == "kernel"
        yield request.param


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_tokens_of_the_reference(settings):
    for vocab_size in (97, 1025):
        logits = random(60, vocab_size, seed=1, scale=2.0)
        check(logits, [1, 31, 32, 63, 96], **settings)


@pytest.mark.parametrize("vocab_size", [1, 2, 15, 16, 17, 33, 63, 64, 65, 300, 8194, 70000])
@pytest.mark.parametrize("settings", [TORTOISE, ALL], ids=["tortoise", "all"])
def test_vocabularies(vocab_size, settings):
    bodies.test_vocabularies(vocab_size, settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    bodies.test_dtypes(dtype)


@pytest.mark.parametrize("settings", TIED, ids=str)
def test_ties_are_broken_as_a_stable_sort_does(settings):
    bodies.test_ties_are_broken_as_a_stable_sort_does(settings)


@pytest.mark.parametrize("top_p", [0.0, 1e-7, 0.0049, 0.305, 0.705])
def test_equal_logits(top_p):
    bodies.test_equal_logits(top_p)


@pytest.mark.parametrize("vocab_size", [97, 130])
def test_greedy(vocab_size):
    bodies.test_greedy(vocab_size)


@pytest.mark.parametrize("settings", [{}, TORTOISE, ALL], ids=["none", "tortoise", "all"])
def test_some_rows_are_greedy(settings):
    bodies.test_some_rows_are_greedy(settings)


@pytest.mark.parametrize(
    "body",
    [
        bodies.test_a_mass_exactly_at_the_bound_is_removed,
        bodies.test_each_row_has_its_settings,
        bodies.test_the_draw_depends_on_row_and_numbers_alone,
        bodies.test_philox_of_all_64_bits,
        bodies.test_extreme_logits,
        bodies.test_rows_without_an_answer_stay_inside,
        bodies.test_state_is_updated_in_place,
        bodies.test_registered,
    ],
    ids=lambda body: body.__name__.removeprefix("test_"),
)
def test_as_the_gpu_s_kernel(body):
    body()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_distribution_and_forbidden_tokens(settings, monkeypatch):
    bodies.test_distribution_and_forbidden_tokens(settings)


def test_threads_change_no_token(monkeypatch):
    logits, drawn = random(9, 300, seed=3, scale=2.0), []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        drawn.append(draw(logits, **ALL))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_float64_is_torch_s():
    logits = random(3, 97, seed=4, dtype=torch.float64)
    _OPERATOR._warned.clear()
    with pytest.warns(UserWarning, match="slower torch path: logits must be float32, float16 or bfloat16"):
        assert _OPERATOR.choose((logits, *state(3, 97))) is _OPERATOR.torch
