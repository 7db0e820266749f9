"""The engine behind an accelerated `TextToSpeech` of either kind, and its hooks."""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from clvp_fast.engine.engine import CandidateEngine
from clvp_fast.engine.latents import cut_in_silence, states_of_codes
from clvp_fast.engine.ranking import Ranker
from clvp_fast.engine.requests import CandidateRequest, CandidateResult
from clvp_fast.engine.scoring import Ranking
from clvp_fast.integrations.tortoise_arguments import check_device, sampling
from clvp_fast.integrations.tortoise_modules import LiveModules
from clvp_fast.integrations.tortoise_weights import SharedWeights
from clvp_fast.models.clvp.feature_extraction import ClvpFeatureExtractor
from clvp_fast.models.clvp.tokens import fill_up, most_codes, stop_token

_NOTHING = object()


class Stage:
    """An engine over the parameters of `tts.autoregressive`, which replaces methods of that module.

    Args:
        tts: a `TextToSpeech` that was checked.
        clvp: its ranking module, or None.
        longest: the most codes that it may ask for, if there are as many positions.
        engine_options: options of [`CandidateEngine`]; `score_dtype` is for the ranking of `clvp`.

    Attributes:
        engine: the engine; its `memory` says how many candidates it decodes at once.
        lock: held during a call.
        calls: how many nested calls are under way.
        streams: how many streams have begun and not ended.
        closed: whether the object was restored.

    Raises:
        ValueError: parameters that are not Tortoise's, impossible sizes, or too little memory. Everything is then
            unchanged.
    """

    def __init__(self, tts: Any, clvp: nn.Module | None, longest: int, engine_options: dict[str, Any]):
        self.tts, self.lock = tts, threading.RLock()
        self.calls, self.streams, self.closed = 0, 0, False
        self._unready = False  # a move that broke off
        self._put: list[tuple[Any, str, Any]] = []  # owner, name, and its former entry there
        self._length: int | None = None  # of the current call's codes: where its latents may be cut
        self._autoregressive = autoregressive = tts.autoregressive
        self._forward: Callable = autoregressive.forward
        self._modules = LiveModules(tts, ("autoregressive",) if clvp is None else ("autoregressive", "clvp"))
        self._weights = SharedWeights(autoregressive, clvp)
        self._home = self._model.device  # `restore()` moves the modules back to it
        try:
            self._follow_settings(autoregressive)
            limit = min(longest, most_codes(self._decoder.config))
            options: dict[str, Any] = dict(max_new_tokens=limit)
            if engine_options.get("activation_dtype") is None:
                options["packed_weights"] = False  # one copy of the weights
            features = ClvpFeatureExtractor(feature_size=self._decoder.config.feature_size)
            processor = SimpleNamespace(feature_extractor=features, tokenizer=None)
            self._weights.move(torch.device(tts.device))
            options |= engine_options
            self._ranker = Ranker(self._model, dtype=options.pop("score_dtype", None))
            self.engine = CandidateEngine(self._model, processor, scorer=_Unranked(), text_ends=1, **options)
        except BaseException:
            self._weights.move(self._home)
            self._weights.give_back()
            raise
        self._modules.take()
        self._override(tts, "__getstate__", _refuse_copies)
        for module in (autoregressive,) if clvp is None else (autoregressive, clvp):
            self._override(module, "__getstate__", _refuse_copies)
            for name in ("to", "cpu", "cuda", "half", "float", "bfloat16", "double"):
                self._override(module, name, self._mover(module, name))
        self._override(autoregressive, "inference_speech", self._inference_speech)
        self._override(autoregressive, "forward", self._latents)

    @property
    def _model(self):
        return self._weights.model

    @property
    def _decoder(self):
        return self._model.speech_decoder_model

    def _follow_settings(self, autoregressive: Any) -> None:
        """Read the object's current tokens and positions."""
        decoder, text = self._model.config.decoder_config, self._model.config.text_config
        decoder.bos_token_id, decoder.eos_token_id = autoregressive.start_mel_token, autoregressive.stop_mel_token
        text.bos_token_id, text.eos_token_id = autoregressive.start_text_token, autoregressive.stop_text_token
        # With its cache, the original gives the k-th code position k + 1.
        decoder.contiguous_positions = not autoregressive.inference_model.kv_cache

    def _override(self, owner: Any, name: str, value: Any) -> None:
        self._put.append((owner, name, owner.__dict__.get(name, _NOTHING)))
        owner.__dict__[name] = value  # set directly, because a module would register some values as its parts

    def _put_back(self, kept: int = 0) -> None:
        """Undo overrides from the last one on, except the first `kept`."""
        while len(self._put) > kept:
            owner, name, before = self._put.pop()
            if before is _NOTHING:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = before

    @contextmanager
    def calling(self) -> Iterator[bool]:
        """Wait for calls of other threads, and yield whether one of them restored the object."""
        with self.lock:
            self.calls += 1
            try:
                yield self.closed
            finally:
                self.calls -= 1

    def close(self) -> None:
        """Put all methods and parameters of the object back as they were."""
        self.closed = True
        self._put_back()
        self._modules.give_back()
        self._weights.move(self._home)
        self._weights.give_back()

    # These replace methods of the module.

    def _inference_speech(
        self,
        speech_conditioning_latent: torch.Tensor,
        text_inputs: torch.Tensor,
        input_tokens: torch.Tensor | None = None,
        num_return_sequences: int = 1,
        max_generate_length: int | None = None,
        **options,
    ) -> torch.Tensor:
        """Draw codes `[candidates, longest]` int64, padded with the stop token, as `UnifiedVoice.inference_speech`."""
        with self.lock:
            if self.closed:
                raise ValueError("this tts was restored while the call waited: call it anew")
            if input_tokens is not None:
                raise ValueError("input_tokens: the engine begins every candidate with the start token")
            length = self.engine.max_new_tokens if max_generate_length is None else max_generate_length
            request = self._request(
                speech_conditioning_latent, text_inputs, options, num_return_sequences, length, None
            )
            (result,) = self.engine.generate(request)
            return codes_of(result, self._model.device, stop_token(self._decoder.config))

    def _request(
        self, voice: torch.Tensor, ids: torch.Tensor, options: dict[str, Any], count: int, length: int, name: Any
    ) -> CandidateRequest:
        """Make one request, with a seed drawn from torch's generator."""
        if len(voice) != 1 or len(ids) != 1:
            raise ValueError(f"one text in one voice is drawn at a time, and {len(ids)} in {len(voice)} came")
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        params = sampling(options, num_candidates=count, max_new_tokens=length, seed=seed)
        return CandidateRequest(input_ids=ids[0], conditioning=voice[0].detach(), sampling=params, id=name)

    def _latents(self, *args, **kwargs):
        """Compute the latents of fixed codes, as `UnifiedVoice.forward`; Tortoise's own code does everything else.

        Within `tts()` they end where `tts()` will cut the longest of the candidates.
        """
        given = inspect.signature(self._forward).bind(*args, **kwargs)
        given.apply_defaults()
        asked = given.arguments
        if self.closed or not self._are_ours(asked):
            return self._forward(*args, **kwargs)
        with self.lock, torch.no_grad():
            codes = asked["mel_codes"]
            kept = codes.shape[1]
            if self._length is not None:
                silence = self._decoder.config.decoder_fixing_codes[0]
                kept = max(cut_in_silence(row, silence) for row in codes.tolist())
            encoder, rows = self._model.conditioning_encoder, []
            pairs = zip(asked["speech_conditioning_latent"], asked["text_inputs"], codes, strict=True)
            for voice, ids, row in pairs:
                text, _ = encoder.prompt_text(ids[None].long(), num_ends=1)
                rows.append(states_of_codes(self._decoder, encoder.join(voice[None], text)[0], row[:kept]))
            return torch.stack(rows)

    def _are_ours(self, asked: dict[str, Any]) -> bool:
        """Tell whether a call of the forward asks for latents of whole rows of codes, which `_latents` computes."""
        if any(asked[name] for name in ("clip_inputs", "return_attentions")) or not asked["return_latent"]:
            return False
        if any(asked[name] is not None for name in ("types", "raw_mels")) or not asked["text_first"]:
            return False
        lengths = torch.div(asked["wav_lengths"], self._autoregressive.mel_length_compression, rounding_mode="trunc")
        return bool((lengths + 1 >= asked["mel_codes"].shape[1]).all())  # a row is padded after its length

    # Weights and devices

    def _check_weights(self) -> None:
        """Follow the object's device; raise `ValueError` if its modules or parameters are no longer the engine's."""
        self._modules.check()
        if (name := self._weights.apart()) is not None:
            raise ValueError(
                f"parameter {name} of tts was moved, cast or replaced after accelerate(tts): call restore(tts), put it "
                "right, and call accelerate(tts) again"
            )
        self._follow()
        if self.engine.outdated is not None:  # copies of weights that changed in place
            self._refresh()

    def _refresh(self) -> None:
        """Make anew what was made of the weights."""
        self.engine.refresh()
        self._ranker.refresh()

    @torch.inference_mode(False)
    def _follow(self) -> None:
        check_device(self.tts)
        device = torch.device(self.tts.device)
        if not self._unready and self._weights.stands_on(device):
            return
        before, self._unready = self._home if self._unready else self._model.device, True
        try:
            self._weights.move(device)
            self._refresh()
        except BaseException:  # too little memory on the device
            self._weights.move(before)
            self._refresh()
            self._unready = False
            raise
        self._unready = False

    def _mover(self, module: nn.Module, name: str) -> Callable:
        """Make a replacement for `module.to` or a similar method that keeps the module on `tts.device`."""

        def move(*args, **kwargs) -> nn.Module:
            asked = (*args, *kwargs.values())
            dtypes = [value.dtype if isinstance(value, torch.Tensor) else value for value in asked]
            other = any(isinstance(dtype, torch.dtype) and dtype != torch.float32 for dtype in dtypes)
            if name not in ("to", "cpu", "cuda", "float") or other:
                raise ValueError(
                    "an accelerated tts keeps its dtype: call restore(tts) to cast it, or accelerate(tts, "
                    "weight_dtype=torch.int8) for smaller weights"
                )
            with self.lock:
                self._follow()
            return module

        return move


def _refuse_copies() -> dict:
    """Refuse copies, in place of `__getstate__`, which `copy`, `pickle` and `torch.save` call."""
    raise TypeError("an accelerated tts has its modules in an engine: call restore(tts) before you copy or save it")


class _Unranked:
    """A scorer for candidates that Tortoise ranks itself."""

    def score(self, request: CandidateRequest, text_ids: torch.Tensor, codes: Sequence, max_codes: int) -> Ranking:
        return Ranking(torch.zeros(len(codes)))


def codes_of(result: CandidateResult, device: torch.device, stop: int) -> torch.Tensor:
    """Return the codes of a result, `[candidates, longest]` int64, with the stop tokens that were drawn."""
    if result.error is not None:
        raise result.error
    longest = int((result.lengths + result.stopped).max())
    rows = [codes[:length] for codes, length in zip(result.codes, result.lengths, strict=True)]
    return torch.from_numpy(fill_up(rows, longest, stop)).to(device)
