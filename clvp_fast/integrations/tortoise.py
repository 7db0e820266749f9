"""`accelerate` and `restore` for a live `TextToSpeech` of Tortoise: they run its `tts()` on this package's engine.

Methods here replace methods of the object and of two of its modules. A [`CandidateEngine`] decodes the candidates of a
call as one batch; the same model computes CLVP's scores and the latents for the diffusion. Voices, diffusion, vocoder
and everything else in `tts()` remain Tortoise's own code.
"""

import inspect
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from clvp_fast.integrations.tortoise_arguments import check_call, check_many, check_object, check_options, is_fast
from clvp_fast.integrations.tortoise_fast import FastStage
from clvp_fast.integrations.tortoise_modules import MARK
from clvp_fast.integrations.tortoise_stage import Stage, codes_of
from clvp_fast.models.clvp.tokens import stop_token

# Tortoise's limit of `max_mel_tokens`, by its documentation.
_MOST_CODES = 600
_CHANGING = threading.RLock()  # one object at a time is accelerated


@torch.inference_mode(False)
def accelerate(tts: Any, **engine_options) -> Any:
    """Make a live `TextToSpeech` of `tortoise.api` or `tortoise.api_fast` draw and rank candidates on this engine.

    `tts()`, `tts_with_preset()` and `tts_stream()` are called as before, with the object's own tokenizer, voices,
    diffusion and vocoder. The object and the engine share their parameters, which stay on `tts.device`. A
    `TextToSpeech` of `tortoise.api` also gets `tts_many` (see [`TortoiseStage`]). Calls from several threads wait for
    one another. docs/tortoise.md lists the differences.

    Args:
        tts: a `TextToSpeech` of tortoise-tts 3.0.0, in float32.
        engine_options: options of [`CandidateEngine`]: `max_batch`, `memory_fraction`, `weight_dtype`,
            `activation_dtype`, `score_dtype` and so on. By default `max_new_tokens` is 600, or fewer if there are fewer
            positions.

    Returns:
        `tts` itself.

    Raises:
        TypeError: another object, or options that Tortoise decides.
        ValueError: an object that is accelerated already or cannot be, or too little memory. The object is then
            unchanged.
    """
    with _CHANGING:
        if hasattr(tts, MARK):
            raise ValueError("this tts is accelerated already: call restore(tts) before")
        check_object(tts)
        check_options(engine_options, is_fast(tts))
        setattr(tts, MARK, (FastStage if is_fast(tts) else TortoiseStage)(tts, engine_options))
    return tts


@torch.inference_mode(False)
def restore(tts: Any) -> Any:
    """Undo `accelerate(tts)`, and return the object. Raises `ValueError` if it is not accelerated."""
    stage = getattr(tts, MARK, None)
    if not isinstance(stage, Stage):
        raise ValueError("this tts is not accelerated: there is nothing to restore")
    if stage.tts is not tts:
        raise ValueError("this tts is a copy of one that is accelerated: call restore() of that one")
    with stage.lock:
        if stage.calls:
            raise ValueError("restore(tts) was called within a call of it: call it once that has returned")
        if stage.streams:
            raise ValueError("a tts_stream() of it is half read: read it to its end or close() it, then restore(tts)")
        if stage.closed:  # restored by another thread while this one waited
            raise ValueError("this tts is not accelerated: there is nothing to restore")
        stage.close()
        delattr(tts, MARK)
    return tts


class TortoiseStage(Stage):
    """The engine behind a `tortoise.api.TextToSpeech`, and the replacements of its methods."""

    def __init__(self, tts: Any, engine_options: dict[str, Any]):
        # Codes that are drawn before `tts()` asks for them.
        self._ready: tuple[torch.Tensor, dict[str, Any]] | None = None
        self._tts: Callable = tts.tts
        self._score: Callable = tts.clvp.forward
        super().__init__(tts, tts.clvp, _MOST_CODES, engine_options)
        self._override(tts.clvp, "forward", self._scores)
        self._override(tts, "tts", self._speak)
        self._override(tts, "tts_many", self.tts_many)

    # These replace methods of the object.

    def _speak(self, *args, **kwargs):
        """Check the arguments, and run Tortoise's own `tts()`."""
        with self.calling() as closed:
            if closed:
                return self._tts(*args, **kwargs)
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
        """While Tortoise's `tts()` runs, make all candidates one batch; the CVVP's batches keep their size."""
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
            self._put_back(put)

    def tts_many(
        self, texts: Sequence[str], voices: Sequence[Any] | None = None, k: int = 1, **options
    ) -> list[torch.Tensor | list[torch.Tensor]]:
        """Return the result of `tts()` for each of many texts; candidates of all texts are decoded as one batch.

        With `use_deterministic_seed` each result is that of `tts()` with that seed, so equal texts and voices give
        equal results. Without it each text has its own seed.

        Args:
            texts: the texts to speak.
            voices: for each text a list of clips (as `voice_samples`), a pair of latents (as `conditioning_latents`),
                or None for a random voice; None: random voices for all.
            k: how many clips each text gets.
            options: other arguments of `tts()`.

        Raises:
            ValueError: not one voice for each text, or an option that is for a single text (`cvvp_amount`,
                `return_deterministic_state`).
        """
        texts, voices = check_many(texts, voices)
        for name in ("voice_samples", "conditioning_latents", "return_deterministic_state"):
            if name in options:
                raise ValueError(f"tts_many() does not take {name}: the voices are its second argument")
        with self.calling() as closed:
            if closed:
                raise ValueError("this tts was restored while the call waited: it has no tts_many() any more")
            given = self._arguments("", k=k, **options)
            if given["cvvp_amount"] > 0:
                raise ValueError("tts_many() ranks by CLVP alone: leave out cvvp_amount, or call tts() for each text")
            self._check_weights()
            seeds = [given["use_deterministic_seed"]] * len(texts)
            if given["use_deterministic_seed"] is None:  # Tortoise would use the time, the same for all texts
                self.tts.deterministic_state(seed=None)
                seeds = [random.getrandbits(32) for _ in texts]
            wanted = enumerate(zip(texts, voices, seeds, strict=True))
            prepared = [self._prepare(place, *one, given) for place, one in wanted]
            drawn: dict[int, torch.Tensor] = {}
            for result in self.engine.generate([request for request, _, _ in prepared]):
                drawn[result.request.id] = codes_of(result, self._model.device, stop_token(self._decoder.config))
            spoken = []
            for place, (text, (_, latents, state)) in enumerate(zip(texts, prepared, strict=True)):
                given = self._arguments(text, conditioning_latents=latents, k=k, **options)
                with self._one_batch(given):
                    self._ready = drawn.pop(place), state
                    spoken.append(self._tts(text, conditioning_latents=latents, k=k, **options))
            return spoken

    def _prepare(self, place: int, text: str, voice: Any, seed: int, given: dict[str, Any]):
        """Return a request with the seed that `tts()` would draw, the voice's latents, and the generators after it."""
        tts = self.tts
        tts.deterministic_state(seed=seed)
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

    # These replace methods of its modules.

    def _inference_speech(self, *args, **kwargs) -> torch.Tensor:
        if self._ready is None:
            return super()._inference_speech(*args, **kwargs)
        (codes, state), self._ready = self._ready, None
        _set_generators(state)
        return codes

    def _scores(self, text: torch.Tensor, speech_tokens: torch.Tensor, return_loss: bool = False) -> torch.Tensor:
        """Score each pair of a text and fixed codes, as `CLVP.forward`; Tortoise's own code computes the loss."""
        if return_loss or self.closed:
            return self._score(text, speech_tokens, return_loss=return_loss)
        with self.lock, torch.no_grad():
            if (text == text[:1]).all():  # the text side is computed once
                return self._ranker.score_fixed(text[0], speech_tokens)
            pairs = zip(text, speech_tokens, strict=True)
            return torch.cat([self._ranker.score_fixed(ids, codes[None]) for ids, codes in pairs])


def _in_parts(forward: Callable, size: int) -> Callable:
    """Return a CVVP's forward that runs in parts of `size` candidates, as before all became one batch."""

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
