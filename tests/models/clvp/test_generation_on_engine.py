"""`generate()` on the candidate engine: it draws what transformers' loop draws, and is chosen where it can serve."""

import copy
import functools
import logging
from weakref import ref

import pytest
import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)
from transformers.generation import MaxLengthCriteria, MaxTimeCriteria
from transformers.generation.streamers import BaseStreamer

import clvp_fast
from clvp_fast import ClvpModelForConditionalGeneration
from clvp_fast.engine import generation
from clvp_fast.engine.generation import EngineLoop, NotServed
from clvp_fast.engine.runner import Runner
from tests.models.clvp.builders import START, STOP, clips, codes, composite_config, randomize, texts

LOGGER = "clvp_fast.models.clvp.generation"
PENALISED = dict(do_sample=False, repetition_penalty=2.0, max_new_tokens=30)
TORTOISE = dict(do_sample=True, top_k=0, top_p=0.8, temperature=0.8, repetition_penalty=2.0)


@functools.cache
def built():
    return randomize(ClvpModelForConditionalGeneration(composite_config(clvp_fast))).eval()


def tiny(stop_bias: float = -3.0, contiguous: bool = False):
    ours = copy.deepcopy(built())
    ours.speech_decoder_model.config.contiguous_positions = contiguous
    with torch.no_grad():
        ours.speech_decoder_model.lm_head.bias[STOP] = stop_bias
    return ours


@torch.no_grad()
def prompts(model, batch: int = 3) -> torch.Tensor:
    return model.conditioning_encoder.prompt(clips(batch), texts(batch))[0]


def padded(side: str, width: int) -> torch.Tensor:
    mask = torch.ones(3, width, dtype=torch.long)
    for row, count in enumerate((4, 0, 2)):
        mask[row, slice(None, count) if side == "left" else slice(width - count, None)] = 0
    return mask


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("side", ["left", "right", "left, with the start token", None])
def test_greedy_tokens_are_those_of_the_loop(side, contiguous):
    embeds = prompts(tiny())
    mask = None if side is None else padded(side.split(",")[0], embeds.shape[1])
    if side == "left, with the start token":
        mask = nn.functional.pad(mask, (0, 1), value=1)
    settings = PENALISED | dict(conditioning_embeds=embeds, attention_mask=mask, pad_token_id=7)
    for stop_bias in (1.5, -3.0):
        model = tiny(stop_bias, contiguous).speech_decoder_model
        loop, engine = (model.generate(use_engine=use, **settings) for use in (False, True))
        assert engine.tolist() == loop.tolist() and (engine[:, 0] == START).all()
        assert not engine.is_inference() and engine.dtype == torch.int64
        if stop_bias > 0:
            lengths = (engine == STOP).int().argmax(1)
            assert len(lengths.unique()) > 1 and (engine[:, -1] == 7).any(), "rows must stop at different places"
        else:
            assert engine.shape == (3, 31) and len(engine.unique()) > 20


def test_whole_positions():
    for contiguous, longest in ((False, 79), (True, 80)):
        model = tiny(stop_bias=-100.0, contiguous=contiguous)
        settings = dict(max_new_tokens=longest, return_dict_in_generate=True)
        loop, engine = (model.generate(texts(), clips(), use_engine=use, **settings).sequences for use in (False, True))
        assert engine.shape == (2, longest + 1) and torch.equal(engine, loop)


@pytest.mark.parametrize("use_engine", [False, None])
def test_padding_before_a_prompt_does_not_spare_tokens_the_penalty(use_engine):
    """Penalise all tokens; transformers 5.23 skips as many as the padding is wide."""
    model = tiny().speech_decoder_model
    embeds, mask = prompts(tiny()), padded("left", 11)
    batch = model.generate(conditioning_embeds=embeds, attention_mask=mask, use_engine=use_engine, **PENALISED)
    for row in range(3):
        prompt = embeds[row, mask[row].bool()][None]
        alone = model.generate(conditioning_embeds=prompt, use_engine=False, **PENALISED)
        assert batch[row, : alone.shape[1]].tolist() == alone[0].tolist()


SAMPLED = {
    "defaults": dict(do_sample=True),
    "tortoise": TORTOISE,
    "top-k, typical": dict(do_sample=True, top_k=20, typical_p=0.6),
    "min-p": dict(do_sample=True, top_k=0, min_p=0.2, temperature=1.5),
    "none": dict(do_sample=True, top_k=None, temperature=0.7),
}


# None as a keyword leaves a processor out; in a configuration it means transformers' default.
@pytest.mark.parametrize(
    ("name", "where"),
    [(name, "keywords") for name in SAMPLED]
    + [(name, where) for name in SAMPLED if name != "none" for where in ("generation_config", "the model's")],
)
def test_tokens_are_distributed_as_transformers_says(name, where):
    """Compare the first token's counts with the loop's own probabilities, by chi-squared."""
    model = tiny(stop_bias=1.0).speech_decoder_model
    settings, count = SAMPLED[name], 2000
    call = dict(conditioning_embeds=prompts(tiny(), 1), eos_token_id=STOP, pad_token_id=STOP, max_new_tokens=1)
    if where == "generation_config":
        call = dict(conditioning_embeds=call.pop("conditioning_embeds"), generation_config=GenerationConfig(**call))
        call["generation_config"].update(**settings)
    elif where == "the model's":
        model.generation_config.update(**settings)
    else:
        call |= settings
    scores = model.generate(use_engine=False, output_scores=True, return_dict_in_generate=True, **call).scores[0][0]
    torch.manual_seed(5)
    tokens = model.generate(use_engine=True, num_return_sequences=count, **call)[:, 1]
    expected = scores.softmax(-1) * count
    found = torch.bincount(tokens, minlength=len(expected))
    assert not found[expected == 0].any() and (found > 0).sum() > 1
    # Rare tokens are counted together.
    rare = expected < 8
    expected, found = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (expected, found.float()))
    statistic = ((found - expected) ** 2 / expected.clamp(min=1e-9))[expected > 0].sum()
    freedom = int((expected > 0).sum()) - 1
    # Wilson and Hilferty's normal approximation; 4 standard deviations.
    assert (statistic / max(freedom, 1)) ** (1 / 3) < 1 - 2 / (9 * freedom) + 4 * (2 / (9 * freedom)) ** 0.5


def test_seeds():
    model = tiny()
    settings = TORTOISE | dict(num_return_sequences=2, max_new_tokens=12, return_dict_in_generate=True)

    def sequences():
        return model.generate(texts(1).expand(2, -1), clips(1).expand(2, -1, -1), **settings).sequences

    torch.manual_seed(1)
    first, second = sequences(), sequences()
    torch.manual_seed(1)
    assert torch.equal(sequences(), first) and not torch.equal(second, first)
    rows = {tuple(row) for row in first.tolist()}
    assert len(rows) == 4, "equal prompts must draw different candidates"

    torch.manual_seed(1)
    expected = torch.rand(())
    torch.manual_seed(1)
    model.generate(texts(), clips(), max_new_tokens=3)
    assert torch.rand(()) == expected, "greedy decoding must leave the generator alone"


def test_candidates_are_in_the_order_of_prompts():
    """Expect all candidates of a prompt together, by a nearly greedy call."""
    model = tiny().speech_decoder_model
    call = dict(conditioning_embeds=prompts(tiny()), max_new_tokens=8)
    greedy = model.generate(**call)
    cold = model.generate(do_sample=True, temperature=1e-6, num_return_sequences=3, **call)
    assert torch.equal(cold, greedy.repeat_interleave(3, 0)) and len(greedy.unique(dim=0)) == 3


def test_rows_end_with_padding():
    model = tiny(stop_bias=1.0)
    torch.manual_seed(2)
    settings = TORTOISE | dict(num_return_sequences=8, max_new_tokens=60, pad_token_id=7, eos_token_id=STOP)
    sequences = model.generate(texts(), clips(), return_dict_in_generate=True, use_engine=True, **settings).sequences
    stops = (sequences == STOP).int()
    assert sequences.shape[0] == 16 and (sequences[:, 0] == START).all()
    assert (stops.sum(1) <= 1).all() and len(stops.argmax(1).unique()) > 3
    behind = (stops.cumsum(1) - stops).bool()
    assert (sequences[behind] == 7).all() and behind.any()


def test_result_is_a_model_output():
    model = tiny().speech_decoder_model
    call = dict(conditioning_embeds=prompts(tiny()), max_new_tokens=4)
    output = model.generate(return_dict_in_generate=True, **call)
    assert torch.equal(output.sequences, model.generate(**call)) and list(output) == ["sequences"]


@pytest.fixture
def runners(monkeypatch):
    """Give the sizes of every runner that is made."""
    made, plain = [], Runner.__init__

    def noted(self, model, num_pages, page_size, max_batch, *args, **kwargs):
        made.append((num_pages, max_batch))
        plain(self, model, num_pages, page_size, max_batch, *args, **kwargs)

    monkeypatch.setattr(Runner, "__init__", noted)
    return made


def test_candidates_beyond_memory_are_decoded_in_parts(monkeypatch, runners):
    model = tiny(stop_bias=0.0)
    settings = TORTOISE | dict(num_return_sequences=12, max_new_tokens=40, return_dict_in_generate=True)

    def sequences():
        torch.manual_seed(3)
        return model.generate(texts(), clips(), use_engine=True, **settings).sequences

    whole = sequences()
    # 3 pages for each of 24 candidates, and 1 for each of 2 prompts.
    assert runners == [(24 * 3 + 2, 24)]
    monkeypatch.setattr(generation, "free_bytes", lambda device: 1_500_000)
    assert torch.equal(sequences(), whole)
    assert runners[1][1] < 24


def test_memory_that_runs_out_halves_the_batch(monkeypatch, runners):
    model = tiny()
    settings = TORTOISE | dict(num_return_sequences=8, max_new_tokens=10)
    torch.manual_seed(3)
    whole = model.generate(texts(1), clips(1), **settings)[0]
    decode, calls = Runner.decode, []

    def failing(self, num_slots):
        calls.append(num_slots)
        if self.max_batch > 2 and len(calls) % 5 == 0:
            raise torch.OutOfMemoryError("planted")
        return decode(self, num_slots)

    monkeypatch.setattr(Runner, "decode", failing)
    torch.manual_seed(3)
    assert torch.equal(model.generate(texts(1), clips(1), **settings)[0], whole)
    assert [batch for _, batch in runners] == [8, 8, 4, 2]

    def always(self, num_slots):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(Runner, "decode", always)
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        model.generate(texts(1), clips(1), **settings)


def test_the_old_runner_is_gone_when_the_smaller_one_is_planned(monkeypatch):
    """Free its pages, which are the missing memory and which the error's own frames hold too."""
    model, settings = tiny(), TORTOISE | dict(num_return_sequences=4, max_new_tokens=6)
    decode, make_runner, old, gone = Runner.decode, generation._runner, [], []

    def failing(self, num_slots):
        if not old:
            old.append(ref(self))
            raise torch.OutOfMemoryError("planted")
        return decode(self, num_slots)

    def runner(*arguments):
        gone.extend(one() is None for one in old)
        return make_runner(*arguments)

    monkeypatch.setattr(Runner, "decode", failing)
    monkeypatch.setattr(generation, "_runner", runner)
    model.generate(texts(1), clips(1), use_engine=True, **settings)
    assert gone == [True]


def test_too_little_memory_leaves_the_loop(monkeypatch, caplog):
    model, sampled = tiny(), TORTOISE | dict(max_new_tokens=12)
    torch.manual_seed(4)
    expected = model.generate(texts(), clips(), use_engine=False, **sampled)[0]
    monkeypatch.setattr(generation, "free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"use_engine=True, and the engine .* one candidate of 4 tokens .* needs"):
        model.generate(texts(), clips(), max_new_tokens=4, use_engine=True)
    assert reason(model, caplog, max_new_tokens=4).startswith("one candidate of 4 tokens")
    torch.manual_seed(4)
    assert torch.equal(model.generate(texts(), clips(), **sampled)[0], expected), "no random number may be lost"


def reason(model, caplog, *, ids=None, features=None, **settings) -> str | None:
    """Return why a call was left to the loop, or None if the engine served it."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG, LOGGER):
        model.generate(
            texts() if ids is None else ids,
            clips() if features is None else features,
            **{"max_new_tokens": 2} | settings,
        )
    (message,) = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    where, _, why = message.partition(": ")
    return why if where == "generate() runs on transformers' loop" else None


class Silent(BaseStreamer):
    def put(self, value):
        pass

    def end(self):
        pass


LEFT_TO_THE_LOOP = {
    "num_beams=2": dict(num_beams=2),
    "no_repeat_ngram_size=2": dict(no_repeat_ngram_size=2),
    "min_new_tokens=2": dict(min_new_tokens=2),
    "output_scores=True": dict(output_scores=True, return_dict_in_generate=True),
    "output_hidden_states=True": dict(output_hidden_states=True),
    "forced_bos_token_id=0": dict(forced_bos_token_id=0),
    "suppress_tokens=[5]": dict(suppress_tokens=[5]),
    "cache_implementation='static'": dict(cache_implementation="static"),
    "max_time=60.0": dict(max_time=60.0),
    "bad_words_ids=[[3]]": dict(generation_config=GenerationConfig(bad_words_ids=[[3]])),
    "eos_token_id names 2 tokens, not one": dict(eos_token_id=[STOP, 5]),
    "it was given logits_processor": dict(logits_processor=LogitsProcessorList([TemperatureLogitsWarper(0.5)])),
    "it was given stopping_criteria": dict(stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(60)])),
    "it was given streamer": dict(streamer=Silent(), ids=texts(1), features=clips(1)),
    "it was given prefix_allowed_tokens_fn": dict(prefix_allowed_tokens_fn=lambda batch, ids: [1, 2]),
    "top_p must be above 0 and at most 1 (1 keeps all), not 0.0": dict(do_sample=True, top_p=0.0),
}


@pytest.mark.parametrize("why", LEFT_TO_THE_LOOP)
def test_calls_that_are_left_to_the_loop(caplog, why):
    model, settings = tiny(), LEFT_TO_THE_LOOP[why]
    assert reason(model, caplog, **settings) == why
    ids, features = settings.get("ids", texts()), settings.get("features", clips())
    others = {name: value for name, value in settings.items() if name not in ("ids", "features")}
    with pytest.raises(ValueError) as raised:
        model.generate(ids, features, **{"max_new_tokens": 2} | others, use_engine=True)
    assert str(raised.value) == (f"use_engine=True, and the engine cannot serve this call: {why}; leave use_engine out")
    assert reason(model, caplog) is None


def test_calls_that_the_engine_serves(caplog):
    model = tiny()
    for settings in (
        dict(),
        PENALISED,
        TORTOISE | dict(num_return_sequences=2),
        dict(use_cache=False, num_beams=1, min_length=0, no_repeat_ngram_size=0, output_scores=False),
        dict(eos_token_id=[STOP], early_stopping=True, logits_processor=None, stopping_criteria=[]),
        dict(max_new_tokens=None, max_length=20),
        dict(do_sample=False, temperature=0.0, top_p=0.0, top_k=0),
        dict(generation_config=GenerationConfig(do_sample=True, top_k=3, max_new_tokens=4)),
    ):
        assert reason(model, caplog, **settings) is None, settings
    caplog.clear()
    with caplog.at_level(logging.DEBUG, LOGGER):
        model.get_speech_features(input_ids=texts(), input_features=clips(), max_new_tokens=3)
    assert "runs on the engine: prompts 2, candidates 2, at once 2" in caplog.text


def test_a_setting_of_a_later_transformers_is_left_to_the_loop(caplog):
    model = tiny()
    model.generation_config.invented_by_a_later_version = 3
    model.speech_decoder_model.generation_config.another = 0.5
    assert reason(model, caplog).startswith(("invented_by_a_later_version=3", "another=0.5"))


def test_unknown_processors_are_left_to_the_loop():
    """Check prepared processors and criteria again, whatever setting made them."""
    model = tiny().speech_decoder_model
    decode = EngineLoop([torch.randn(3, 128)])
    settings = GenerationConfig(eos_token_id=STOP, num_return_sequences=1, do_sample=False)
    start, longest, warmer = torch.tensor([[START]]), MaxLengthCriteria(4), TemperatureLogitsWarper(0.5)
    assert decode(model, start, LogitsProcessorList([warmer]), StoppingCriteriaList([longest]), settings).shape == (
        1,
        4,
    )
    unknown = MinNewTokensLengthLogitsProcessor(1, 2, STOP, device="cpu")
    with pytest.raises(NotServed, match="it uses MinNewTokensLengthLogitsProcessor"):
        decode(model, start, LogitsProcessorList([warmer, unknown]), StoppingCriteriaList([longest]), settings)
    with pytest.raises(NotServed, match="it uses MaxTimeCriteria"):
        decode(model, start, LogitsProcessorList(), StoppingCriteriaList([longest, MaxTimeCriteria(60)]), settings)
    with pytest.raises(NotServed, match="it has no greatest length"):
        decode(model, start, LogitsProcessorList(), StoppingCriteriaList(), settings)


def hook(model):
    model.model.decoder.layers[1].mlp.c_fc.register_forward_hook(lambda module, inputs, output: output)


def adapter(model):
    class Adapter(nn.Linear):
        pass

    model.model.decoder.layers[0].attn.q_proj = Adapter(128, 128)


def own_forward(model):
    model.model.decoder.forward = model.model.decoder.forward


def dropout(model):
    model.model.decoder.layers[0].mlp.dropout.p = 0.5
    model.train()


def attention_dropout(model):
    model.model.decoder.layers[0].attn.dropout = 0.5
    model.train()


def wider_norm(model):
    model.final_norm.double()


def compiled(model):
    model.model.decoder.compile(backend="eager")


def several_stops(model):
    model.config.eos_token_id = [STOP, 5]


MODELS = {
    hook: "module model.decoder.layers.1.mlp.c_fc has hooks or a forward of its own",
    adapter: "module model.decoder.layers.0.attn.q_proj is a Adapter of another package or subclass",
    own_forward: "module model.decoder has hooks or a forward of its own",
    dropout: "module model.decoder.layers.0.mlp.dropout is in training mode, with dropout",
    attention_dropout: "module model.decoder.layers.0.attn is in training mode, with dropout",
    wider_norm: "the parameters are not all of one kind, dtype and device",
    compiled: "module model.decoder is compiled",
    several_stops: "eos_token_id names 2 tokens, not one",
}


@pytest.mark.parametrize("change", MODELS, ids=lambda change: change.__name__)
def test_models_that_are_left_to_the_loop(change):
    model = tiny().speech_decoder_model
    change(model)
    call = dict(conditioning_embeds=prompts(tiny()), max_new_tokens=2, eos_token_id=STOP)
    with pytest.raises(ValueError) as raised:
        model.generate(use_engine=True, **call)
    assert f": {MODELS[change]};" in str(raised.value)


def test_hooks_are_called(caplog):
    model, seen = tiny(), []
    model.speech_decoder_model.model.decoder.layers[0].register_forward_hook(
        lambda module, inputs, output: seen.append(output.shape[1])
    )
    assert reason(model, caplog).endswith("layers.0 has hooks or a forward of its own") and seen == [12, 1]


def test_training_mode_without_dropout_and_autocast(caplog):
    model = tiny().train()
    assert reason(model, caplog) is None
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="this call: autocast is on;"):
        model.speech_decoder_model.generate(conditioning_embeds=torch.zeros(1, 3, 128), use_engine=True)


def test_masks_that_hide_a_start_token():
    model = tiny().speech_decoder_model
    embeds = prompts(tiny())
    mask = torch.ones(3, embeds.shape[1] + 1, dtype=torch.long)
    mask[1, -1] = 0
    with pytest.raises(ValueError, match="hides a whole prompt, or its start token"):
        model.generate(conditioning_embeds=embeds, attention_mask=mask, max_new_tokens=2, use_engine=True)


def test_masks_that_hide_a_whole_prompt():
    """Refuse this on the engine on request; the loop serves it, and the other rows are as without it."""
    model = tiny().speech_decoder_model
    embeds = prompts(tiny())
    whole = torch.ones(3, embeds.shape[1] + 1, dtype=torch.long)
    mask = whole.clone()
    mask[1, :-1] = 0
    settings = dict(conditioning_embeds=embeds, pad_token_id=7, **PENALISED)
    with pytest.raises(ValueError, match="hides a whole prompt, or its start token"):
        model.generate(attention_mask=mask, use_engine=True, **settings)
    found = model.generate(attention_mask=mask, use_engine=False, **settings)
    assert torch.equal(model.generate(attention_mask=mask, **settings), found)
    expected = model.generate(attention_mask=whole, use_engine=False, **settings)
    assert not torch.equal(found[1], expected[1])
    for row in (0, 2):
        assert found[row, : expected.shape[1]].tolist() == expected[row, : found.shape[1]].tolist()


def test_token_ids_are_continued_by_the_loop():
    model = tiny().speech_decoder_model
    with pytest.raises(ValueError, match="use_engine=True needs conditioning_embeds"):
        model.generate(codes(2, 5), max_new_tokens=3, use_engine=True)
    assert model.generate(codes(2, 5), max_new_tokens=3).shape == (2, 8)


def test_bad_settings_are_refused_as_in_the_loop():
    model = tiny()
    for settings in (dict(unknown=1), dict(do_sample=True, temperature=0.0), dict(num_return_sequences=2)):
        raised = []
        for use_engine in (False, None):
            with pytest.raises(ValueError) as error:
                model.generate(texts(), clips(), max_new_tokens=2, use_engine=use_engine, **settings)
            raised.append(str(error.value))
        assert raised[0] == raised[1]


def test_training_goes_on():
    """Inference on the engine must not turn parameters into inference tensors."""
    model = tiny()
    model.generate(texts(), clips(), max_new_tokens=2, use_engine=True)
    model.speech_decoder_model(codes(2, 5), labels=codes(2, 5)).loss.backward()
    assert model.speech_decoder_model.lm_head.weight.grad.abs().sum() > 0
