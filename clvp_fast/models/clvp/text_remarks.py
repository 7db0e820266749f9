"""Remarks on the changes to a text's characters before they become tokens."""

import re
import unicodedata
from functools import lru_cache
from typing import cast

from clvp_fast.models.clvp.tokenization import ClvpTokenizer

# The most characters or words that a sentence names, and the most characters of such a word.
_SHOWN, _LONGEST = 10, 30


def text_remarks(tokenizer: ClvpTokenizer, text: str) -> tuple[str, ...]:
    """Return sentences on characters of `text` that are dropped or changed, and on words outside the training words.

    A text without letters and digits gets one of its own.
    """
    lost, romanised = [], []
    for char in dict.fromkeys(text):
        if _is_lost(char, text, tokenizer):
            lost.append(char)
        elif _is_foreign(char):
            romanised.append(char)
    said = (
        ("characters that the checkpoint does not know were left out", lost),
        ("characters of other scripts were written in Latin letters", romanised),
        ("words that the checkpoint was not trained on, and may say wrongly", _strange_words(tokenizer, text)),
    )
    remarks = [f"{what}: {_shown(chars)}" for what, chars in said if chars]
    if not any(char.isalnum() for char in tokenizer.normalizer(text)):
        remarks.append("the text has no letters or digits, so there is no word to speak")
    return tuple(remarks)


def _strange_words(tokenizer: ClvpTokenizer, text: str) -> list[str]:
    """Return the words of the cleaned `text` that are not among the checkpoint's words, if it lists them."""
    if tokenizer.domain_words is None:
        return []
    words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", tokenizer.normalizer(text))
    known = set(tokenizer.domain_words)
    return [word[:_LONGEST] for word in dict.fromkeys(words) if word not in known]


def _is_lost(char: str, text: str, tokenizer: ClvpTokenizer) -> bool:
    """Tell whether `char` has no token, and removing it from `text` leaves the known tokens unchanged.

    The first condition is not enough: a currency sign has no token, but turns the number after it into a sum of money.
    """
    if char.isspace() or _says_something(tokenizer, char):
        return False
    with_it, without_it = (
        [token for token in tokenizer(some)["input_ids"] if token != tokenizer.unk_token_id]
        for some in (text, text.replace(char, ""))
    )
    return with_it == without_it


@lru_cache(maxsize=4096)
def _says_something(tokenizer: ClvpTokenizer, char: str) -> bool:
    return any(token != tokenizer.unk_token_id for token in cast(list[int], tokenizer(char)["input_ids"]))


def _is_foreign(char: str) -> bool:
    return (
        not char.isascii() and (char.isalpha() or char.isdecimal()) and "LATIN" not in unicodedata.name(char, "LATIN")
    )


def _shown(chars: list[str]) -> str:
    return " ".join(chars[:_SHOWN]) + (f" and {len(chars) - _SHOWN} more" if len(chars) > _SHOWN else "")
