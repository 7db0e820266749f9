"""`accelerate(tts)` of `tortoise.api_fast`: codes, latents and sound in chunks as Tortoise's modules give them."""

import importlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from clvp_fast.integrations.tortoise import accelerate, restore
from tests.integrations import stand_in_fast
from tests.integrations.oracle import argmax_codes, next_state, off, prompt_of

TEXT, LIKELIEST = "Hello there.", dict(temperature=1e-3, verbose=False, use_deterministic_seed=3)
VOICE = [torch.randn(1, 128, generator=torch.Generator().manual_seed(0))]


@pytest.fixture(scope="session", params=["stand-in", "package"])
def make_fast(request):
    if request.param == "stand-in":
        return stand_in_fast.TextToSpeech
    request.getfixturevalue("tortoise_api")
    return partial(stand_in_fast.tiny_fast, importlib.import_module("tortoise.api_fast"))


def ids_of(tts):
    return F.pad(torch.IntTensor([tts.tokenizer.encode(TEXT)]), (0, 1))


@torch.no_grad()
def heard(tts, latents):
    """Do as `HifiganGenerator.inference`, on this device."""
    frames = F.interpolate(latents.transpose(1, 2), scale_factor=[4.0], mode="linear")
    frames = F.interpolate(frames, scale_factor=[24000 / 22050], mode="linear")
    return tts.hifi_decoder.forward(frames, VOICE[0].unsqueeze(0).transpose(1, 2))


@pytest.mark.parametrize("kv_cache", [False, True])
@pytest.mark.parametrize("stop_bias", [-30.0, 3.0])
@torch.no_grad()
def test_sound_and_stream_are_those_of_tortoises_own_modules(make_fast, kv_cache, stop_bias):
    tts = make_fast(kv_cache=kv_cache, stop_bias=stop_bias)
    module, ids = tts.autoregressive, ids_of(tts)
    codes = argmax_codes(module, VOICE[0], ids, 59)
    assert (codes[-1] == 301) == (stop_bias > 0)
    prompt = prompt_of(module, VOICE[0], ids)
    states = torch.cat([next_state(module, prompt, codes[:place]) for place in range(len(codes))])
    lengths = torch.tensor([ids.shape[1]]), torch.tensor([len(codes) * 1024])
    inputs = VOICE[0], ids, lengths[0], torch.tensor([codes]), lengths[1]
    latents = module(*inputs, return_latent=True, clip_inputs=False)
    expected, streamed = heard(tts, latents), heard(tts, states[None])

    accelerate(tts)
    options = dict(do_sample=True, top_k=50, temperature=1e-3, top_p=0.8, repetition_penalty=2.0)
    drawn = list(module.get_generator(fake_inputs=module.compute_embeddings(VOICE[0], ids), **options))
    assert [code.item() for code, _ in drawn] == codes and drawn[0][0].shape == (1,)
    assert off(torch.cat([state for _, state in drawn]), states) < 2e-5
    assert off(module(*inputs, return_latent=True, clip_inputs=False), latents) < 1e-5
    assert off(tts.tts(TEXT, VOICE, **LIKELIEST), expected) < 1e-3
    if isinstance(tts, stand_in_fast.TextToSpeech):  # the real one fades its chunks into one another
        *_, last = tts.tts_stream(TEXT, VOICE, **LIKELIEST, stream_chunk_size=10)
        assert off(last, streamed) < 1e-3
    else:
        (chunk,) = tts.tts_stream(TEXT, VOICE, **LIKELIEST, overlap_wav_len=64)  # its first takes 60 codes
        assert off(chunk, streamed.flatten()[:-64]) < 1e-3


def test_the_first_chunk_comes_before_the_end(make_fast):
    tts = accelerate(make_fast(stop_bias=-30.0))
    module = tts.autoregressive
    drawn = module.get_generator(module.compute_embeddings(VOICE[0], ids_of(tts)), do_sample=True, top_k=50)
    next(drawn)
    work = tts._clvp_fast.engine._work
    assert not work.loop.idle
    drawn.close()
    assert work.loop.idle and not work.pending
    alone = [list(tts.tts_stream(TEXT, VOICE, verbose=False, use_deterministic_seed=seed)) for seed in (1, 2, 1)]
    assert all(map(torch.equal, alone[0], alone[2]))
    assert not all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(alone[0], alone[1], strict=False))


def test_storages_are_shared_and_go_back(make_fast):
    tts = make_fast()
    names = set(vars(tts)), set(vars(tts.autoregressive)), set(vars(tts.hifi_decoder))
    before = {name: (x.clone(), x.stride()) for name, x in tts.autoregressive.state_dict().items()}
    accelerate(tts)
    decoder = tts._clvp_fast.engine.model.speech_decoder_model
    theirs = {x.untyped_storage().data_ptr() for x in tts.autoregressive.state_dict().values()}
    assert all(x.untyped_storage().data_ptr() in theirs for x in decoder.state_dict().values())
    restore(tts)
    assert (set(vars(tts)), set(vars(tts.autoregressive)), set(vars(tts.hifi_decoder))) == names
    for name, x in tts.autoregressive.state_dict().items():
        assert torch.equal(x, before[name][0]) and x.stride() == before[name][1]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(k=2), "k must be a whole number from 1 to 1, not 2"),
        (dict(top_k=5), "top_k is what tts"),
        (dict(typical_sampling=True, typical_mass=0), "typical_mass must be above 0"),
        (dict(voice="me"), "does not know: voice='me'"),
        (dict(max_generate_length=1000), "max_generate_length must be a whole number from 1 to 59"),
    ],
)
def test_a_call_that_cannot_be_is_refused_by_name(make_fast, options, message):
    tts = make_fast()
    with pytest.raises(TypeError, match="score_dtype follows from Tortoise"):  # it ranks nothing
        accelerate(tts, score_dtype=torch.bfloat16)
    accelerate(tts)
    for method in (tts.tts, tts.tts_stream):
        with pytest.raises((TypeError, ValueError), match=message):
            method(TEXT, VOICE, **options)
    with pytest.raises(ValueError, match="what compute_embeddings"):
        tts.autoregressive.get_generator(torch.ones(1, 4))


def test_restore_waits_for_a_stream_that_is_half_read(make_fast):
    tts = accelerate(make_fast(stop_bias=-30.0))
    if isinstance(tts, stand_in_fast.TextToSpeech):
        chunks = tts.tts_stream(TEXT, VOICE, **LIKELIEST, stream_chunk_size=10)
        next(chunks)
        with pytest.raises(
            ValueError, match=r"a tts_stream\(\) of it is half read: read it to its end or close\(\) it"
        ):
            restore(tts)
        chunks.close()
    for chunk in tts.tts_stream(TEXT, VOICE, **LIKELIEST, overlap_wav_len=64):
        assert chunk.isfinite().all()
        with pytest.raises(ValueError, match="is half read"):
            restore(tts)
    assert tts._clvp_fast.streams == 0
    restore(tts)


@torch.no_grad()
def test_several_chunks_fade_into_one_another(tortoise_api):
    """Fade as Tortoise does over our states: each chunk is that of its `handle_chunks` over all states until then."""
    tts = stand_in_fast.tiny_fast(importlib.import_module("tortoise.api_fast"), stop_bias=-30.0, max_mel_tokens=120)
    module = tts.autoregressive
    prompt, codes = prompt_of(module, VOICE[0], ids_of(tts)), argmax_codes(module, VOICE[0], ids_of(tts), 119)
    states = torch.cat([next_state(module, prompt, codes[:place]) for place in range(len(codes))])[None]
    expected, before, faded = [], None, None
    for length in (60, 85, 110, 119):
        chunk, before, faded = tts.handle_chunks(heard(tts, states[:, :length]).flatten(), before, faded, 64)
        expected.append(chunk)
    accelerate(tts)
    chunks = list(tts.tts_stream(TEXT, VOICE, **LIKELIEST, stream_chunk_size=25, overlap_wav_len=64))
    assert len(chunks) == 4
    for found, wanted in zip(chunks, expected, strict=True):
        assert off(found, wanted) < 1e-3
