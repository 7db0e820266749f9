"""Changes to a live `TextToSpeech` before, while and after it is accelerated: seen, refused by name, or kept."""

import copy
import functools
import io
import pickle
import threading

import pytest
import torch
from torch import nn

import clvp_fast
from clvp_fast.integrations.tortoise import accelerate, restore
from tests.integrations.test_tortoise import CALL, TEXT, clips, ids_of, latents
from tests.kit import isa

SPEAK = CALL | dict(conditioning_latents=latents(), max_mel_tokens=8)


def other_weight(tts):
    head = tts.autoregressive.mel_head
    head.weight = nn.Parameter(2 * head.weight.detach())


def other_head(tts):
    tts.autoregressive.mel_head = nn.Linear(128, 302)


def other_projection(tts):
    tts.clvp.to_text_latent = nn.Linear(*reversed(tts.clvp.to_text_latent.weight.shape), bias=False)


def other_parameters(tts):
    state = {name: 2 * value for name, value in tts.autoregressive.state_dict().items()}
    tts.autoregressive.load_state_dict(state, assign=True)


def other_decoder(tts):
    tts.autoregressive = copy.deepcopy(tts.other.autoregressive)


def other_clvp(tts):
    tts.clvp = copy.deepcopy(tts.other.clvp)


def other_positions(tts):
    tts.autoregressive.inference_model = copy.copy(tts.autoregressive.inference_model)


@pytest.mark.parametrize(
    "change, message",
    [
        (other_weight, r"parameter mel_head.weight of tts was moved, cast or replaced"),
        (other_head, r"a module of tts.autoregressive was replaced"),
        (other_projection, r"a module of tts.clvp was replaced"),
        (other_parameters, r"parameter \S+ of tts was moved, cast or replaced"),
        (other_decoder, r"tts.autoregressive was replaced"),
        (other_clvp, r"tts.clvp was replaced"),
        (other_positions, r"a module of tts.autoregressive was replaced"),
    ],
)
def test_replaced_parts_are_refused(make_tts, change, message):
    tts = make_tts()
    tts.other = make_tts()
    mine = tts.autoregressive, tts.clvp
    accelerate(tts)
    change(tts)
    for call in (lambda: tts.tts(TEXT, **SPEAK), lambda: tts.tts_many([TEXT], **CALL)):
        with pytest.raises(ValueError, match=message):
            call()
    restore(tts)
    assert all("forward" not in vars(module) for module in mine)


def test_restore_keeps_attributes_of_ones_own(make_tts):
    tts = make_tts()
    calls, stock = [], tts.tts

    def spoken(text, **kwargs):
        calls.append(text)
        return stock(text, **kwargs)

    spoken.__wrapped__ = stock
    mine = dict(tts=spoken, tts_many=lambda: "mine", __getstate__=lambda: {})
    vars(tts).update(mine)
    tts.clvp.__dict__["to"] = to = tts.clvp.to
    accelerate(tts)
    tts.tts(TEXT, **SPEAK)
    assert calls == [TEXT] and tts.tts_many is not mine["tts_many"]
    restore(tts)
    assert {name: vars(tts)[name] for name in mine} == mine and vars(tts.clvp)["to"] == to


@pytest.mark.parametrize("name, method", [("autoregressive", "forward"), ("clvp", "forward")])
def test_a_forward_that_would_not_run_is_refused(make_tts, name, method):
    tts = make_tts()
    module = getattr(tts, name)
    stock = getattr(module, method)
    vars(module)[method] = lambda *args, **kwargs: stock(*args, **kwargs)
    with pytest.raises(ValueError, match=rf"tts.{name}.forward\(\) has no argument .*: take off"):
        accelerate(tts)
    vars(module)[method].__wrapped__ = stock
    with pytest.raises(ValueError, match=rf"tts.{name} has a forward\(\) of its own"):
        accelerate(tts)
    del vars(module)[method]
    accelerate(tts)


@pytest.mark.parametrize("shared", ["clvp", "autoregressive"])
def test_one_module_of_two_objects_is_refused(make_tts, shared):
    first, second = make_tts(), make_tts()
    setattr(second, shared, getattr(first, shared))
    accelerate(first)
    with pytest.raises(ValueError, match=rf"tts.{shared} is part of another TextToSpeech that is accelerated"):
        accelerate(second)
    first.tts(TEXT, **SPEAK)
    restore(first)
    accelerate(second).tts(TEXT, **SPEAK)


def test_copies_are_refused_and_restore_nothing(make_tts):
    tts = make_tts()
    accelerate(tts)
    for thing in (tts, tts.autoregressive, tts.clvp):
        for way in (copy.copy, copy.deepcopy, pickle.dumps, lambda x: torch.save(x, io.BytesIO())):
            with pytest.raises(TypeError, match=r"call restore\(tts\) before you copy or save it"):
                way(thing)
    other = type(tts).__new__(type(tts))
    vars(other).update(vars(tts))
    with pytest.raises(ValueError, match="a copy of one that is accelerated"):
        restore(other)
    tts.tts(TEXT, **SPEAK)
    restore(tts)
    copy.deepcopy(tts.clvp)
    copy.copy(tts)


def lora(linear):
    kind = type("LoraLinear", (nn.Linear,), dict(__module__="peft.tuners.lora"))
    adapted = kind(linear.in_features, linear.out_features)
    adapted.load_state_dict(linear.state_dict())
    return adapted


def first_linear(clvp):
    return next(module for module in clvp.modules() if hasattr(module, "to_q")).to_q


@pytest.mark.parametrize(
    "change",
    [
        lambda tts: tts.autoregressive.gpt.h[1].register_forward_hook(print),
        lambda tts: tts.autoregressive.mel_head.register_forward_pre_hook(print),
        lambda tts: first_linear(tts.clvp).register_forward_hook(print),
        lambda tts: vars(tts.autoregressive.final_norm).update(forward=print),
    ],
    ids=["block", "head", "clvp", "forward"],
)
def test_hooks_and_replaced_forwards_are_refused(make_tts, change):
    tts = make_tts()
    accelerate(tts)
    change(tts)
    with pytest.raises(ValueError, match=r"got hooks or another forward after accelerate\(tts\)"):
        tts.tts(TEXT, **SPEAK)
    restore(tts)
    with pytest.raises(ValueError, match=r"has hooks, a forward of its own .* take it off"):
        accelerate(tts)
    assert not hasattr(tts, "tts_many")


def test_adapters_are_refused(make_tts):
    tts = make_tts()
    tts.autoregressive.mel_head = lora(tts.autoregressive.mel_head)
    with pytest.raises(ValueError, match=r"mel_head is a LoraLinear of peft.tuners.lora, .*merge adapters"):
        accelerate(tts)


def test_hooks_that_run_stay(make_tts):
    """Keep hooks of the two modules themselves, and of the voice encoder, which Tortoise calls."""
    tts = make_tts()
    seen = []
    for module in (tts.autoregressive, tts.clvp):
        module.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    tts.autoregressive.conditioning_encoder.register_forward_hook(print)
    accelerate(tts).tts(TEXT, **SPEAK)
    assert seen == ["CLVP", "UnifiedVoice"]


def test_inference_mode_leaves_parameters_that_train(make_tts):
    tts = make_tts()
    with torch.inference_mode():
        restore(accelerate(tts))
        accelerate(tts).tts(TEXT, **SPEAK)
    restore(tts)
    parameters = [*tts.autoregressive.parameters(), *tts.clvp.parameters()]
    assert not any(parameter.is_inference() or parameter.data.is_inference() for parameter in parameters)
    loss = tts.autoregressive.gpt.h[0].attn.c_attn.weight.square().sum() + first_linear(tts.clvp).weight.square().sum()
    loss.backward()
    torch.optim.SGD(parameters, 0.1).step()


def test_a_device_change_in_inference_mode_leaves_parameters_that_train(make_tts):
    tts = accelerate(make_tts())
    weights = tts._clvp_fast._weights
    with torch.inference_mode():
        weights.model.speech_decoder_model.lm_head.weight.data = torch.zeros(302, 128)
        weights.move(torch.device("cpu"))
    assert weights.apart() is None
    assert not any(parameter.is_inference() for parameter in (*tts.clvp.parameters(), *weights.model.parameters()))


def test_storages_of_other_kinds_come_back(make_tts):
    """Restore parts of one buffer, storage in another order, and storage that another process reads."""
    tts = make_tts()
    sound = tts.clvp(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 9, dtype=torch.long))
    buffer = torch.cat([parameter.data.flatten() for parameter in tts.clvp.parameters()])
    begin = 0
    for parameter in tts.clvp.parameters():
        parameter.data = buffer[begin : begin + parameter.numel()].view(parameter.shape)
        begin += parameter.numel()
    first, second = (block.attn.c_attn.weight for block in tts.autoregressive.gpt.h)
    first.data = first.data.t().contiguous().t()
    second.data = second.data.clone().share_memory_()
    parameters = [*tts.clvp.parameters(), first, second]
    before = [(parameter.data_ptr(), parameter.stride()) for parameter in parameters]
    accelerate(tts).tts(TEXT, **SPEAK)
    with torch.no_grad():
        tts.clvp.temperature += 1
        first_linear(tts.clvp).weight.mul_(2)
        seen = first_linear(tts.clvp).weight.clone()
    restore(tts)
    assert [(parameter.data_ptr(), parameter.stride()) for parameter in parameters] == before
    assert second.is_shared() and torch.equal(first_linear(tts.clvp).weight, seen)
    with torch.no_grad():
        first_linear(tts.clvp).weight.div_(2)
        tts.clvp.temperature -= 1
    again = tts.clvp(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 9, dtype=torch.long))
    assert torch.allclose(again, sound, atol=1e-4)


def test_a_move_that_fails_on_its_way_is_undone(make_tts, monkeypatch):
    tts = accelerate(make_tts())
    weights, point = tts._clvp_fast._weights, type(tts._clvp_fast._weights)._point
    pointed = []

    def failing(only=None):
        pointed.append(only)
        if len(pointed) == 3:
            raise RuntimeError("out of memory, says the test")
        point(weights, only)

    monkeypatch.setattr(weights, "_point", failing)
    monkeypatch.setattr(weights, "stands_on", lambda device: bool(pointed))
    with pytest.raises(RuntimeError, match="out of memory"):
        tts.tts(TEXT, **SPEAK)
    assert len(pointed) > 6 and weights.apart() is None
    tts.tts(TEXT, **SPEAK)


def test_each_of_many_texts_has_a_seed_of_its_own(make_tts):
    tts = accelerate(make_tts())
    settings = CALL | dict(max_mel_tokens=20)
    for voices in ([latents()] * 3, None):
        sounds = tts.tts_many([TEXT] * 3, voices, **settings)
        pairs = [(sounds[one], sounds[two]) for one, two in ((0, 1), (0, 2), (1, 2))]
        assert not any(one.shape == two.shape and torch.equal(one, two) for one, two in pairs)
    first, second = tts.tts_many((text for text in [TEXT] * 2), None, **settings, use_deterministic_seed=2)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "texts, voices, message",
    [
        ([TEXT], "daniel", "a voice for each text, in a list, and a str came"),
        ([TEXT], torch.zeros(1, 20), "a voice for each text, in a list, and a Tensor came"),
        ([TEXT, TEXT], [None, "daniel"], "that of text 1 is a str"),
        ([TEXT], [[]], "that of text 0 is a list of 0"),
        ([TEXT], [(latents()[0],)], "that of text 0 is a tuple of 1"),
        ([TEXT], [clips(1)[0]], "that of text 0 is a Tensor"),
        ([3], None, "a list of texts, and one of them is 3"),
    ],
)
def test_wrong_texts_and_voices_are_refused(make_tts, texts, voices, message):
    tts = accelerate(make_tts())
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        tts.tts_many(texts, voices, **CALL)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_forward_that_asks_for_more_is_tortoises_own(make_tts, monkeypatch):
    tts = make_tts()
    asked = []

    @functools.wraps(type(tts.autoregressive).forward)
    def stock(self, *args, **kwargs):
        asked.append(torch.is_grad_enabled())

    monkeypatch.setattr(type(tts.autoregressive), "forward", stock)
    accelerate(tts)
    inputs = latents()[0], ids_of(tts), torch.tensor([13]), torch.ones(1, 40, dtype=torch.long)
    whole, short = torch.tensor([40 * 1024]), torch.tensor([20 * 1024])
    latent = dict(return_latent=True, clip_inputs=False)
    assert tts.autoregressive(*inputs, whole, **latent).shape == (1, 40, 128) and not asked
    for lengths, more in ((short, {}), (whole, dict(raw_mels=inputs[3])), (whole, dict(return_attentions=True))):
        assert tts.autoregressive(*inputs, lengths, **latent, **more) is None
    assert asked == [True] * 3


def test_top_k_none_keeps_all(make_tts, monkeypatch):
    tts = accelerate(make_tts())
    seen, engine = [], tts._clvp_fast.engine
    generate = engine.generate

    def watched(request):
        seen.append(request.sampling.top_k)
        return generate(request)

    monkeypatch.setattr(engine, "generate", watched)
    tts.tts(TEXT, **SPEAK, top_k=None)
    tts.tts(TEXT, **SPEAK)
    assert seen == [0, 50]


def test_modules_keep_their_dtype(make_tts):
    tts = accelerate(make_tts())
    for other in (torch.float64, torch.zeros(1, dtype=torch.float64)):
        with pytest.raises(ValueError, match="keeps its dtype"):
            tts.clvp.to(other)
    assert tts.clvp.to(torch.zeros(1)) is tts.clvp.to(torch.float32) is tts.clvp.float() is tts.clvp


def test_a_cpu_by_number_is_the_cpu(make_tts):
    tts = make_tts()
    tts.device = torch.device("cpu", 0)
    place = tts.autoregressive.mel_head.weight.data_ptr()
    accelerate(tts).tts(TEXT, **SPEAK)
    assert tts.autoregressive.mel_head.weight.data_ptr() == place


def test_restore_within_a_call_is_refused(make_tts):
    tts = accelerate(make_tts())
    encode = tts.tokenizer.encode
    tts.tokenizer.encode = lambda text: encode(text) if restore(tts) else None
    for call in (lambda: tts.tts(TEXT, **SPEAK), lambda: tts.tts_many([TEXT], **CALL)):
        with pytest.raises(ValueError, match="was called within a call"):
            call()
    tts.tokenizer.encode = encode
    tts.tts(TEXT, **SPEAK)
    restore(tts)


def test_one_of_two_threads_accelerates_and_one_restores(make_tts):
    tts = make_tts()
    for change, message in ((accelerate, "accelerated already"), (restore, "not accelerated")):
        told = []

        def changed(change=change, told=told):
            try:
                change(tts)
                told.append("done")
            except ValueError as error:
                told.append(str(error))

        threads = [threading.Thread(target=changed) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(text == "done" for text in told) == [False, True] and any(message in text for text in told)


def test_a_call_that_waited_for_restore_is_tortoises_own(make_tts, monkeypatch):
    tts = make_tts()
    monkeypatch.setattr(tts, "tts", lambda *args, _own=tts.tts, **kwargs: "stock", raising=False)
    tts.tts.__wrapped__ = type(tts).tts.__get__(tts)
    accelerate(tts)
    kept = tts.tts
    many = tts.tts_many
    restore(tts)
    assert kept(TEXT, **SPEAK) == "stock"
    with pytest.raises(ValueError, match="restored while the call waited"):
        many([TEXT], **CALL)


def test_pages_of_another_dtype_are_refused(make_tts):
    tts = make_tts()
    with pytest.raises(ValueError, match=r"page_dtype must be torch.float8_e4m3fn, or None"):
        accelerate(tts, page_dtype=torch.int8)
    accelerate(tts)


@pytest.mark.parametrize(
    "device, half, message",
    [
        ("cuda", True, r"half=True is an autocast .* or set tts.half = False"),
        ("mps", False, "tts.device is mps, and the engine runs on CPUs and CUDA devices"),
    ],
)
def test_a_device_or_half_precision_that_is_not_served_is_refused(make_tts, device, half, message):
    """Refuse before `accelerate(tts)`, and where the object changes later; a CPU's autocast does nothing."""
    tts = make_tts()
    tts.half, before = half, tts.device
    accelerate(tts)
    expected = tts.tts(TEXT, **SPEAK, use_deterministic_seed=4)
    tts.device = torch.device(device)
    for call in (lambda: tts.tts(TEXT, **SPEAK, use_deterministic_seed=4), lambda: tts.autoregressive.to(device)):
        with pytest.raises(ValueError, match=message):
            call()
    tts.device = before
    assert torch.equal(tts.tts(TEXT, **SPEAK, use_deterministic_seed=4), expected)
    restore(tts)
    tts.device = torch.device(device)
    with pytest.raises(ValueError, match=message):
        accelerate(tts)
    assert not hasattr(tts, "tts_many")


def test_objects_that_share_modules_are_refused(make_tts):
    first, second = make_tts(), make_tts()
    second.clvp.text_emb = first.clvp.text_emb
    accelerate(first)
    with pytest.raises(ValueError, match=r"tts.clvp.text_emb is part of another TextToSpeech that is accelerated"):
        accelerate(second)
    assert not hasattr(second, "tts_many")
    restore(first)
    accelerate(second)
    with pytest.raises(ValueError, match=r"tts.clvp.text_emb is part of another"):
        accelerate(first)


def test_weights_that_changed_are_copied_anew_in_8_bits(make_tts):
    """Nobody who calls `tts()` has an engine to refresh."""
    tts = accelerate(make_tts(), weight_dtype=torch.int8)
    before = tts.tts(TEXT, **SPEAK, use_deterministic_seed=4)
    block = tts.autoregressive.gpt.h[0].mlp.c_fc
    with torch.no_grad():
        block.weight.mul_(-1)
    changed = tts.tts(TEXT, **SPEAK, use_deterministic_seed=4)
    assert changed.shape != before.shape or not torch.equal(changed, before)
    with torch.no_grad():
        block.weight.mul_(-1)
    assert torch.equal(tts.tts(TEXT, **SPEAK, use_deterministic_seed=4), before)


@isa.needs("linear", torch.int8)
def test_activations_in_8_bits_are_over_packed_weights(make_tts):
    """Pack, where the engine of a `TextToSpeech` does not by default."""
    found = []
    for options in (dict(), dict(activation_dtype=torch.int8)):
        tts = accelerate(make_tts(), weight_dtype=torch.int8, **options)
        found.append((tts._clvp_fast.engine.memory.parts["panels"] > 0, tts.tts(TEXT, **SPEAK)))
    assert [packed for packed, _ in found] == [False, True]


@torch.no_grad()
def test_scores_in_another_dtype(make_tts):
    """Score by a copy of CLVP's speech side, which follows its weights."""
    tts = make_tts()
    rows = torch.randint(0, 300, (6, 40), generator=torch.Generator().manual_seed(1))
    text = ids_of(tts).repeat(6, 1)
    exact = tts.clvp(text, rows)
    with pytest.raises(ValueError, match=r"scored in torch.float32, torch.bfloat16, torch.float16, not torch.int8"):
        accelerate(tts, score_dtype=torch.int8)
    assert "forward" not in vars(tts.clvp) and torch.equal(tts.clvp(text, rows), exact)
    accelerate(tts, score_dtype=torch.bfloat16)
    half = tts.clvp(text, rows, return_loss=False)
    assert 1e-5 < (half - exact).abs().max() < 0.05 and tts.clvp.speech_emb.weight.dtype == torch.float32
    tts.clvp.speech_emb.weight.mul_(-1)
    changed = tts.clvp(text, rows, return_loss=False)
    assert (changed - half).abs().max() > 0.05
    assert (changed - restore(tts).clvp(text, rows)).abs().max() < 0.05


@pytest.mark.parametrize("size", [7, 0, 64])
def test_pages_of_another_size_are_refused(make_tts, size):
    with pytest.raises(ValueError, match=f"page_size must be 16 or 32, .*, not {size}"):
        accelerate(make_tts(), page_size=size)


def test_coquis_tortoise_is_refused_by_name():
    kind = type("Tortoise", (), {"__module__": "TTS.tts.models.tortoise", "autoregressive": None})
    with pytest.raises(TypeError, match=r"coqui-tts's Tortoise is not supported, .* make that package's TextToSpeech"):
        clvp_fast.accelerate(kind())
