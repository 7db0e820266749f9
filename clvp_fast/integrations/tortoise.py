"""`accelerate` and `restore` for a live `tortoise.api.TextToSpeech`: its own `tts()` on this package's engine.

Methods of the object and of two of its modules are put aside, and these stand in their place: candidates of a call are
decoded as one batch by a [`CandidateEngine`], CLVP's scores and the latents for the diffusion are computed by the same
model. Voices, diffusion, vocoder and everything else of `tts()` are Tortoise's own code.
"""

import inspect
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from clvp_fast.engine.engine import CandidateEngine
from clvp_fast.engine.latents import cut_in_silence, states_of_codes
from clvp_fast.engine.ranking import Ranker
from clvp_fast.engine.requests import CandidateRequest, CandidateResult
from clvp_fast.engine.scoring import Ranking
from clvp_fast.integrations.tortoise_arguments import check_call, check_object, check_options, sampling
from clvp_fast.integrations.tortoise_weights import SharedWeights
from clvp_fast.models.clvp.feature_extraction import ClvpFeatureExtractor
from clvp_fast.models.clvp.tokens import fill_up, most_codes, stop_token

# What `max_mel_tokens` may be there, by its documentation.
_MOST_CODES = 600
_STAGE = "_clvp_fast"


def accelerate(tts: Any, **engine_options) -> Any:
    """Let a live `tortoise.api.TextToSpeech` draw and rank candidates on this package's engine.

    `tts()` and `tts_with_preset()` go on unchanged, with the object's own tokenizer, voices, diffusion and vocoder. Its
    parameters and the engine's are one storage; they stay on `tts.device`. The object gets `tts_many` (see
    [`TortoiseStage`]). Calls from several threads wait for one another. docs/tortoise.md has what differs.

    Args:
        tts: of tortoise-tts 3.0.0, in float32.
        engine_options: of [`CandidateEngine`]: `max_batch`, `memory_fraction`, `weight_dtype` and so on. By default
            `max_new_tokens` is 600, as far as there are positions.

    Returns:
        The object itself.

    Raises:
        TypeError: another object, or options that are Tortoise's to say.
        ValueError: an object that is accelerated already or cannot be, or too little memory. It is as it was then.
    """
    if hasattr(tts, _STAGE):
        raise ValueError("this tts is accelerated already: call restore(tts) before")
    check_object(tts)
    check_options(engine_options)
    setattr(tts, _STAGE, TortoiseStage(tts, engine_options))
    return tts


def restore(tts: Any) -> Any:
    """Put back what `accelerate(tts)` changed, and return the object; `ValueError` where nothing was."""
    stage = getattr(tts, _STAGE, None)
    if not isinstance(stage, TortoiseStage):
        raise ValueError("this tts is not accelerated: there is nothing to restore")
    with stage.lock:
        stage.close()
        delattr(tts, _STAGE)
    return tts


class TortoiseStage:
    """The engine behind a `TextToSpeech`, and what stands in the place of its methods.

    Attributes:
        engine: decodes; its `memory` says how many candidates at once.
        lock: of calls.
    """

    def __init__(self, tts: Any, engine_options: dict[str, Any]):
        self.tts, self.lock = tts, threading.RLock()
        self._put: list[tuple[Any, str]] = []  # what was put in the place of a method
        self._length: int | None = None  # `max_mel_tokens` of the call under way
        self._ready: tuple[torch.Tensor, dict[str, Any]] | None = None  # codes that were drawn before their call
        self._tts: Callable = tts.tts
        autoregressive = tts.autoregressive
        self._forward, self._score = autoregressive.forward, tts.clvp.forward
        self._weights = SharedWeights(autoregressive, tts.clvp)
        try:
            self._follow_settings(autoregressive)
            options: dict[str, Any] = (
                dict(max_new_tokens=min(_MOST_CODES, most_codes(self._decoder.config))) | engine_options
            )
            features = ClvpFeatureExtractor(feature_size=self._decoder.config.feature_size)
            processor = SimpleNamespace(feature_extractor=features, tokenizer=None)
            self._weights.move(torch.device(tts.device))
            self.engine = CandidateEngine(self._model, processor, scorer=_Unranked(), text_ends=1, **options)
            self._ranker = Ranker(self._model)
        except BaseException:
            self._weights.give_back()
            raise
        for module in (autoregressive, tts.clvp):
            for name in ("to", "cpu", "cuda", "half", "float", "bfloat16", "double"):
                self._override(module, name, self._mover(module, name))
        self._override(autoregressive, "inference_speech", self._inference_speech)
        self._override(autoregressive, "forward", self._latents)
        self._override(tts.clvp, "forward", self._scores)
        self._override(tts, "tts", self._speak)
        self._override(tts, "tts_many", self.tts_many)

    @property
    def _model(self):
        return self._weights.model

    @property
    def _decoder(self):
        return self._model.speech_decoder_model

    def _follow_settings(self, autoregressive: Any) -> None:
        """Tokens and positions as the object has them."""
        decoder, text = self._model.config.decoder_config, self._model.config.text_config
        decoder.bos_token_id, decoder.eos_token_id = autoregressive.start_mel_token, autoregressive.stop_mel_token
        text.bos_token_id, text.eos_token_id = autoregressive.start_text_token, autoregressive.stop_text_token
        # With its cache the original counts the k-th code at position k + 1.
        decoder.contiguous_positions = not autoregressive.inference_model.kv_cache

    def _override(self, owner: Any, name: str, method: Callable) -> None:
        owner.__dict__[name] = method  # a module would take some values for its parts
        self._put.append((owner, name))

    def close(self) -> None:
        for owner, name in self._put:
            owner.__dict__.pop(name, None)
        self._put.clear()
        self._weights.give_back()

    # In the place of methods of the object.

    def _speak(self, *args, **kwargs):
        """`tts()`: Tortoise's own code, once what it asks for is known to be possible."""
        with self.lock:
            given = self._arguments(*args, **kwargs)
            self._check_weights()
            with self._one_batch(given):
                return self._tts(*args, **kwargs)

    def _arguments(self, *args, **kwargs) -> dict[str, Any]:
        bound = inspect.signature(self._tts).bind(*args, **kwargs)
        bound.apply_defaults()
        check_call(bound.arguments, self.engine.max_new_tokens)
        return bound.arguments

    @contextmanager
    def _one_batch(self, given: dict[str, Any]) -> Iterator[None]:
        """While Tortoise's `tts()` runs: all candidates are one batch to it, and the CVVP's are of the size it had."""
        tts = self.tts
        size, self._length = tts.autoregressive_batch_size, given["max_mel_tokens"]
        put = len(self._put)
        try:
            if given["cvvp_amount"] > 0 and given["voice_samples"] is not None:
                if tts.cvvp is None:
                    tts.load_cvvp()
                cvvp: Any = tts.cvvp
                self._override(cvvp, "forward", _in_parts(cvvp.forward, size))
            tts.autoregressive_batch_size = given["num_autoregressive_samples"]
            yield
        finally:
            tts.autoregressive_batch_size, self._length, self._ready = size, None, None
            for owner, name in self._put[put:]:
                owner.__dict__.pop(name, None)
            del self._put[put:]

    def tts_many(
        self, texts: Sequence[str], voices: Sequence[Any] | None = None, k: int = 1, **options
    ) -> list[torch.Tensor | list[torch.Tensor]]:
        """Return the result of `tts()` for each of many texts; the candidates of all are decoded as one batch.

        With `use_deterministic_seed` each result is that of `tts()` with that seed.

        Args:
            texts: what is to be said.
            voices: for each text a list of clips (as `voice_samples`), a pair of latents (as `conditioning_latents`),
                or None for a random voice; None: random voices for all.
            k: clips of each text.
            options: of `tts()`.

        Raises:
            ValueError: not a voice for each text, or what only one voice's recordings can do (`cvvp_amount`,
                `return_deterministic_state`).
        """
        if isinstance(texts, str):
            raise ValueError("tts_many() takes a list of texts, not one: call tts() for it")
        voices = [None] * len(texts) if voices is None else voices
        if len(voices) != len(texts):
            raise ValueError(f"tts_many() takes a voice for each of the {len(texts)} texts, and {len(voices)} came")
        for name in ("voice_samples", "conditioning_latents", "return_deterministic_state"):
            if name in options:
                raise ValueError(f"tts_many() does not take {name}: the voices are its second argument")
        with self.lock:
            pairs = enumerate(zip(texts, voices, strict=True))
            prepared = [self._prepare(place, text, voice, k, options) for place, (text, voice) in pairs]
            self._check_weights()
            drawn: dict[int, torch.Tensor] = {}
            for result in self.engine.generate([request for request, _, _ in prepared]):
                drawn[result.request.id] = _codes(result, self._model.device, stop_token(self._decoder.config))
            spoken = []
            for place, (text, (_, latents, state)) in enumerate(zip(texts, prepared, strict=True)):
                given = self._arguments(text, conditioning_latents=latents, k=k, **options)
                with self._one_batch(given):
                    self._ready = drawn.pop(place), state
                    spoken.append(self._tts(text, conditioning_latents=latents, k=k, **options))
            return spoken

    def _prepare(self, place: int, text: str, voice: Any, k: int, options: dict[str, Any]):
        """A request with the seed that `tts()` would draw, the voice's latents, and the generators behind both."""
        tts = self.tts
        given = self._arguments(text, k=k, **options)
        if given["cvvp_amount"] > 0:
            raise ValueError("tts_many() ranks by CLVP alone: leave out cvvp_amount, or call tts() for each text")
        tts.deterministic_state(seed=given["use_deterministic_seed"])
        ids = F.pad(torch.IntTensor(tts.tokenizer.encode(text)), (0, 1))
        if len(ids) >= 400:
            raise ValueError(f"a text has {len(ids) - 1} tokens, and Tortoise takes up to 398: split it up")
        if voice is None:
            latents = tts.get_random_conditioning_latents()
        elif isinstance(voice, tuple):
            latents = voice
        else:
            latents = tts.get_conditioning_latents(voice)
        names = ("temperature", "top_p", "repetition_penalty")
        asked = {name: given[name] for name in names} | given.get("hf_generate_kwargs", {}) | dict(do_sample=True)
        count, length = given["num_autoregressive_samples"], given["max_mel_tokens"]
        request = self._request(latents[0], ids[None], asked, count, length, place)
        return request, latents, _generator_states()

    # In the place of methods of its modules.

    def _inference_speech(
        self,
        speech_conditioning_latent: torch.Tensor,
        text_inputs: torch.Tensor,
        input_tokens: torch.Tensor | None = None,
        num_return_sequences: int = 1,
        max_generate_length: int | None = None,
        **options,
    ) -> torch.Tensor:
        """`UnifiedVoice.inference_speech`: codes `[candidates, longest]` int64, filled up with the stop token."""
        with self.lock:
            if self._ready is not None:
                (codes, state), self._ready = self._ready, None
                _set_generators(state)
                return codes
            if input_tokens is not None:
                raise ValueError("input_tokens: the engine begins every candidate with the start token")
            length = self.engine.max_new_tokens if max_generate_length is None else max_generate_length
            request = self._request(
                speech_conditioning_latent, text_inputs, options, num_return_sequences, length, None
            )
            (result,) = self.engine.generate(request)
            return _codes(result, self._model.device, stop_token(self._decoder.config))

    def _request(
        self, voice: torch.Tensor, ids: torch.Tensor, options: dict[str, Any], count: int, length: int, name: Any
    ) -> CandidateRequest:
        """One request, with a seed of torch's generator."""
        if len(voice) != 1 or len(ids) != 1:
            raise ValueError(f"one text in one voice is drawn at a time, and {len(ids)} in {len(voice)} came")
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        params = sampling(options, num_candidates=count, max_new_tokens=length, seed=seed)
        return CandidateRequest(input_ids=ids[0], conditioning=voice[0].detach(), sampling=params, id=name)

    @torch.no_grad()
    def _latents(self, *args, **kwargs):
        """`UnifiedVoice.forward`: the latents of fixed codes; whatever else is asked for is Tortoise's own.

        Within `tts()` they end where its cut comes, for the longest of the candidates.
        """
        given = inspect.signature(self._forward).bind(*args, **kwargs)
        given.apply_defaults()
        asked = given.arguments
        if not asked["return_latent"] or asked["clip_inputs"] or asked["types"] is not None or not asked["text_first"]:
            return self._forward(*args, **kwargs)
        with self.lock:
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

    @torch.no_grad()
    def _scores(self, text: torch.Tensor, speech_tokens: torch.Tensor, return_loss: bool = False) -> torch.Tensor:
        """`CLVP.forward`: a score for each pair of a text and fixed codes; the loss is Tortoise's own."""
        if return_loss:
            return self._score(text, speech_tokens, return_loss=True)
        with self.lock:
            if (text == text[:1]).all():  # the text side once
                return self._ranker.score_fixed(text[0], speech_tokens)
            pairs = zip(text, speech_tokens, strict=True)
            return torch.cat([self._ranker.score_fixed(ids, codes[None]) for ids, codes in pairs])

    # Weights and devices.

    def _check_weights(self) -> None:
        """Follow the object's device, and raise `ValueError` where its parameters are no longer the engine's."""
        if (name := self._weights.apart()) is not None:
            raise ValueError(
                f"parameter {name} of tts was moved, cast or replaced after accelerate(tts): call restore(tts), put it "
                "right, and call accelerate(tts) again"
            )
        self._follow(torch.device(self.tts.device))

    def _follow(self, device: torch.device) -> None:
        if self._model.device.type == device.type and device.index in (None, self._model.device.index):
            return
        self._weights.move(device)
        self.engine.refresh()

    def _mover(self, module: nn.Module, name: str) -> Callable:
        """`module.to` and the like: an accelerated module is on `tts.device`, and stays there until that changes."""

        def move(*args, **kwargs) -> nn.Module:
            dtypes = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
            if name not in ("to", "cpu", "cuda") or dtypes:
                raise ValueError(
                    "an accelerated tts keeps its dtype: call restore(tts) to cast it, or accelerate(tts, "
                    "weight_dtype=torch.int8) for smaller weights"
                )
            with self.lock:
                self._follow(torch.device(self.tts.device))
            return module

        return move


class _Unranked:
    """A scorer for candidates that Tortoise ranks by itself."""

    def score(self, request: CandidateRequest, text_ids: torch.Tensor, codes: Sequence, max_codes: int) -> Ranking:
        return Ranking(torch.zeros(len(codes)))


def _codes(result: CandidateResult, device: torch.device, stop: int) -> torch.Tensor:
    """The codes of a result `[candidates, longest]` int64, with a stop token where one was drawn."""
    if result.error is not None:
        raise result.error
    longest = int((result.lengths + result.stopped).max())
    rows = [codes[:length] for codes, length in zip(result.codes, result.lengths, strict=True)]
    return torch.from_numpy(fill_up(rows, longest, stop)).to(device)


def _in_parts(forward: Callable, size: int) -> Callable:
    """The forward of a CVVP in parts of `size` candidates, as it was called before all were one batch."""

    def in_parts(mel_cond: torch.Tensor, mel_input: torch.Tensor, return_loss: bool = False) -> torch.Tensor:
        if return_loss:
            return forward(mel_cond, mel_input, return_loss=True)
        parts = zip(mel_cond.split(size), mel_input.split(size), strict=True)
        return torch.cat([forward(cond, codes, return_loss=False) for cond, codes in parts])

    return in_parts


def _generator_states() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return dict(python=random.getstate(), torch=torch.get_rng_state(), cuda=cuda)


def _set_generators(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
