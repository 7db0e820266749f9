"""Weights that change under an engine: its own are seen, copies are refused until `refresh` makes them anew."""

import copy
from types import SimpleNamespace

import pytest
import torch

from clvp_fast import CandidateEngine, CandidateRequest, ClvpFeatureExtractor, SamplingParams, backend
from tests.engine.test_decoder import tiny
from tests.kit import isa, random

WHAT_TO_DO = r": call engine\.refresh\(\), which renews everything made from the weights$"
LAYER = "speech_decoder_model.model.decoder.layers.1"


def engine(model, **options) -> CandidateEngine:
    processor = SimpleNamespace(feature_extractor=ClvpFeatureExtractor(feature_size=20), tokenizer=None)
    return CandidateEngine(model, processor, max_batch=2, max_new_tokens=12, **options)


def request() -> CandidateRequest:
    settings = SamplingParams(num_candidates=2, temperature=2.0, top_k=0, max_new_tokens=12, seed=3)
    return CandidateRequest(input_ids=[5, 9, 17], input_features=random(1, 20, 40, seed=4), sampling=settings)


def result(of: CandidateEngine):
    (found,) = of.generate(request())
    return found


def codes(of: CandidateEngine) -> list:
    found = result(of)
    assert found.error is None, found.error
    return found.codes.tolist()


def anew(model, **options) -> list:
    """Return the codes of an engine that is made from the present weights."""
    return codes(engine(copy.deepcopy(model), **options))


def other_weights(model) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [p.detach() + 0.1 * torch.randn(p.shape, generator=generator) for p in model.parameters()]


@torch.no_grad()
def copied(model):
    for parameter, value in zip(model.parameters(), other_weights(model), strict=True):
        parameter.copy_(value)


def stepped(model, **options):
    """Change the weights by an optimizer's step."""
    for parameter, value in zip(model.parameters(), other_weights(model), strict=True):
        parameter.grad = parameter.detach() - value
    torch.optim.SGD(model.parameters(), lr=1.0, **options).step()
    model.zero_grad()


def stepped_fused(model):
    stepped(model, fused=True)


def loaded(model):
    names = [name for name, _ in model.named_parameters()]
    model.load_state_dict(model.state_dict() | dict(zip(names, other_weights(model), strict=True)))


def put_elsewhere(model):
    for parameter, value in zip(model.parameters(), other_weights(model), strict=True):
        parameter.data = value


def put_elsewhere_twice(model):
    """Move the weights twice; the second place may be the first one again."""
    for parameter, value in zip(model.parameters(), other_weights(model), strict=True):
        size = parameter.shape
        parameter.data = torch.zeros(size)
        parameter.data = value.clone()


def written_to_data(model):
    for parameter, value in zip(model.parameters(), other_weights(model), strict=True):
        parameter.data.copy_(value)


SEEN = [copied, stepped, loaded, put_elsewhere, put_elsewhere_twice]


@pytest.mark.parametrize("change", [*SEEN, written_to_data], ids=lambda change: change.__name__)
def test_the_models_own_weights_are_read_as_they_are(change):
    model = tiny()
    made = engine(model, packed_weights=False)
    before = codes(made)
    if change is written_to_data:
        made.voices.clear()
    change(model)
    after = codes(made)
    assert after == anew(model, packed_weights=False) and after != before


@pytest.mark.parametrize("change", SEEN, ids=lambda change: change.__name__)
def test_copies_are_refused_and_made_anew(change):
    model = tiny()
    made = engine(model, weight_dtype=torch.int8)
    before = codes(made)
    change(model)
    for _ in range(2):
        error = result(made).error
        assert isinstance(error, ValueError)
        with pytest.raises(ValueError, match=rf"^parameter model\.decoder\.layers\.0\S+ .* in 8 bits{WHAT_TO_DO}"):
            raise error
    made.refresh()
    after = codes(made)
    assert after == anew(model, weight_dtype=torch.int8) and after != before


@pytest.mark.parametrize("change", [written_to_data, stepped_fused], ids=lambda change: change.__name__)
def test_copies_do_not_follow_a_write_that_torch_does_not_count(change):
    """Show the limit that `CandidateEngine.refresh` documents."""
    model = tiny()
    made = engine(model, weight_dtype=torch.int8)
    before = codes(made)
    change(model.get_submodule(LAYER).mlp.c_fc)
    assert codes(made) != anew(model, weight_dtype=torch.int8)
    made.refresh()
    assert codes(made) == anew(model, weight_dtype=torch.int8) != before


def test_parameters_that_were_not_copied_may_change():
    model = tiny()
    made = engine(model, weight_dtype=torch.int8)
    codes(made)
    for part in (model.text_encoder_model, model.conditioning_encoder, model.speech_decoder_model.lm_head):
        copied(part)
    assert codes(made) == anew(model, weight_dtype=torch.int8)


def test_scales_of_pages_in_8_bits_are_of_the_weights():
    options = dict(page_dtype=torch.float8_e4m3fn)
    model = tiny()
    made = engine(model, **options)
    scales = made._work.loop.runner.pages.scales.clone()
    with torch.no_grad():
        model.get_submodule(LAYER).attn.k_proj.weight.mul_(3)
    with pytest.raises(ValueError, match=rf"^parameter model\S+\.1\.attn\.k_proj\.weight of .*{WHAT_TO_DO}"):
        raise result(made).error
    made.refresh()
    assert not torch.equal(made._work.loop.runner.pages.scales, scales)
    assert codes(made) == anew(model, **options)


@pytest.mark.parametrize("options", [{}, dict(weight_dtype=torch.int8)], ids=["float32", "int8"])
def test_a_model_that_was_cast(options):
    model = tiny()
    made = engine(model, **options)
    codes(made)
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=rf"^the decoder is torch.bfloat16 on cpu now, .*torch.float32.*{WHAT_TO_DO}"):
        raise result(made).error
    made.refresh()
    assert codes(made) == anew(model, **options)


def test_moved_weights_of_captured_steps_are_refused():
    model = tiny()
    made = engine(model)
    runner = made._work.loop.runner
    runner._graphs._graphs = {2: None}
    copied(model)
    assert runner.outdated() is None
    put_elsewhere(model.get_submodule(LAYER))
    with pytest.raises(ValueError, match=rf"^parameters of the decoder were moved after .* captured.*{WHAT_TO_DO}"):
        raise result(made).error
    made.refresh()
    assert codes(made) == anew(model)


def test_requests_under_way_end_first():
    model = tiny()
    made = engine(model, weight_dtype=torch.int8)
    expected = codes(made)
    told = []

    def listener(*_):
        with pytest.raises(RuntimeError, match="within its own step"):
            made.refresh()
        told.append(made)

    (found,) = made.generate(request(), on_token=listener)
    assert told and found.codes.tolist() == expected
    drawn = made.stream(request())
    next(drawn)
    with pytest.raises(RuntimeError, match=r"requests are under way \(1\).*wait for their results or cancel them"):
        made.refresh()
    *_, found = drawn
    assert found.codes.tolist() == expected
    given_up = made.stream(request())
    next(given_up)
    del given_up
    made.refresh()
    assert codes(made) == expected


def test_a_refresh_that_fails_leaves_an_engine_that_can_be_refreshed():
    model = tiny()
    made = engine(model, weight_dtype=torch.int8)
    expected = codes(made)
    handle = model.speech_decoder_model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"^module speech_decoder_model\.lm_head has hooks"):
        made.refresh()
    handle.remove()
    assert codes(made) == expected
    model.train()
    made.refresh()
    assert not model.training and codes(made) == expected


def test_voices_follow_their_encoder():
    model = tiny()
    made = engine(model)
    codes(made)
    kept = len(made.voices)
    vector = made.voice(request()).vector
    copied(model.speech_decoder_model)
    codes(made)
    assert len(made.voices) == kept and torch.equal(made.voice(request()).vector, vector)
    with torch.no_grad():
        model.conditioning_encoder.mel_conv.weight.mul_(1.5)
    assert not torch.equal(made.voice(request()).vector, vector)
    assert codes(made) == anew(model)


def test_moving_what_was_not_copied_is_refused_at_the_door():
    """Move the head's own weights, which are read beside 8-bit copies: every step would break off."""
    model = tiny()
    made = engine(model, weight_dtype=torch.int8)
    before = codes(made)
    head = model.speech_decoder_model.lm_head
    head.weight.data = head.weight.data.clone()
    with pytest.raises(ValueError, match=r"copies of others were made in 8 bits: call engine\.refresh\(\)"):
        raise result(made).error
    made.refresh()
    assert codes(made) == before


@isa.needs("paged_attention_decode")
def test_a_deterministic_engine_refuses_requests_under_torch_s_attention():
    """Refuse at the door, because a step bound to it would fail for everybody."""
    of = engine(tiny(), deterministic=True)
    expected = codes(of)
    with backend("torch"):
        error = result(of).error
    assert isinstance(error, RuntimeError) and "deterministic=True needs the kernel" in str(error)
    assert codes(of) == expected
