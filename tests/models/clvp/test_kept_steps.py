"""Captured steps that `generate()` keeps between calls: who gets them, who does not, and when they are freed.

Captures are faked; `tests/gpu/test_generate_on_gpu.py` has real ones.
"""

import copy
import gc
import pickle
from weakref import ref

import pytest
import torch
from torch import nn

import clvp_fast
from clvp_fast.engine import generation
from clvp_fast.engine.captures import Captures
from clvp_fast.engine.runner import Runner
from clvp_fast.models.clvp import kept
from tests.engine.captures_on_paper import capture_on_paper
from tests.kit import isa
from tests.models.clvp.test_generation_on_engine import TORTOISE, prompts, runners, tiny

__all__ = ["runners"]

# The rows of a captured step have other bits in torch's own products and attention.
pytestmark = isa.needs("paged_attention_decode")


@pytest.fixture
def happened(monkeypatch):
    return capture_on_paper(monkeypatch)


@pytest.fixture(autouse=True)
def nothing_is_left():
    kept.release_all()
    yield
    kept.release_all()


def drawn(model, candidates=4, new_tokens=10, texts=1, seed=3, **options):
    """Return the tokens of a call."""
    decoder = getattr(model, "speech_decoder_model", model)
    torch.manual_seed(seed)
    settings = TORTOISE | dict(num_return_sequences=candidates, max_new_tokens=new_tokens, use_engine=True) | options
    return decoder.generate(conditioning_embeds=prompts(tiny(), texts), **settings)


def kept_runner(model):
    """Return a weak reference to the runner that is kept for a model, or None."""
    found = kept._KEPT.get(getattr(model, "speech_decoder_model", model))
    return None if found is None else ref(found[0])


def test_steps_are_captured_when_they_come_again(happened):
    model = tiny()
    drawn(model, new_tokens=5)
    assert happened == [("launched", 4), ("captured", 4), *[("replayed", 4)] * 4]
    happened.clear()
    for _ in range(2):
        drawn(model, new_tokens=5)
    replayed = [("replayed", "prefill"), *[("replayed", 4)] * 5]
    assert happened == [("captured", "prefill"), *replayed, *replayed]


def test_the_next_call_replays_them(happened, runners):
    model = tiny(stop_bias=1.0)
    first = drawn(model, 6, new_tokens=40)
    launched = [name for what, name in happened if what == "launched"]
    assert len(launched) == len(set(launched)) > 1, "candidates must stop one after another"
    happened.clear()
    assert torch.equal(drawn(model, 6, new_tokens=40), first)
    assert happened[0] == ("captured", "prefill") and {what for what, _ in happened[1:]} == {"replayed"}
    assert len(runners) == 1
    other = drawn(model, 6, new_tokens=40, seed=4)
    kept.release_all()
    assert torch.equal(drawn(model, 6, new_tokens=40, seed=4), other) and not torch.equal(other, first)
    assert len(runners) == 2


def test_tokens_are_those_without_captures(monkeypatch):
    model = tiny(stop_bias=1.0)

    def calls():
        return [drawn(model, 6, 40), drawn(model, 2, 20, texts=2), drawn(model, 2, 10, seed=5, typical_p=0.7)]

    expected = calls()
    capture_on_paper(monkeypatch)
    assert all(map(torch.equal, calls(), expected))


@pytest.mark.parametrize(
    ("sizes", "fits"),
    [
        (dict(candidates=3), True),
        (dict(candidates=2, texts=2), False),  # a prompt's page more
        (dict(new_tokens=7), True),
        (dict(candidates=5), False),
        (dict(new_tokens=30), False),
        (dict(candidates=1, new_tokens=30), False),
    ],
    ids=str,
)
def test_a_smaller_call_is_served_and_a_larger_one_takes_the_place(happened, runners, sizes, fits):
    model = tiny()
    drawn(model)
    found = drawn(model, **sizes)
    assert len(runners) == (1 if fits else 2)
    assert len(kept._KEPT) == 1, "the last size only"
    kept.release_all()
    assert torch.equal(drawn(model, **sizes), found)


def changed_in_place(decoder):
    with torch.no_grad():
        decoder.lm_head.bias[7] += 1e4


def test_weights_that_change_in_place_are_seen(happened, runners):
    model = tiny()
    drawn(model)
    changed_in_place(model.speech_decoder_model)
    assert (drawn(model)[:, 1:] == 7).all() and len(runners) == 1


def moved(decoder):
    decoder.lm_head.weight.data = decoder.lm_head.weight.data.clone()


def other_eps(decoder):
    decoder.final_norm.eps = 0.1


def other_head(decoder):
    decoder.lm_head = copy.deepcopy(decoder.lm_head)


def other_positions(decoder):
    decoder.config.contiguous_positions = True


@pytest.mark.parametrize("change", [moved, other_eps, other_head, other_positions], ids=lambda change: change.__name__)
def test_a_model_that_changed_gets_another_runner(happened, runners, change):
    model = tiny()
    drawn(model)
    change(model.speech_decoder_model)
    found = drawn(model)
    assert len(runners) == 2
    kept.release_all()
    assert torch.equal(drawn(model), found)


def test_another_backend_gets_another_runner(happened, runners):
    model = tiny()
    drawn(model)
    with clvp_fast.backend("torch"):
        drawn(model)
    assert len(runners) == 2


def cast(model):
    model.to(torch.bfloat16)


def released(model):
    clvp_fast.release(model)


def released_in_a_wrapper(model):
    clvp_fast.release(nn.Sequential(model))


def given_to_an_engine(model):
    from tests.engine.test_refresh import engine

    engine(model)


def halved_elsewhere(model):
    other = tiny().speech_decoder_model
    loop = generation.DecodeLoop(Runner(other, 8, 16, 2, 10))
    loop.halve(2)


FREEING = [cast, released, released_in_a_wrapper, given_to_an_engine, halved_elsewhere]


@pytest.mark.parametrize("free", FREEING, ids=lambda free: free.__name__)
def test_when_it_is_freed(happened, free):
    """Expect the memory to be free at once, without the garbage collector."""
    model = tiny()
    drawn(model)
    runner = kept_runner(model)
    assert runner() is not None
    gc.disable()
    try:
        free(model)
        assert runner() is None
    finally:
        gc.enable()


def test_it_goes_with_its_model(happened):
    model = tiny().speech_decoder_model
    drawn(model)
    runner, model_there = kept_runner(model), ref(model)
    gc.disable()
    try:
        del model
        assert model_there() is None and runner() is None
    finally:
        gc.enable()


def test_copies_and_checkpoints_lack_it(happened, tmp_path):
    model = tiny()
    plain = pickle.dumps(model)
    attributes = {name: vars(module).keys() for name, module in model.named_modules()}
    drawn(model)
    assert kept_runner(model) is not None
    assert len(pickle.dumps(model)) == len(plain)
    assert {name: vars(module).keys() for name, module in model.named_modules()} == attributes
    for other in (copy.deepcopy(model), copy.copy(model.speech_decoder_model), pickle.loads(pickle.dumps(model))):
        assert kept_runner(other) is None
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(drawn(loaded), drawn(model))


def test_memory_that_runs_out_leaves_nothing_behind(happened, monkeypatch):
    model, other = tiny(), tiny()
    expected = drawn(model)
    drawn(other)
    decode, planted = Runner.decode, [torch.OutOfMemoryError("planted")]

    def failing(self, num_slots):
        if planted:
            raise planted.pop()
        return decode(self, num_slots)

    monkeypatch.setattr(Runner, "decode", failing)
    assert torch.equal(drawn(model), expected)
    assert not kept._KEPT


def test_too_little_memory_frees_that_of_other_models(happened, monkeypatch):
    model, other = tiny(), tiny()
    drawn(other)
    monkeypatch.setattr(generation, "free_bytes", lambda device: 1000 if kept._KEPT else 1 << 30)
    assert len(drawn(model)) == 4 and kept_runner(other) is None


def test_much_memory_is_not_kept(happened, monkeypatch, runners):
    model = tiny()
    pages = 4 * 1 + 1
    size = pages * 2 * 16 * 128 * 4 * model.speech_decoder_model.config.num_hidden_layers
    for missing, kept_then in ((1, False), (0, True)):
        monkeypatch.setattr(generation, "_device_bytes", lambda device, missing=missing: 8 * (size - missing))
        drawn(model)
        assert runners[-1] == (pages, 4) and (kept_runner(model) is not None) == kept_then


def test_calls_at_the_same_time_have_a_runner_each(happened, monkeypatch, runners):
    """Draw within another call's step, as a second thread may."""
    model, decode, inner = tiny(), Runner.decode, []
    expected, others = drawn(model), drawn(model, seed=8)

    def calling(self, num_slots):
        if not inner:
            inner.append(None)
            state = torch.get_rng_state()
            inner.append(drawn(model, seed=8))
            torch.set_rng_state(state)
        return decode(self, num_slots)

    monkeypatch.setattr(Runner, "decode", calling)
    assert torch.equal(drawn(model), expected) and torch.equal(inner[1], others)
    assert len(runners) == 2 and len(kept._KEPT) == 1


def test_a_call_that_breaks_off_leaves_nothing_behind(happened, monkeypatch):
    model = tiny()
    drawn(model)

    def interrupted(self, num_slots):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            drawn(model)
    assert not kept._KEPT


def test_a_capture_that_fails_leaves_steps_as_they_were(happened, monkeypatch, caplog):
    model = tiny()
    expected = drawn(model)
    kept.release_all()
    happened.clear()

    def failing(self, key, call):
        raise RuntimeError("planted: operation not permitted when stream is capturing")

    monkeypatch.setattr(Captures, "_record", failing)
    assert torch.equal(drawn(model), expected)
    assert {what for what, _ in happened} == {"launched"} and not kept._KEPT
    (record,) = caplog.records
    assert "launched one by one, because they could not be captured: planted" in record.getMessage()


def test_on_a_cpu_nothing_is_kept(runners):
    model = tiny()
    drawn(model)
    assert not kept._KEPT
    clvp_fast.release(model)
    assert torch.equal(drawn(model), drawn(model)) and len(runners) == 3


@pytest.mark.parametrize("wrong", [None, "random", object])
def test_release_of_something_else(wrong):
    with pytest.raises(TypeError, match=r"^release\(\) expects a model, such as Clvp\S+, and .* came: give the model"):
        clvp_fast.release(wrong)
