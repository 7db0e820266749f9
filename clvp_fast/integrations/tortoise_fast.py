"""The `TextToSpeech` of `tortoise.api_fast` on the engine: one candidate without ranking, and sound in chunks."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from clvp_fast.engine.requests import CandidateRequest, CandidateResult
from clvp_fast.integrations.tortoise_arguments import check_fast_call
from clvp_fast.integrations.tortoise_stage import Stage

# The most tokens of prompt and candidate together in `tts_stream()`, a constant there.
_STREAM_LENGTH = 500


class FastStage(Stage):
    """The engine behind a `tortoise.api_fast.TextToSpeech`.

    Streams of several threads share the engine's batch; calls of `tts()` wait for one another.
    """

    def __init__(self, tts: Any, engine_options: dict[str, Any]):
        autoregressive = tts.autoregressive
        self._tts: Callable = tts.tts
        self._stream: Callable = tts.tts_stream
        self._embeddings: Callable = autoregressive.compute_embeddings
        super().__init__(tts, None, autoregressive.max_mel_tokens - 1, engine_options | dict(states=True))
        self._override(autoregressive, "compute_embeddings", self._compute_embeddings)
        self._override(autoregressive, "get_generator", self._get_generator)
        self._override(tts, "tts", self._speak)
        self._override(tts, "tts_stream", self._speak_in_chunks)
        if torch.device(tts.device).type == "cpu":
            self._override(tts.hifi_decoder, "inference", self._sound)

    def _speak(self, *args, **kwargs):
        with self.calling() as closed:
            if not closed:
                self._check(self._tts, *args, **kwargs)
            return self._tts(*args, **kwargs)

    def _speak_in_chunks(self, *args, **kwargs) -> Iterator[torch.Tensor]:
        with self.calling() as closed:
            if not closed:
                self._check(self._stream, *args, **kwargs)
        return self._heard(self._stream(*args, **kwargs))

    def _heard(self, chunks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the chunks; from the first to the last, the object cannot be restored."""
        with self.lock:
            self.streams += 1
        try:
            yield from chunks
        finally:
            self.streams -= 1

    def _check(self, method: Callable, *args, **kwargs) -> None:
        given = inspect.signature(method).bind(*args, **kwargs)
        given.apply_defaults()
        check_fast_call(given.arguments, self.engine.max_new_tokens)
        self._check_weights()

    def _compute_embeddings(self, cond_latents: torch.Tensor, text_inputs: torch.Tensor) -> torch.Tensor:
        """Embed a prompt as `UnifiedVoice.compute_embeddings`, and remember it for the generation."""
        inputs = self._embeddings(cond_latents, text_inputs)
        inputs._clvp_fast = cond_latents, text_inputs
        return inputs

    def _get_generator(self, fake_inputs: torch.Tensor, **options) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each code `[1]` with the state `[1, width]` that it was drawn from, as `UnifiedVoice.get_generator`."""
        if not hasattr(fake_inputs, "_clvp_fast"):
            raise ValueError("get_generator() continues what compute_embeddings() of an accelerated tts returned")
        voice, ids = fake_inputs._clvp_fast  # pyright: ignore[reportAttributeAccessIssue] - put there
        if (count := options.pop("num_return_sequences", 1)) != 1:
            raise ValueError(f"num_return_sequences must be 1, as one candidate is heard, not {count}")
        length = min(max(_STREAM_LENGTH - fake_inputs.shape[1], 1), self.engine.max_new_tokens)
        return self._drawn(self._request(voice, ids, options, 1, length, None))

    def _drawn(self, request: CandidateRequest) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for drawn in self.engine.stream(request, states=True):
            if isinstance(drawn, CandidateResult):
                if drawn.error is not None:
                    raise drawn.error
                return
            _, code, state = drawn  # pyright: ignore[reportAssignmentType] - with its state
            yield torch.tensor([code], device=state.device), state[None]

    def _sound(self, c: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """Compute `HifiganGenerator.inference` on a CPU; Tortoise's moves its input to "cuda" by name."""
        frames = F.interpolate(c.transpose(1, 2), scale_factor=[1024 / 256], mode="linear")
        frames = F.interpolate(frames, scale_factor=[24000 / 22050], mode="linear")
        return self.tts.hifi_decoder.forward(frames, g.unsqueeze(0).transpose(1, 2))
