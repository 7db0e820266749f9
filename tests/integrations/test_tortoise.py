"""`accelerate(tts)`: codes, scores, latents and sound are those of Tortoise's own modules, and all can go back."""

import importlib
import inspect
import random
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import TypicalLogitsWarper

from clvp_fast.integrations.tortoise import accelerate, restore
from tests.integrations.oracle import (
    argmax_codes,
    next_logits,
    off,
    penalized,
    prompt_of,
    randomize,
    stock_inference_speech,
)

TEXT = "Hello there."
SILENCE, STOP = 83, 301
CALL = dict(verbose=False, num_autoregressive_samples=4, max_mel_tokens=40, diffusion_iterations=2, cond_free=False)


def latents(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 128, generator=generator), torch.randn(1, 128, generator=generator)


def clips(count=2):
    generator = torch.Generator().manual_seed(3)
    return [0.1 * torch.randn(1, 140_000, generator=generator) for _ in range(count)]


def ids_of(tts, text=TEXT):
    return F.pad(torch.IntTensor([tts.tokenizer.encode(text)]), (0, 1))


class LatentsSeen:
    """The latents that the diffusion is handed."""

    def __init__(self, tts):
        self.latents, self.own = [], tts.diffusion.timestep_independent
        tts.diffusion.timestep_independent = self

    def __call__(self, found, *args):
        self.latents.append(found.clone())
        return self.own(found, *args)


@pytest.fixture
def tts(make_tts):
    return make_tts()


@pytest.fixture(scope="module")
def live(make_tts):
    """Give an accelerated object, for tests that leave it as it is."""
    return accelerate(make_tts())


# Ways in which a candidate ends, with the change to the head's bias.
ENDS = {"never": {STOP: -30.0}, "at once": {STOP: 30.0}, "silence in speech": {SILENCE: 60.0}}


@pytest.mark.parametrize("kv_cache", [False, True])
@pytest.mark.parametrize("end", [*ENDS, "on the way", "one before the limit"])
def test_sound_is_that_of_tortoises_own_modules(make_tts, end, kv_cache):
    tts = make_tts(kv_cache=kv_cache)
    with torch.no_grad():
        for token, bias in ENDS.get(end, {}).items():
            tts.autoregressive.mel_head.bias[token] += bias
    limit = 9 if end == "one before the limit" else 40
    if limit == 9 or end == "on the way":  # the code that comes at the 8th place is the stop from there on
        code = argmax_codes(tts.autoregressive, latents()[0], ids_of(tts), 8)[-1]
        with torch.no_grad():
            head = tts.autoregressive.mel_head
            head.weight[STOP], head.bias[STOP] = head.weight[code], head.bias[code] + 0.01
    watch = LatentsSeen(tts)
    tts.autoregressive.inference_speech = stock_inference_speech(tts.autoregressive)
    settings = CALL | dict(conditioning_latents=latents(), use_deterministic_seed=5, top_k=1, max_mel_tokens=limit)
    expected = tts.tts(TEXT, **settings)
    del tts.autoregressive.inference_speech
    codes = argmax_codes(tts.autoregressive, latents()[0], ids_of(tts), limit)
    length = {"at once": 1, "on the way": 8, "one before the limit": 8}.get(end, 40)
    assert len(codes) == length and (codes[-1] == STOP) == (length < 40)

    accelerate(tts)
    found = tts.autoregressive.inference_speech(
        latents()[0], ids_of(tts), do_sample=True, top_k=1, repetition_penalty=2.0, max_generate_length=limit
    )
    assert found.tolist() == [codes]
    sound = tts.tts(TEXT, **settings)
    theirs, ours = watch.latents
    kept = {"never": 40, "at once": 8, "silence in speech": 8, "on the way": 15, "one before the limit": 9}
    assert ours.shape[1] == kept[end]
    assert off(ours, theirs) < 1e-5
    assert off(sound, expected) < 1e-3


@torch.no_grad()
def test_scores_and_latents_of_given_codes(make_tts):
    """Against Tortoise's forward, for several candidates, and another code is seen in both."""
    tts = make_tts()
    rows = torch.randint(0, 300, (6, 40), generator=torch.Generator().manual_seed(1))
    text = ids_of(tts).repeat(6, 1)
    lengths = torch.tensor([text.shape[1]]), torch.tensor([40 * 1024])
    inputs = latents()[0].repeat(6, 1), text, lengths[0], rows, lengths[1]
    scores, states = tts.clvp(text, rows), tts.autoregressive(*inputs, return_latent=True, clip_inputs=False)
    accelerate(tts)
    ours = tts.clvp(text, rows, return_loss=False)
    assert scores.std() > 1e-2 and (ours - scores).abs().max() < 1e-4
    assert ours.argsort().tolist() == scores.argsort().tolist()
    assert off(tts.autoregressive(*inputs, return_latent=True, clip_inputs=False), states) < 1e-5
    pairs = tts.clvp(torch.cat([text[:3], text[3:] + 1]), rows)  # texts that differ
    assert torch.allclose(pairs[:3], ours[:3], atol=1e-5) and not torch.allclose(pairs[3:], ours[3:], atol=1e-3)
    rows[0, 5] += 1
    assert (tts.clvp(text, rows)[0] - ours[0]).abs() > 1e-3
    changed = tts.autoregressive(*inputs, return_latent=True, clip_inputs=False)
    assert off(changed[0], states[0]) > 1e-2 and off(changed[1], states[1]) < 1e-5


@pytest.mark.parametrize("typical", [{}, dict(typical_sampling=True), dict(typical_sampling=True, typical_mass=0.3)])
def test_the_first_code_has_tortoises_distribution(live, typical):
    """Temperature 0.8, top_k 50, top_p 0.8, and the penalty on code 1 and the start token; by chi-squared.

    With typical sampling between that penalty and the others: of the package itself, or transformers' where it is not.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        logits = next_logits(live.autoregressive, prompt_of(live.autoregressive, latents()[0], ids_of(live)), [])
    kept = penalized(logits, {1, 300}, 2.0)
    if typical:
        before = kept
        kept = typical_warper(live)(typical.get("typical_mass", 0.9))(None, kept[None])[0]
        assert (kept.isinf() & before.isfinite()).sum() > 20
    kept = kept / 0.8
    kept[kept < kept.topk(50).values[-1]] = -torch.inf
    order = kept.argsort(descending=True)
    before = kept[order].softmax(0).cumsum(0) - kept[order].softmax(0)
    kept[order[before >= 0.8]] = -torch.inf
    exact = kept.softmax(0).double().numpy()
    options = dict(do_sample=True, temperature=0.8, top_p=0.8, repetition_penalty=2.0, num_return_sequences=3000)
    options |= typical
    drawn = live.autoregressive.inference_speech(latents()[0], ids_of(live), max_generate_length=1, **options)
    counts = np.bincount(drawn[:, 0].numpy(), minlength=len(exact))
    assert (exact > 0).sum() > 3 and not counts[exact == 0].any()
    wanted = exact[exact > 0] * 3000
    excess = ((counts[exact > 0] - wanted) ** 2 / wanted).sum() - (len(wanted) - 1)
    assert excess < 5 * (2 * len(wanted)) ** 0.5


def typical_warper(tts):
    """Return the class that `inference_speech` of the object puts among the processors."""
    return getattr(inspect.getmodule(type(tts.autoregressive)), "TypicalLogitsWarper", TypicalLogitsWarper)


def test_code_1_is_punished_from_the_beginning(make_tts):
    tts = make_tts()
    with torch.no_grad():
        logits = next_logits(tts.autoregressive, prompt_of(tts.autoregressive, latents()[0], ids_of(tts)), [])
        tts.autoregressive.mel_head.bias[1] += logits.max() - logits[1] + 1
    assert argmax_codes(tts.autoregressive, latents()[0], ids_of(tts), 1, penalty=1.0) == [1]
    (expected,) = argmax_codes(tts.autoregressive, latents()[0], ids_of(tts), 1, penalty=3.0)
    accelerate(tts)
    options = dict(do_sample=True, top_k=1, repetition_penalty=3.0, max_generate_length=1)
    found = tts.autoregressive.inference_speech(latents()[0], ids_of(tts), **options)
    assert expected != 1 and found.tolist() == [[expected]]


@pytest.mark.parametrize(
    "options, count",
    [
        (dict(k=3), 3),
        (dict(num_autoregressive_samples=1), 1),
        (dict(num_autoregressive_samples=5), 1),  # a batch holds 4
        (dict(conditioning_latents=None), 1),
        (dict(voice_samples=clips(), conditioning_latents=None), 1),
    ],
    ids=["three", "one sample", "five samples", "random voice", "clips"],
)
def test_the_same_seed_gives_the_same_sound(live, options, count):
    settings = CALL | dict(conditioning_latents=latents(), use_deterministic_seed=7) | options
    first, again = live.tts(TEXT, **settings), live.tts(TEXT, **settings)
    other = live.tts(TEXT, **settings | dict(use_deterministic_seed=8))
    first, again, other = (x if isinstance(x, list) else [x] for x in (first, again, other))
    assert len(first) == count and all(map(torch.equal, first, again))
    assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])
    assert live.autoregressive_batch_size == 4


def test_a_preset_and_the_state_are_tortoises_own(live):
    """Speak by `tts_with_preset()`, and get back what `return_deterministic_state` gives."""
    settings = CALL | dict(conditioning_latents=latents(), use_deterministic_seed=7)
    found, state = live.tts_with_preset(TEXT, preset="ultra_fast", **settings, return_deterministic_state=True)
    assert state[:2] == (7, TEXT)
    asked = dict(temperature=0.8, length_penalty=1.0, repetition_penalty=2.0, top_p=0.8, cond_free_k=2.0)
    assert torch.equal(found, live.tts(TEXT, **settings | asked))


class HalfRedacted:
    """An aligner that cuts the first half of a clip, in the place of one that needs a recogniser's weights."""

    def __init__(self):
        self.texts = []

    def redact(self, clip, text):
        assert clip.ndim == 2
        self.texts.append(text)
        return clip[:, clip.shape[1] // 2 :]


def test_redaction_is_tortoises_own(tortoise_api):
    """Hand each clip of `tts()` and `tts_many()` to the aligner, with its own text and the brackets in it."""
    from tests.integrations.package import tiny_tts

    tts, texts = accelerate(tiny_tts(tortoise_api)), ["[I am really sad,] Please feed me.", "Hello."]
    settings = CALL | dict(use_deterministic_seed=7, k=2)
    whole = tts.tts(texts[0], **settings, conditioning_latents=latents())
    tts.enable_redaction, tts.aligner = True, HalfRedacted()
    redacted = tts.tts(texts[0], **settings, conditioning_latents=latents())
    assert all(torch.equal(cut, sound[..., sound.shape[-1] // 2 :]) for cut, sound in zip(redacted, whole, strict=True))
    many = tts.tts_many(texts, [latents(), latents()], **settings)
    assert all(map(torch.equal, many[0], redacted))
    assert tts.aligner.texts == [texts[0]] * 4 + [texts[1]] * 2


def test_all_samples_are_drawn_that_were_asked_for(live, monkeypatch):
    counts = []
    generate = live._clvp_fast.engine.generate

    def watched(request):
        counts.append(request.sampling.num_candidates)
        return generate(request)

    monkeypatch.setattr(live._clvp_fast.engine, "generate", watched)
    live.tts(TEXT, **CALL | dict(num_autoregressive_samples=7), conditioning_latents=latents())
    assert counts == [7]


def test_many_texts_are_those_of_each_alone(live):
    texts = [TEXT, "No.", "The birch canoe slid."]
    voices = [latents(), None, clips()]
    settings = CALL | dict(use_deterministic_seed=7, k=2)
    found = live.tts_many(texts, voices, **settings)
    for sound, text, voice in zip(found, texts, voices, strict=True):
        given = {"conditioning_latents" if isinstance(voice, tuple) else "voice_samples": voice}
        assert all(map(torch.equal, sound, live.tts(text, **settings, **given)))


def test_cvvp_ranks_our_candidates(make_tts, tmp_path, monkeypatch):
    tts = make_tts()
    if not hasattr(tts, "rlg_auto"):  # the stand-in's
        tts.load_cvvp()
    else:
        sizes = dict(model_dim=64, transformer_heads=2, conditioning_enc_depth=1, speech_enc_depth=1)
        kind = importlib.import_module("tortoise.models.cvvp").CVVP
        tts.cvvp = randomize(kind(dropout=0, mel_codes=300, **sizes), 6)
    accelerate(tts)
    settings = CALL | dict(voice_samples=clips(1), use_deterministic_seed=3, num_autoregressive_samples=6)
    sizes, own = [], type(tts.cvvp).forward

    def counted(self, mel_cond, mel_input, return_loss=False):
        sizes.append(len(mel_input))
        return own(self, mel_cond, mel_input, return_loss)

    monkeypatch.setattr(type(tts.cvvp), "forward", counted)
    watch = LatentsSeen(tts)
    for amount in (0.0, 0.999):
        tts.tts(TEXT, **settings, cvvp_amount=amount)
    assert sizes == [4, 2]  # in batches of the size that the object has
    assert "forward" not in tts.cvvp.__dict__
    assert watch.latents[0].shape != watch.latents[1].shape or not torch.equal(*watch.latents)


def test_storages_are_shared_and_go_back(make_tts):
    tts = make_tts()
    modules = tts.autoregressive, tts.clvp
    before = [{name: (x.clone(), x.stride()) for name, x in module.state_dict().items()} for module in modules]
    names = [set(vars(owner)) for owner in (tts, *modules)]
    rows, text = torch.randint(0, 300, (2, 20)), ids_of(tts).repeat(2, 1)
    scores = tts.clvp(text, rows)
    accelerate(tts)
    model = tts._clvp_fast.engine.model
    theirs = {x.untyped_storage().data_ptr() for module in modules for x in module.state_dict().values()}
    apart = [name for name, x in model.state_dict().items() if x.untyped_storage().data_ptr() not in theirs]
    assert apart and all(".mel_attn_blocks." in name and "out_proj" not in name for name in apart)
    with torch.no_grad():  # a change in place is seen
        other = tts.clvp(text, rows)
        tts.clvp.temperature += 1
        assert (tts.clvp(text, rows) / other).allclose(torch.tensor(np.e, dtype=torch.float32), atol=1e-4)
        tts.clvp.temperature.copy_(before[1]["temperature"][0])
    assert restore(tts) is tts
    for module, state in zip(modules, before, strict=True):
        for name, x in module.state_dict().items():
            assert torch.equal(x, state[name][0]) and x.stride() == state[name][1], name
    assert [set(vars(owner)) for owner in (tts, *modules)] == names
    assert torch.equal(tts.clvp(text, rows), scores)
    with pytest.raises(ValueError, match="not accelerated"):
        restore(tts)
    accelerate(tts)


def test_threads_wait_for_one_another(live):
    settings = CALL | dict(conditioning_latents=latents())
    alone = [live.tts(TEXT, **settings, use_deterministic_seed=seed) for seed in range(3)]
    found = {}

    def speak(seed):
        found[seed] = live.tts(TEXT, **settings, use_deterministic_seed=seed)

    threads = [threading.Thread(target=speak, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], alone[seed]) for seed in range(3))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(typical_sampling=True, typical_mass=1.5), "typical_mass must be above 0 and at most 1"),
        (dict(num_beams=4), "num_beams=4: the engine"),
        (dict(voice="me"), "an argument that the engine does not know: voice='me'"),
        (dict(do_sample=False), "do_sample is what tts"),
        (dict(num_autoregressive_samples=0), "num_autoregressive_samples must be a whole number from 1 up, not 0"),
        (dict(k=5), "k must be a whole number from 1 to 4, not 5"),
        (dict(max_mel_tokens=601), "max_mel_tokens must be a whole number from 1 to"),
        (dict(temperature=0.0), "temperature must be above 0"),
        (dict(cvvp_amount=1), "give voice_samples, or less of it"),
    ],
)
def test_a_call_that_cannot_be_is_refused_by_name(live, options, message):
    random.seed(0)
    state = random.getstate(), torch.get_rng_state()
    with pytest.raises((TypeError, ValueError), match=message):
        live.tts(TEXT, **CALL | dict(conditioning_latents=latents()) | options)
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    assert live.autoregressive_batch_size == 4


def test_bad_calls_of_many(live):
    for texts, voices, options, message in (
        (TEXT, None, {}, "a list of texts, not one"),
        ([TEXT], [None, None], {}, "a voice for each of the 1 texts, and 2 came"),
        ([TEXT], None, dict(voice_samples=[]), "does not take voice_samples"),
        ([TEXT], None, dict(cvvp_amount=0.5), "ranks by CLVP alone"),
    ):
        with pytest.raises(ValueError, match=message):
            live.tts_many(texts, voices, **CALL | options)


def test_objects_that_cannot_be_are_left_as_they_were(make_tts):
    with pytest.raises(TypeError, match=r"TextToSpeech of tortoise-tts 3.0.0, and this builtins.int has no"):
        accelerate(3)
    tts = make_tts()
    with pytest.raises(TypeError, match="scorer follows from Tortoise"):
        accelerate(tts, scorer=None)
    weight = tts.autoregressive.gpt.h[0].attn.c_attn.weight
    strides = weight.stride()
    with pytest.raises(ValueError, match="max_new_tokens must be from 1 to"):
        accelerate(tts, max_new_tokens=1000)
    assert weight.stride() == strides and not hasattr(tts, "tts_many") and "forward" not in vars(tts.clvp)
    tts.autoregressive.ds_engine = None
    with pytest.raises(ValueError, match="use_deepspeed=True"):
        accelerate(tts)
    del tts.autoregressive.ds_engine
    tts.clvp.half()
    with pytest.raises(ValueError, match=r"tts.clvp is in float16"):
        accelerate(tts)
    tts.clvp.float()
    accelerate(tts)
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(tts)


def test_moved_models_are_told(make_tts):
    tts = accelerate(make_tts())
    assert tts.autoregressive.to("cpu") is tts.autoregressive.cpu() is tts.autoregressive
    with pytest.raises(ValueError, match="keeps its dtype: call restore"):
        tts.clvp.half()
    weight = tts.clvp.text_emb.weight
    weight.data = weight.data.clone()
    with pytest.raises(ValueError, match=r"parameter text_emb.weight of tts was moved, cast or replaced"):
        tts.tts(TEXT, **CALL, conditioning_latents=latents())
    restore(tts)
    accelerate(tts).tts(TEXT, **CALL, conditioning_latents=latents())


def test_a_device_without_room_leaves_all_where_it_was(make_tts, monkeypatch):
    """Move to the device `meta`, on which no engine can be made."""
    tts = accelerate(make_tts())
    stage = tts._clvp_fast
    moved, refresh = [], stage.engine.refresh

    def failing():
        if len(moved) == 1:
            raise ValueError("too little memory there, says the test")
        refresh()

    monkeypatch.setattr(stage._weights, "move", lambda device: moved.append(device.type))
    monkeypatch.setattr(stage.engine, "refresh", failing)
    tts.device = torch.device("cuda")
    with pytest.raises(ValueError, match="too little memory there"):
        tts.tts(TEXT, **CALL, conditioning_latents=latents())
    assert moved == ["cuda", "cpu"]
    tts.device = torch.device("cpu")
    tts.tts(TEXT, **CALL, conditioning_latents=latents())


@pytest.mark.gpu
def test_the_stage_follows_the_device_of_its_object(make_tts):
    tts = make_tts()
    codes = argmax_codes(tts.autoregressive, latents()[0], ids_of(tts), 20)
    accelerate(tts)
    options = dict(do_sample=True, top_k=1, repetition_penalty=2.0, max_generate_length=20)
    for device in ("cuda", "cpu", "cuda"):
        tts.device = torch.device(device)
        assert tts.autoregressive.to(tts.device) is tts.autoregressive.cpu()
        modules = tts.autoregressive, tts.clvp, tts._clvp_fast.engine.model
        assert {x.device.type for module in modules for x in module.state_dict().values()} == {device}
        assert tts._clvp_fast._weights.apart() is None
        assert tts.autoregressive.inference_speech(latents()[0], ids_of(tts), **options).tolist() == [codes]
    restore(tts)
    assert {x.device.type for x in tts.autoregressive.state_dict().values()} == {"cpu"}
