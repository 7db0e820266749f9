"""Latents of candidates, held against the original's second pass, which is written down here in plain torch."""

import numpy as np
import pytest
import torch

from clvp_fast.engine.latents import cut_in_silence, diffusion_latents, states_of_codes
from clvp_fast.engine.sampling_params import SamplingParams
from tests.engine.small_engine import make, request
from tests.models.clvp.builders import SHAPES, START, STOP, clips, codes, pair, texts

SILENCE, ENDING = 83, (45, 45, 248)


def fixed_as_the_original(row, longest):
    """Do as `fix_autoregressive_output` for codes that are filled up with stop tokens."""
    filled = [*row, *[STOP] * (longest - len(row))]
    if STOP not in filled:
        return filled
    first = filled.index(STOP)
    filled[first:] = [SILENCE] * (longest - first)
    filled[-3:] = ENDING
    return filled


def cut_as_the_original(latents, row):
    calm = 0
    for k in range(len(row)):
        calm = calm + 1 if row[k] == SILENCE else 0
        if calm > 8:
            return latents[:, :k]
    return latents


@torch.no_grad()
def second_pass(model, prompt, row):
    """Do as `UnifiedVoice.forward(return_latent=True)`: start, codes, stop at 0, 1, ...; drop the last two states."""
    decoder = model.speech_decoder_model
    tokens = torch.tensor([START, *row, STOP])
    stack = decoder.model.decoder
    speech = stack.input_embeds_layer(tokens) + stack.position_embeds_layer(torch.arange(len(tokens)))
    hidden = decoder.model(inputs_embeds=torch.cat([prompt, speech])[None], embeds_have_positions=True)
    return decoder.final_norm(hidden.last_hidden_state)[:, len(prompt) :][:, :-2]


def off_by(found, expected):
    """Return the largest difference, relative to the root of the mean square."""
    return float((found - expected).abs().max() / expected.square().mean().sqrt())


def spoken(length, seed=3):
    return codes(1, length, seed)[0].tolist()


CASES = {
    "usual": (spoken(17), 40),
    "stops at once": ([], 40),
    "one before the limit": (spoken(39), 40),
    "never": (spoken(40), 40),
    "too short a silence": (spoken(32), 40),
    "just long enough": (spoken(28), 40),
    "silence in speech": (spoken(7) + [SILENCE] * 9 + spoken(7, 4), 40),
    "eight in speech": (spoken(7) + [SILENCE] * 8 + spoken(7, 4), 40),
    "ends in silence": (spoken(7) + [SILENCE] * 3, 40),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_latents_are_those_of_the_originals_second_pass(shape, case):
    _, model = pair(shape=shape)
    prompt = model.conditioning_encoder.prompt(clips(1), texts(1))[0][0].detach()
    row, longest = CASES[case]
    fixed = fixed_as_the_original(row, longest)
    expected = cut_as_the_original(second_pass(model, prompt, fixed), fixed)
    found = diffusion_latents(model.speech_decoder_model, prompt, np.array(row, dtype=np.int64), longest)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert off_by(found, expected) < 1e-5
    if len(row) > 3:  # another code is seen far above that
        other = [*row[:2], (row[2] + 1) % SILENCE, *row[3:]]
        changed = diffusion_latents(model.speech_decoder_model, prompt, np.array(other), longest)
        assert off_by(changed, expected) > 1e-2


def test_latents_are_cut_in_the_silence():
    assert cut_in_silence([SILENCE] * 8, SILENCE) == 8 == cut_in_silence([SILENCE] * 9, SILENCE)
    assert cut_in_silence([1, *[SILENCE] * 20], SILENCE) == 9
    assert cut_in_silence([*[SILENCE] * 5, 1, *[SILENCE] * 8, 2], SILENCE) == 15


@pytest.mark.parametrize("contiguous", [False, True])
def test_the_engine_gives_them(parts, contiguous, monkeypatch):
    """Compare kept candidates, at the second pass's positions, however they were drawn."""
    model, processor = parts
    monkeypatch.setattr(model.config.decoder_config, "contiguous_positions", contiguous, raising=False)
    engine = make(parts, latents=True)
    asked = request(1)
    (result,) = engine.generate(asked, SamplingParams(num_candidates=4, max_new_tokens=20, seed=1), keep=2)
    assert set(result.latents) == set(result.kept.tolist())
    prompt = engine._door.prompt(asked, torch.tensor(processor.tokenizer(asked.text)["input_ids"]))
    config = model.config.decoder_config
    for index, row, _ in result.best(2):
        tokens = [config.eos_token_id if code == STOP else code for code in fixed_as_the_original(row.tolist(), 20)]
        expected = states_of_codes(model.speech_decoder_model, prompt, torch.tensor(tokens))[None]
        expected = cut_as_the_original(expected, tokens)
        assert result.latents[index].shape == expected.shape
        assert off_by(result.latents[index], expected) < 1e-5


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("pages", [None, 14], ids=["room", "preempted"])
def test_states_are_streamed_with_the_codes_that_were_drawn_from_them(parts, lag, pages, monkeypatch):
    """Compare with a pass over a candidate's codes: each state once, the stop token's too."""
    model = parts[0]
    monkeypatch.setattr(model.config.decoder_config, "contiguous_positions", True, raising=False)
    engine = make(parts, lag=lag, states=True, **({} if pages is None else {"num_pages": pages}))
    asked, settings = request(1), SamplingParams(num_candidates=6, max_new_tokens=24, seed=1)
    *told, result = engine.stream(asked, settings, states=True)
    prompt = engine._door.prompt(asked, torch.tensor(parts[1].tokenizer(asked.text)["input_ids"]))
    assert len({candidate for candidate, _, _ in told}) == 6
    for candidate in range(6):
        codes = torch.tensor([code for one, code, _ in told if one == candidate])
        states = torch.stack([state for one, _, state in told if one == candidate])
        length = int(result.lengths[candidate])
        assert codes[:length].tolist() == result.codes[candidate, :length].tolist()
        assert len(codes) == length + result.stopped[candidate]
        assert off_by(states, states_of_codes(model.speech_decoder_model, prompt, codes)) < 1e-4
    first, *_ = engine.stream(asked, settings)
    assert first == told[0][:2]


def test_states_are_kept_where_they_were_asked_for(parts):
    with pytest.raises(ValueError, match=r"make it with states=True"):
        make(parts).stream(request(1), states=True)
