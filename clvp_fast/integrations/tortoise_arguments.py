"""Checks whether the engine can serve a `TextToSpeech` and its calls; each refusal is one sentence."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from clvp_fast.engine.sampling_params import SamplingParams
from clvp_fast.integrations.tortoise_modules import refuse_shared
from clvp_fast.io.errors import require_whole, shown

# The attributes of a `TextToSpeech` of `tortoise.api` and of `tortoise.api_fast` that are used, and arguments of
# `tts()`.
_ATTRIBUTES = ("autoregressive", "clvp", "diffusion", "vocoder", "tokenizer", "device", "half", "cvvp")
_ARGUMENTS = (
    *("num_autoregressive_samples", "max_mel_tokens", "voice_samples", "conditioning_latents", "cvvp_amount"),
    *("k", "use_deterministic_seed"),
)
_FAST_ATTRIBUTES = ("autoregressive", "hifi_decoder", "tokenizer", "device", "half", "tts_stream")
_FAST_ARGUMENTS = ("voice_samples", "k", "use_deterministic_seed")
# Arguments of the forwards of its modules.
_FORWARDS = dict(
    autoregressive=(
        *("speech_conditioning_latent", "text_inputs", "mel_codes", "wav_lengths", "types", "text_first", "raw_mels"),
        *("return_attentions", "return_latent", "clip_inputs"),
    ),
    clvp=("text", "speech_tokens", "return_loss"),
)
# Settings of the engine that Tortoise decides.
_TAKEN = ("scorer", "scoring", "latents", "states", "text_ends")

# Keywords of transformers' `generate` that only affect beam search.
_WITHOUT_MEANING = {
    *("length_penalty", "output_attentions", "output_hidden_states", "output_scores", "use_cache", "early_stopping"),
    *("return_dict_in_generate", "synced_gpus"),
}
# transformers' own defaults for settings that a caller leaves out.
_NEUTRAL: dict[str, Any] = dict(
    do_sample=False, temperature=1.0, top_k=50, top_p=1.0, typical_p=1.0, min_p=0.0, repetition_penalty=1.0
)
# The default mass of `typical_sampling` in `inference_speech`.
_TYPICAL_MASS = 0.9


def is_fast(tts: Any) -> bool:
    """Tell whether an object is probably one of `tortoise.api_fast`, which has no CLVP."""
    return hasattr(tts, "hifi_decoder") and not hasattr(tts, "clvp")


def check_object(tts: Any) -> None:
    """Raise `TypeError` for anything but a `TextToSpeech` of tortoise-tts 3.0.0, `ValueError` for an unserved one."""
    if type(tts).__module__.partition(".")[0] == "TTS":
        raise TypeError(
            "coqui-tts's Tortoise is not supported, whose inference() is another than the tts() of tortoise-tts 3.0.0: "
            "make that package's TextToSpeech of the same files (docs/tortoise.md)"
        )
    attributes, wanted = (_FAST_ATTRIBUTES, _FAST_ARGUMENTS) if is_fast(tts) else (_ATTRIBUTES, _ARGUMENTS)
    missing = [name for name in attributes if not hasattr(tts, name)]
    arguments = inspect.signature(tts.tts).parameters if callable(getattr(tts, "tts", None)) else {}
    if missing or not {*wanted} <= arguments.keys():
        missing += ["tts()"] if not arguments else [name for name in wanted if name not in arguments]
        kind = f"{type(tts).__module__}.{type(tts).__name__}"
        raise TypeError(
            "accelerate() takes a model of transformers or a TextToSpeech of tortoise-tts 3.0.0, and this "
            f"{kind} has no {missing[0]}"
        )
    names = [name for name in ("autoregressive", "clvp") if name in attributes]
    for name in names:
        module = getattr(tts, name)
        if not isinstance(module, torch.nn.Module) or isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"tts.{name} is a {type(module).__name__}, and no live module: load Tortoise's .pth files")
        refuse_shared(name, module)  # before its signature is read, because another engine has replaced that
    autoregressive = tts.autoregressive
    for name in names:
        known = inspect.signature(getattr(tts, name).forward).parameters
        if lacking := [argument for argument in _FORWARDS[name] if argument not in known]:
            raise ValueError(f"tts.{name}.forward() has no argument {lacking[0]}, as Tortoise's: take off its wrapper")
    if not hasattr(autoregressive, "inference_model"):
        raise ValueError("tts.autoregressive was not prepared for inference: call its post_init_gpt2_config() first")
    if hasattr(autoregressive, "ds_engine"):
        raise ValueError("use_deepspeed=True puts other modules in the place of Tortoise's: make tts without it")
    check_device(tts)
    for name in names:
        dtypes = {parameter.dtype for parameter in getattr(tts, name).parameters()}
        if dtypes != {torch.float32}:
            found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise ValueError(f"tts.{name} is in {found}, and Tortoise's own float32 is needed: load it anew")


def check_device(tts: Any) -> None:
    """Raise `ValueError` if an object's device, or its half precision there, is not served."""
    if (device := torch.device(tts.device)).type not in ("cpu", "cuda"):
        raise ValueError(f"tts.device is {device}, and the engine runs on CPUs and CUDA devices")
    if tts.half and device.type != "cpu":
        raise ValueError(
            "half=True is an autocast that the engine does not run under: make tts with half=False, or set "
            "tts.half = False"
        )


def check_options(engine_options: Mapping[str, Any], fast: bool) -> None:
    """Raise `TypeError` for settings of the engine that Tortoise decides; the object of `api_fast` ranks nothing."""
    for name in (*_TAKEN, *["score_dtype"] * fast):
        if name in engine_options:
            raise TypeError(f"{name} follows from Tortoise where accelerate() takes its object: leave it out")


def check_call(given: Mapping[str, Any], max_new_tokens: int) -> None:
    """Raise `ValueError` if a call of `tts()` asks for something impossible, before anything is computed.

    Args:
        given: all arguments of the call by name; those for `generate` are under `hf_generate_kwargs`.
        max_new_tokens: the engine's.
    """
    samples, k = given["num_autoregressive_samples"], given["k"]
    require_whole("num_autoregressive_samples", samples, 1, None)
    require_whole("k", k, 1, samples)
    require_whole("max_mel_tokens", given["max_mel_tokens"], 1, max_new_tokens)
    if given["cvvp_amount"] == 1 and given["voice_samples"] is None:
        raise ValueError("cvvp_amount=1 ranks by the voice's recordings alone: give voice_samples, or less of it")
    options = _drawing(given, ("do_sample", "num_return_sequences", "max_generate_length"))
    sampling(options, num_candidates=samples, max_new_tokens=given["max_mel_tokens"])


def check_many(texts: Any, voices: Any) -> tuple[list[str], list[Any]]:
    """Return texts and a voice for each, or raise `ValueError` for anything else."""
    if isinstance(texts, str):
        raise ValueError("tts_many() takes a list of texts, not one: call tts() for it")
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"tts_many() takes a list of texts, and one of them is {shown(text)}")
    if isinstance(voices, str | torch.Tensor):
        raise ValueError(f"tts_many() takes a voice for each text, in a list, and a {type(voices).__name__} came")
    voices = [None] * len(texts) if voices is None else list(voices)
    if len(voices) != len(texts):
        raise ValueError(f"tts_many() takes a voice for each of the {len(texts)} texts, and {len(voices)} came")
    for place, voice in enumerate(voices):
        several = isinstance(voice, list | tuple) and all(isinstance(part, torch.Tensor) for part in voice)
        if voice is None or (several and (len(voice) == 2 or (isinstance(voice, list) and voice))):
            continue
        raise ValueError(
            "a voice of tts_many() is a list of clips, a pair of latents (a tuple) or None, and that of text "
            f"{place} is {_kind(voice)}: load it, for one by load_voice()"
        )
    return texts, voices


def _kind(voice: Any) -> str:
    count = f" of {len(voice)}" if isinstance(voice, list | tuple) else ""
    return f"a {type(voice).__name__}{count}"


def check_fast_call(given: Mapping[str, Any], max_new_tokens: int) -> None:
    """Raise as `check_call`, for `tts()` or `tts_stream()` of `tortoise.api_fast`."""
    require_whole("k", given["k"], 1, 1)
    options = _drawing(given, ("do_sample", "top_k", "num_return_sequences", "num_beams"))
    length = options.pop("max_generate_length", max_new_tokens)
    require_whole("max_generate_length", length, 1, max_new_tokens)
    sampling(options, num_candidates=1, max_new_tokens=length)


def _drawing(given: Mapping[str, Any], taken: tuple[str, ...]) -> dict[str, Any]:
    """Return a call's sampling settings; raise `TypeError` for one that `tts()` itself passes to `generate`."""
    more = dict(given.get("hf_generate_kwargs", {}))
    for name in taken:
        if name in more:
            raise TypeError(f"{name} is what tts() says itself: leave it out")
    settings = {name: given[name] for name in ("temperature", "top_p", "repetition_penalty")}
    return settings | more | dict(do_sample=True)


def sampling(options: Mapping[str, Any], **settings) -> SamplingParams:
    """Translate the keywords of `inference_speech` for transformers' `generate`; `settings` are the engine's own.

    Raises `ValueError` or `TypeError` that names a setting which the engine does not support.
    """
    options, values = dict(options), dict(_NEUTRAL)
    mass = options.pop("typical_mass", _TYPICAL_MASS)
    if options.pop("typical_sampling", False):
        settings["typical_mass"] = mass
    for name, value in options.items():
        if name in values:
            off = 0 if name == "top_k" else values[name]
            values[name] = off if value is None else value
        elif name == "num_beams":
            if value not in (None, 1):
                raise ValueError(f"num_beams={shown(value)}: the engine samples, and searches with no beams")
        elif name not in _WITHOUT_MEANING:
            raise TypeError(f"tts() got an argument that the engine does not know: {name}={shown(value)}")
    if not values["do_sample"]:
        settings.pop("typical_mass", None)
        values = {name: values[name] for name in ("do_sample", "repetition_penalty")}
    return SamplingParams(**values, **settings)
