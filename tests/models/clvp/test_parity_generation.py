"""Generation, held against transformers' own loop over its own decoder, handed a full-length attention mask.

Without that mask transformers lays a mask of the start token's width over the prompt and embeds the prompt at the
wrong positions: right up to 4.46, wrong from 4.50 on. With it every version computes what original Tortoise computes.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import LogitsProcessorList, MinNewTokensLengthLogitsProcessor, StoppingCriteriaList
from transformers.generation import MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from tests.models.clvp.builders import SHAPES, START, STOP, assert_same, clips, codes, pair, texts

TOKENS = dict(eos_token_id=STOP, pad_token_id=STOP)

SETTINGS = {
    "greedy": dict(do_sample=False),
    "greedy, penalised": dict(do_sample=False, repetition_penalty=2.0, no_repeat_ngram_size=2),
    "sampled": dict(do_sample=True, top_k=0),
    "tortoise": dict(do_sample=True, top_p=0.8, temperature=0.8, repetition_penalty=2.0, num_return_sequences=4),
    "top-k, typical": dict(do_sample=True, top_k=20, typical_p=0.9, num_return_sequences=2),
    "min-p": dict(do_sample=True, top_k=0, min_p=0.05, temperature=1.5, num_return_sequences=3),
    "beams": dict(do_sample=False, num_beams=3),
    "beams, several": dict(
        do_sample=False, num_beams=4, num_return_sequences=3, length_penalty=0.5, early_stopping=True
    ),
    "sampled beams": dict(do_sample=True, num_beams=3, num_return_sequences=2, top_k=30),
}


def stopping_pair(shape: str = "heads64", dtype=torch.float32):
    """Make models some of whose rows stop early: the stop token is as likely as others."""
    models = pair(shape=shape, dtype=dtype)
    for model in models:
        with torch.no_grad():
            model.speech_decoder_model.lm_head.bias[STOP] = 1.0
    return models


def prompt(stock, ids, features):
    """Return the prompt as Tortoise makes it: one stop token behind the text, then the encoder's own start and stop."""
    return stock.conditioning_encoder(features, F.pad(ids, (0, 1)))


@torch.no_grad()
def oracle(stock, cond, **settings):
    full = torch.ones(cond.shape[0], cond.shape[1] + 1, dtype=torch.long)
    return stock.speech_decoder_model.generate(conditioning_embeds=cond, attention_mask=full, **(TOKENS | settings))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_same_tokens(shape, name):
    settings = SETTINGS[name] | dict(max_new_tokens=24)
    stock, ours = stopping_pair(shape) if settings["do_sample"] else pair(shape=shape)
    with torch.no_grad():
        cond = prompt(stock, texts(3), clips(3))
    torch.manual_seed(11)
    expected = oracle(stock, cond, **settings)
    assert len(expected.unique()) > 4 and (expected[:, 0] == START).all()
    # One seed draws the same tokens in the loop alone: the engine has random numbers of its own.
    for use_engine in [False] if settings["do_sample"] else [False, None]:
        torch.manual_seed(11)
        found = ours.speech_decoder_model.generate(
            conditioning_embeds=cond, use_engine=use_engine, **(TOKENS | settings)
        )
        assert found.tolist() == expected.tolist()

        torch.manual_seed(11)
        whole = ours.generate(texts(3), clips(3), return_dict_in_generate=True, use_engine=use_engine, **settings)
        assert whole.sequences.tolist() == expected.tolist()
        assert torch.equal(whole.speech_ids, stock.fix_speech_decoder_output(expected))


def test_rows_stop_at_different_places():
    """Show that the tests above cover stopping and padding."""
    _, ours = stopping_pair()
    torch.manual_seed(11)
    settings = SETTINGS["tortoise"] | dict(max_new_tokens=40, return_dict_in_generate=True)
    lengths = (ours.generate(texts(3), clips(3), **settings).sequences != STOP).sum(1)
    assert len(lengths.unique()) > 2 and lengths.min() < 25


@pytest.mark.parametrize("name", ["greedy", "tortoise", "beams, several"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_scores_are_those_of_transformers_encoders(name, dtype):
    stock, ours = stopping_pair(dtype=dtype)
    settings = SETTINGS[name] | dict(max_new_tokens=20)
    features = clips(2, dtype=dtype)
    torch.manual_seed(3)
    found = ours.generate(texts(), features, return_dict_in_generate=True, output_hidden_states=True, **settings)
    text = stock.text_encoder_model(F.pad(texts(), (0, 1)), output_hidden_states=True)
    speech = stock.speech_encoder_model(found.speech_ids, output_hidden_states=True)
    embeds = [F.normalize(output.embeds) for output in (text, speech)]
    logits = embeds[0] @ embeds[1].T * stock.logit_scale.exp()
    assert logits.std() > 0.01
    assert_same(found.logits_per_text, logits)
    assert_same(found.logits_per_speech, logits.T)
    assert_same((found.text_embeds, found.speech_embeds), embeds)
    assert_same((found.text_model_output, found.speech_model_output), (text.pooler_output, speech.pooler_output))
    assert_same(found.text_encoder_hidden_states, text.hidden_states)
    assert_same(found.speech_encoder_hidden_states, speech.hidden_states)


@torch.no_grad()
def test_every_step_of_the_decoder():
    stock, ours = pair(dtype=torch.float64)
    cond = prompt(stock, texts(), clips(dtype=torch.float64))
    asked = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
    asked |= dict(output_hidden_states=True, output_attentions=True)
    for settings in (SETTINGS["greedy, penalised"], dict(do_sample=True, num_return_sequences=2)):
        torch.manual_seed(0)
        expected = oracle(stock, cond, max_new_tokens=9, **settings, **asked)
        torch.manual_seed(0)
        found = ours.generate(texts(), clips(dtype=torch.float64), max_new_tokens=9, **settings, **asked)
        assert_same(found.sequences, expected.sequences)
        assert_same(found.scores, expected.scores)
        assert_same(found.logits, expected.logits)
        assert_same(found.decoder_hidden_states, expected.hidden_states)
        assert_same(found.decoder_attentions, expected.attentions)


@pytest.mark.parametrize("limit", [dict(max_length=30), dict(max_new_tokens=79), dict()])
def test_lengths(limit):
    stock, ours = pair()
    with torch.no_grad():
        cond = prompt(stock, texts(), clips())
    expected = oracle(stock, cond, do_sample=False, **limit)
    found = ours.generate(texts(), clips(), do_sample=False, return_dict_in_generate=True, **limit).sequences
    assert found.tolist() == expected.tolist()


@torch.no_grad()
def test_without_cache():
    """Run the prompt again at each step, to the same end, where transformers forces the cache on."""
    _, ours = pair(dtype=torch.float64)
    settings = dict(do_sample=False, max_new_tokens=12, return_dict_in_generate=True, output_logits=True)
    with_cache, without = (
        ours.generate(texts(), clips(dtype=torch.float64), use_cache=use_cache, **settings)
        for use_cache in (True, False)
    )
    assert with_cache.sequences.tolist() == without.sequences.tolist()
    assert_same(without.logits, with_cache.logits)


class Collector(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.extend(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_processors_criteria_and_streamers():
    stock, ours = stopping_pair()
    with torch.no_grad():
        cond = prompt(stock, texts(1), clips(1))
    results = []
    for run in (
        lambda **others: oracle(stock, cond, **others),
        lambda **others: ours.generate(texts(1), clips(1), return_dict_in_generate=True, **others).sequences,
    ):
        streamer = Collector()
        torch.manual_seed(2)
        processor = MinNewTokensLengthLogitsProcessor(1, 12, STOP, device="cpu")
        sequences = run(
            do_sample=True,
            max_new_tokens=50,
            logits_processor=LogitsProcessorList([processor]),
            stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(20)]),
            streamer=streamer,
        )
        results.append((sequences.tolist(), streamer.tokens, streamer.ended))
    assert results[0] == results[1]
    assert 13 <= len(results[0][0][0]) <= 20 and results[0][2]


@pytest.mark.parametrize("name", ["greedy", "tortoise", "beams"])
def test_continuing_token_ids(name):
    """Use `ClvpForCausalLM` alone, as any causal model."""
    stock, ours = pair("ClvpForCausalLM")
    results = []
    for model in (stock, ours):
        torch.manual_seed(4)
        results.append(model.generate(codes(2, 5), max_new_tokens=15, **SETTINGS[name], **TOKENS).tolist())
    assert results[1] == results[0]
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    results = [
        model.generate(
            input_ids=codes(2, 5), attention_mask=mask, max_new_tokens=15, do_sample=False, **TOKENS
        ).tolist()
        for model in (stock, ours)
    ]
    assert results[1] == results[0]


def test_continuing_embeddings():
    stock, ours = pair("ClvpForCausalLM")
    embeds = stock.get_input_embeddings()(codes(2, 5)).detach()
    mask = torch.ones(2, 5, dtype=torch.long)
    settings = dict(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=15, do_sample=False, **TOKENS)
    expected, found = (model.generate(**settings).tolist() for model in (stock, ours))
    assert found == expected


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["greedy", "beams"])
@torch.no_grad()
def test_a_padded_text_generates_what_it_does_alone(name, side):
    stock, ours = pair(dtype=torch.float64)
    ids, features = texts(3, 9), clips(3, dtype=torch.float64)
    mask = torch.ones_like(ids)
    hidden = (3, 0, 6)
    for row, count in enumerate(hidden):
        if count:
            part = slice(None, count) if side == "left" else slice(9 - count, None)
            ids[row, part], mask[row, part] = 0, 0
    settings = SETTINGS[name] | dict(max_new_tokens=20)
    batch = ours.generate(ids, features, attention_mask=mask, return_dict_in_generate=True, **settings)
    for row in range(3):
        cond = prompt(stock, ids[row, mask[row].bool()][None], features[row][None])
        alone = oracle(stock, cond, **settings)
        assert batch.sequences[row, : alone.shape[1]].tolist() == alone[0].tolist()


def test_speech_features_from_text_and_voice():
    """Put one stop token behind the text, not two: transformers' `get_speech_features` omits Tortoise's own."""
    stock, ours = pair(dtype=torch.float64)
    features = clips(dtype=torch.float64)
    with torch.no_grad():
        cond = stock.conditioning_encoder(features, texts())
        generated = stock.fix_speech_decoder_output(oracle(stock, cond, do_sample=False, max_new_tokens=10))
        expected = stock.speech_encoder_model(generated).embeds
    before = ours.generation_config.to_dict()
    assert_same(ours.get_speech_features(input_ids=texts(), input_features=features, max_new_tokens=10), expected)
    assert ours.generation_config.to_dict() == before
