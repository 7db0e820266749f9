"""CLVP's ranking: scores of how well candidates fit their text, and embeddings."""

from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import TypeVar, overload

import numpy as np
import torch

from clvp_fast.engine.defaults import SCORING_MODES
from clvp_fast.engine.encoder_copy import EncoderCopy
from clvp_fast.engine.requests import CandidateRequest
from clvp_fast.engine.sampling_params import SamplingParams
from clvp_fast.engine.scoring import Ranking
from clvp_fast.models.clvp.encoder import ClvpEncoder
from clvp_fast.models.clvp.modeling import ClvpModelForConditionalGeneration
from clvp_fast.models.clvp.similarity import normalized
from clvp_fast.models.clvp.tokens import end_text, finished_codes, known_codes, stop_token, text_end

Ranked = TypeVar("Ranked")


class Ranker:
    """CLVP's [`Scorer`]: the text and the speech encoder of `model`, which must be in eval mode.

    Mode "padded" works as original Tortoise, and as [`ClvpModelForConditionalGeneration.generate`] with
    `pad_to_max_mel_tokens`: every candidate is filled up with stop tokens to one length, these become the codes of
    silence, and all positions are pooled. Mode "trimmed" embeds each candidate at its own length without padding: this
    is less work, and its scores are not comparable with those of "padded".

    Nothing here waits for the device. Embeddings are normalised, and scores computed, in float32.

    Args:
        mode: the mode of `score`, and the default of `rank`.
        pad_to: the default of `rank`, here Tortoise's length: 500 codes and the start token.
        max_tokens: how many codes go through the speech encoder at a time; a longer candidate goes alone. The default
            is 16384 on a GPU, and 1024 on a CPU, where more would take more memory and save no time.
        dtype: embed candidates with a copy of the speech encoder in this dtype (float32, bfloat16 or float16), made
            here; None: with the model's own. docs/ranking.md has the effect. The text, which is embedded once, keeps
            the model's dtype.

    Raises:
        ValueError: an impossible mode, length or dtype, or with a `dtype` a model with hooks, adapters or replaced
            modules, which the copy would lack.
    """

    def __init__(
        self,
        model: ClvpModelForConditionalGeneration,
        *,
        mode: str = SCORING_MODES[0],
        pad_to: int = SamplingParams.max_new_tokens + 1,
        max_tokens: int | None = None,
        dtype: torch.dtype | None = None,
    ):
        if max_tokens is None:
            max_tokens = 1024 if model.device.type == "cpu" else 16384
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
        self.model = model
        self.mode, self.pad_to, self.max_tokens = self._settings(mode, pad_to) + (max_tokens,)
        self._copy = None
        if dtype not in (None, model.dtype):
            self._copy = EncoderCopy(model.speech_encoder_model, dtype)

    def refresh(self) -> None:
        """Make the copy in another dtype anew, after a write that it does not see (through `.data` or numpy)."""
        if self._copy is not None:
            self._copy.renew()

    @property
    def _speech_encoder(self) -> ClvpEncoder:
        return self.model.speech_encoder_model if self._copy is None else self._copy.current()

    @staticmethod
    def _settings(mode: str, pad_to: int) -> tuple[str, int]:
        if mode not in SCORING_MODES:
            raise ValueError(f"mode must be one of {', '.join(SCORING_MODES)}, not {mode!r}")
        if mode == "padded" and pad_to < 2:
            raise ValueError(f"pad_to must be at least 2, the start token and one code, not {pad_to}")
        return mode, pad_to

    def score(self, request: CandidateRequest, text_ids: torch.Tensor, codes: Sequence, max_codes: int) -> Ranking:
        """Rank with padding to `max_codes`. When memory runs out, continue in smaller parts, now and in later calls."""
        pad_to = max_codes + 1
        return self._in_parts(pad_to, lambda: self.rank(text_ids, codes, pad_to=pad_to))

    @torch.no_grad()
    def score_fixed(self, text_ids: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Return scores `[candidates]` float32 of codes that are already fixed, as original CLVP scores pairs.

        When memory runs out, continue in smaller parts, now and in later calls.

        Args:
            text_ids: `[length]` whole numbers, the text with its end token.
            codes: `[candidates, length]` int64, fixed and of one length.
        """
        text = normalized(self._embed(self.model.text_encoder_model, [text_ids.long().cpu()]).float())
        speech = self._in_parts(codes.shape[1], lambda: self._fixed(codes))
        return (speech * text).sum(1) * self.model.logit_scale.float().exp()

    def _in_parts(self, longest: int, rank: Callable[[], Ranked]) -> Ranked:
        """Call `rank()`; when memory runs out, halve `max_tokens` and call it again, down to one candidate."""
        while True:
            try:
                return rank()
            except torch.OutOfMemoryError:
                if self.max_tokens <= longest:
                    raise
                self.max_tokens //= 2

    @overload
    def rank(
        self,
        text_ids: torch.Tensor | np.ndarray | Sequence[int],
        codes: Sequence,
        mode: str | None = None,
        pad_to: int | None = None,
    ) -> Ranking: ...

    @overload
    def rank(
        self,
        text_ids: Sequence[torch.Tensor | np.ndarray | Sequence[int]],
        codes: Sequence,
        mode: str | None = None,
        pad_to: int | None = None,
    ) -> list[Ranking]: ...

    @torch.inference_mode()
    def rank(
        self, text_ids, codes: Sequence, mode: str | None = None, pad_to: int | None = None
    ) -> Ranking | list[Ranking]:
        """Rank the candidates of a text, or of several texts at once.

        Args:
            text_ids: `[length]` whole numbers, the text without start and end tokens (the end token is added here); or
                a list of such.
            codes: the candidates, each `[length]` whole numbers: speech tokens without start and stop tokens. For a
                list of texts, a list of candidates for each. An empty candidate (it stopped at once) counts as silence
                in mode "padded"; in mode "trimmed" it has nothing to embed, and comes last.
            mode: "padded" or "trimmed".
            pad_to: the length that "padded" pads to, the start token included, as `pad_to_max_mel_tokens`.

        Returns:
            A [`Ranking`]; for a list of texts a list of them.

        Raises:
            ValueError, TypeError: no text or no candidate; ids that the checkpoint does not have; a candidate that
                holds the stop token, or is longer than `pad_to` allows; an unknown mode; a model in training mode.
        """
        mode, pad_to = self._settings(self.mode if mode is None else mode, self.pad_to if pad_to is None else pad_to)
        if self.model.training:
            raise ValueError("the model is in training mode, in which dropout changes scores: call model.eval() first")
        several = isinstance(text_ids, (list, tuple)) and not all(isinstance(token, Integral) for token in text_ids)
        texts, candidates = (text_ids, codes) if several else ([text_ids], [codes])
        if len(texts) != len(candidates):
            raise ValueError(f"{len(texts)} texts need as many lists of candidates, got {len(candidates)}")
        counts = [len(of_text) for of_text in candidates]
        if not all(counts):
            raise ValueError("there is nothing to rank: each text needs at least one candidate")
        texts = [self._text(text) for text in texts]
        rows = self._candidates([row for of_text in candidates for row in of_text])

        text_embeds = normalized(self._embed(self.model.text_encoder_model, texts).float())
        spoken = [index for index, row in enumerate(rows) if mode == "padded" or len(row)]
        speech_embeds = self._speech([rows[index] for index in spoken], mode, pad_to, text_embeds)
        scale = self.model.logit_scale.float().exp()
        owner = self._to_device(
            torch.arange(len(texts), device="cpu").repeat_interleave(torch.tensor(counts, device="cpu"))
        )
        if len(spoken) < len(rows):
            place = self._to_device(torch.tensor(spoken, dtype=torch.long, device="cpu"))
            speech_embeds = speech_embeds.new_zeros(len(rows), text_embeds.shape[1]).index_copy(0, place, speech_embeds)
            offset = torch.full_like(speech_embeds[:, 0], -torch.inf).index_fill(0, place, 0)
        else:
            offset = 0
        scores = (speech_embeds * text_embeds[owner]).sum(1) * scale + offset
        rankings = [
            Ranking(*parts)
            for parts in zip(scores.split(counts), text_embeds, speech_embeds.split(counts), strict=True)
        ]
        return rankings if several else rankings[0]

    def _speech(self, rows: list[torch.Tensor], mode: str, pad_to: int, like: torch.Tensor) -> torch.Tensor:
        """Return normalised embeddings `[candidates, projection_dim]` float32 of codes on the host."""
        if not rows:
            return like[:0]
        if mode == "trimmed":
            return normalized(self._embed(self._speech_encoder, rows).float())
        longest = max(map(len, rows))
        if longest > pad_to - 1:
            raise ValueError(
                f"pad_to={pad_to} leaves no room for a candidate of {longest} codes: use {longest + 1} at least"
            )
        return self._fixed(finished_codes(rows, pad_to - 1, self.model.config.decoder_config))

    def _fixed(self, codes: torch.Tensor) -> torch.Tensor:
        """Return normalised embeddings `[candidates, projection_dim]` float32 of fixed codes `[candidates, length]`."""
        parts = known_codes(codes, self.model.config).split(max(self.max_tokens // codes.shape[1], 1))
        encoder = self._speech_encoder
        embeds = [encoder(input_ids=self._to_device(part)).embeds for part in parts]
        return normalized(torch.cat(embeds).float())

    def _embed(self, encoder, rows: list[torch.Tensor]) -> torch.Tensor:
        """Return embeddings `[sequences, projection_dim]` of token ids on the host, none of them padded."""
        embeds = []
        for part in self._parts(rows):
            lengths = torch.tensor([0, *map(len, part)], device="cpu")
            cu_seqlens = self._to_device(lengths.cumsum(0).int())
            embeds.append(encoder.embed_packed(self._to_device(torch.cat(part)), cu_seqlens, max(map(len, part))))
        return torch.cat(embeds)

    def _parts(self, rows: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        part, tokens = [], 0
        for row in rows:
            if part and tokens + len(row) > self.max_tokens:
                yield part
                part, tokens = [], 0
            part.append(row)
            tokens += len(row)
        yield part

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        device = self.model.device
        if tensor.device == device:
            return tensor
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    def _text(self, text_ids) -> torch.Tensor:
        """Return the text on the host with its end token, as it is scored."""
        config = self.model.config.text_config
        text = _host_ids(text_ids, "a text")
        if not len(text):
            raise ValueError("the text is empty: give at least one token")
        if text.min() < 0 or text.max() >= config.vocab_size:
            raise ValueError(f"text ids must lie from 0 to {config.vocab_size - 1}, got {text.min()} to {text.max()}")
        return end_text(text[None], None, text_end(config))[0][0]

    def _candidates(self, codes: Sequence) -> list[torch.Tensor]:
        """Return the codes on the host; codes that the encoder has no row for (the start token) are replaced."""
        decoder = self.model.config.decoder_config
        rows = [_host_ids(row, "a candidate") for row in codes]
        everything, stop = torch.cat(rows), stop_token(decoder)
        if len(everything) and (everything.min() < 0 or everything.max() >= decoder.vocab_size):
            found = f"{everything.min()} to {everything.max()}"
            raise ValueError(f"speech tokens must lie from 0 to {decoder.vocab_size - 1}, got {found}")
        if (everything == stop).any():
            raise ValueError(f"a candidate holds the stop token {stop}: cut it off there")
        return list(known_codes(everything, self.model.config).split([len(row) for row in rows]))


def _host_ids(ids, name: str) -> torch.Tensor:
    """Return `ids` as int64 `[length]` on the host; error messages call them `name`."""
    tensor = torch.as_tensor(ids, device="cpu")
    if tensor.ndim != 1:
        raise ValueError(f"{name} must be a row of token ids, [length], got {list(tensor.shape)}")
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise TypeError(f"{name} must hold whole numbers, not {tensor.dtype}")
    return tensor.long()
