"""Packed copies of weights in the engine: what they compute, what they follow, and when there are none."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from clvp_fast import CandidateEngine, SamplingParams
from clvp_fast.engine import engine as engine_module
from clvp_fast.engine.memory import DecoderSizes, plan
from clvp_fast.engine.runner import Runner
from tests.engine import test_refresh as changes
from tests.engine.test_decoder import tiny
from tests.kit.isa import needs

pytestmark = needs("linear")


def products(of: Runner):
    return of.decoder.weights.products()


def runner_of(made: CandidateEngine) -> Runner:
    runner = made._work.loop.runner
    assert runner is not None
    return runner


def is_packed(made: CandidateEngine) -> bool:
    packed = {product.panels is not None for product in products(runner_of(made))}
    assert len(packed) == 1 and (made.memory.parts["panels"] > 0) in packed
    return packed.pop()


@pytest.mark.parametrize("weight_dtype", [None, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_counts_them(dtype, weight_dtype):
    model = tiny().speech_decoder_model.to(dtype)
    if dtype == torch.bfloat16 and weight_dtype is None and changes.isa.has_matrix_unit():
        pytest.skip("torch's own products serve bfloat16 here")
    found = plan(model, 10**8, max_batch=3, max_new_tokens=9, weight_dtype=weight_dtype, packed=True)
    runner = Runner(model, found.num_pages, 16, 3, 9, weight_dtype=weight_dtype, packed=True)
    assert found.parts["panels"] == sum(product.panels.nbytes for product in products(runner)) > 0
    assert plan(model, 10**8, max_batch=3, max_new_tokens=9).parts["panels"] == 0


@pytest.mark.parametrize("options", [{}, {"weight_dtype": torch.int8}, {"activation_dtype": torch.int8}])
def test_panels_of_the_layers_lie_in_one_room(options):
    """Without gaps between them, so that no large page has to end where a product's panels do."""
    if options:
        options = {"weight_dtype": torch.int8} | options
    runner = Runner(tiny().speech_decoder_model, 9, 16, 1, 9, packed=True, **options)
    layers = sorted((product.panels for product in products(runner)[:-1]), key=torch.Tensor.data_ptr)
    assert len(layers) > 4
    for before, behind in pairwise(layers):
        assert 0 <= behind.data_ptr() - (before.data_ptr() + before.nbytes) < 64


@pytest.mark.parametrize("weight_dtype", [None, torch.int8])
def test_codes_are_those_of_the_weights_as_they_lie(weight_dtype):
    asked = replace(changes.request(), sampling=SamplingParams(do_sample=False, max_new_tokens=12))
    found = []
    for packed in (True, False):
        made = changes.engine(tiny(), weight_dtype=weight_dtype, packed_weights=packed)
        assert is_packed(made) == packed
        (result,) = made.generate(asked)
        found.append(result.codes.tolist())
    assert found[0] == found[1]


@pytest.mark.parametrize("change", [changes.copied, changes.stepped, changes.loaded, changes.put_elsewhere])
def test_a_change_of_the_weights_is_seen_by_the_next_request(change):
    model = tiny()
    made = changes.engine(model, packed_weights=True)
    before = changes.codes(made)
    change(model)
    assert changes.codes(made) == changes.anew(model, packed_weights=True) != before
    assert is_packed(made)


@pytest.mark.parametrize("change", [changes.written_to_data, changes.stepped_fused])
def test_a_refresh_shows_what_torch_did_not_count(change):
    model = tiny()
    made = changes.engine(model, packed_weights=True)
    before = changes.codes(made)
    change(model)
    made.refresh()
    assert changes.codes(made) == changes.anew(model, packed_weights=True) != before


def test_they_are_made_where_they_fit_and_nothing_is_said_of_them(monkeypatch):
    model = tiny()
    assert is_packed(changes.engine(model))
    assert not is_packed(changes.engine(model, packed_weights=False))
    sizes = dict(max_batch=2, max_new_tokens=12, max_prefix_len=65)
    panels = DecoderSizes.of(model.speech_decoder_model, packed=True).panels
    needed = plan(model.speech_decoder_model, 10**9, packed=True, **sizes).total
    for free, expected in ((needed, True), (needed - panels // 2, False)):
        monkeypatch.setattr(engine_module, "free_bytes", lambda device, free=free: free)
        made = changes.engine(copy.deepcopy(model), memory_fraction=1.0)
        assert is_packed(made) == expected and made.memory.max_batch == 2
    with pytest.raises(ValueError, match="panels"):
        monkeypatch.setattr(engine_module, "free_bytes", lambda device: panels)
        changes.engine(model, memory_fraction=1.0, packed_weights=True)


def test_a_model_that_has_no_kernel_has_none():
    assert not is_packed(changes.engine(tiny().to(torch.float16)))
