"""The form of texts and speech codes for the encoders: their ends, their padding, and codes without a row.

A text is scored with one end token after it. Candidates are filled up with stop tokens to one length, and `fix_ends`
turns everything from the first stop token on into codes of silence.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from clvp_fast.models.clvp.configuration import ClvpConfig, ClvpDecoderConfig, ClvpEncoderConfig


def stop_token(config: ClvpDecoderConfig) -> int:
    """Return the one token that ends a candidate, or -2, which is never drawn, if the configuration has none.

    Raises `ValueError` if it has several.
    """
    stop = only_token(config.eos_token_id, "the decoder's eos_token_id, which ends a candidate,")
    return -2 if stop is None else stop


def start_token(config: ClvpDecoderConfig) -> int:
    """Return the token that a candidate begins with. Raises `ValueError` if the configuration has none."""
    if config.bos_token_id is None:
        raise ValueError("a candidate begins with the decoder's bos_token_id, and that is None: set it")
    return config.bos_token_id


def text_end(config: ClvpEncoderConfig) -> int:
    """Return the one token that ends a text. Raises `ValueError` if the configuration has none or several."""
    end = only_token(config.eos_token_id, "the text encoder's eos_token_id, which ends a text,")
    if end is None:
        raise ValueError("the text encoder's eos_token_id, which ends a text, is None: set it")
    return end


def text_begin(config: ClvpEncoderConfig) -> int:
    """Return the token that a prompt's text begins with. Raises `ValueError` if the configuration has none."""
    if config.bos_token_id is None:
        raise ValueError("the text encoder's bos_token_id, which a prompt's text begins with, is None: set it")
    return config.bos_token_id


def only_token(tokens: int | Sequence[int] | None, of: str) -> int | None:
    """Return the token of an `eos_token_id`, or None for None. Raises `ValueError` for several, beginning with `of`."""
    if not isinstance(tokens, (list, tuple)):
        return tokens  # pyright: ignore[reportReturnType] - no other sequence is an id
    if len(tokens) != 1:
        raise ValueError(f"{of} names {len(tokens)} tokens, not one")
    return tokens[0]


def most_codes(config: ClvpDecoderConfig) -> int:
    """Return the most codes of a candidate for which the decoder has positions.

    The start token has position 0, and the last code is not entered; without `contiguous_positions` position 1 is
    skipped.
    """
    return config.max_position_embeddings - int(not getattr(config, "contiguous_positions", False))


def most_text(config: ClvpDecoderConfig, num_ends: int = 2) -> int:
    """Return the most tokens of a text that fit with a begin token and `num_ends` end tokens."""
    return config.max_text_tokens - 1 - num_ends


def longest_prompt(config: ClvpDecoderConfig) -> int:
    """Return the length of the longest prompt: the voice, and a text with its begin and end tokens."""
    return 1 + config.max_text_tokens


def fill_up(rows: Sequence[np.ndarray | torch.Tensor], length: int, fill: int) -> np.ndarray:
    """Write rows of at most `length` tokens into one array `[rows, length]` int64, with `fill` after their ends."""
    filled = np.full((len(rows), length), fill, dtype=np.int64)
    for row, tokens in zip(filled, rows, strict=True):
        row[: len(tokens)] = tokens
    return filled


def fix_ends(tokens: torch.Tensor, config: ClvpDecoderConfig) -> torch.Tensor:
    """Turn drawn tokens `[candidates, length]`, without start tokens, into codes, as the original does.

    In a row with a stop token, everything from the first one on becomes `decoder_fixing_codes[0]`, and the last three
    positions become the other fixing codes; other rows stay.
    """
    fill, *tail = config.decoder_fixing_codes
    length = tokens.shape[1]
    is_stop = tokens == stop_token(config)
    tail = tail[max(len(tail) - length, 0) :]
    ending = tokens.new_tensor([fill] * (length - len(tail)) + tail)
    place = torch.arange(length, device=tokens.device)
    stopped = (is_stop.cumsum(1) > 0) | (is_stop.any(1, keepdim=True) & (place >= length - 3))
    return torch.where(stopped, ending, tokens)


def finished_codes(rows: Sequence[np.ndarray | torch.Tensor], length: int, config: ClvpDecoderConfig) -> torch.Tensor:
    """Fill up and fix candidates, each up to its stop token: `[candidates, length]` int64 on the host."""
    return fix_ends(torch.from_numpy(fill_up(rows, length, stop_token(config))), config)


def known_codes(codes: torch.Tensor, config: ClvpConfig) -> torch.Tensor:
    """Replace codes without a row in the speech encoder, such as start and stop token, by the filling code."""
    return torch.where(codes < config.speech_config.vocab_size, codes, config.decoder_config.decoder_fixing_codes[0])


def end_text(
    tokens: torch.Tensor, mask: torch.Tensor | None, end: int | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Put one end token after each text, as the original scores them, and return texts and mask.

    Args:
        tokens: ids `[texts, length]`, or embeddings `[texts, length, hidden_size]`.
        mask: `[texts, length]`, 1 = a token, 0 = padding on either side; None: all are tokens.
        end: the token's id, or its embedding `[hidden_size]`.
    """
    text = PaddedText(tokens, mask).surround(None, end)
    return text.tokens, None if mask is None else text.mask


class PaddedText:
    """Token ids `[batch, length]` (or embeddings) and their mask; tokens can be added directly around each text."""

    def __init__(self, tokens: torch.Tensor, mask: torch.Tensor | None):
        self.tokens = tokens
        self.mask = tokens.new_ones(tokens.shape[:2], dtype=torch.long) if mask is None else mask.long()

    def surround(self, before: int | torch.Tensor | None, after: int | torch.Tensor | None) -> "PaddedText":
        """Add one token before the first real one of each row and one after the last, inside the padding.

        `before` and `after` are a token id, or an embedding `[hidden]`; `None` adds nothing.
        """
        tokens, mask = self.tokens, self.mask
        if before is not None:
            tokens, mask = self._insert(tokens, mask, before, mask.argmax(1))
        if after is not None:
            end = mask.shape[1] - mask.flip(1).argmax(1)
            tokens, mask = self._insert(tokens, mask, after, end)
        return PaddedText(tokens, mask)

    @staticmethod
    def _insert(tokens, mask, token, place):
        """Insert `token` at column `place` `[batch]`, row by row."""
        column = torch.arange(tokens.shape[1] + 1, device=tokens.device)[None]
        place = place[:, None]
        source = column - (column > place).long()
        source = source.clamp(max=tokens.shape[1] - 1)
        here = column == place
        mask = mask.gather(1, source).masked_fill(here, 1)
        if tokens.dim() == 3:
            source, here = source[..., None], here[..., None]
        return torch.where(here, token, tokens.take_along_dim(source, 1)), mask


def insert_eos_at_first_pad(input_ids: torch.Tensor, pad_token_id: int, eos_token_id: int) -> torch.Tensor:
    """Put `eos_token_id` before the first `pad_token_id` of each row `[batch, length]`, or at the row's end.

    This is transformers' rule, which uses values and not the mask; `forward` keeps it to give the same numbers.
    """
    is_pad = F.pad(input_ids == pad_token_id, (0, 1), value=True)
    first_pad = is_pad.int().argmax(1, keepdim=True)
    column = torch.arange(input_ids.shape[1] + 1, device=input_ids.device)[None]
    source = torch.where(column < first_pad, column, (column - 1).clamp(min=0)).expand(input_ids.shape[0], -1)
    return input_ids.gather(1, source).masked_fill(column == first_pad, eos_token_id)
