"""`ClvpTokenizer`: turns cleaned English text into the 255 byte-pair tokens of Tortoise, and back."""

import json
import os
import re
from functools import cache
from itertools import pairwise

from transformers import AddedToken, PreTrainedTokenizer

from clvp_fast.models.clvp.text_cleaning import TEXT_CLEANERS

_FILES = {"vocab_file": "vocab.json", "merges_file": "merges.txt"}
_VERSION_LINE = "#version: 0.2"

# Patterns that cut cleaned text, which is lower-case ASCII, before merging: GPT-2's, and that of Tortoise's
# tokenizer.json. They differ only at apostrophes ("'the" is "'t", "he" for GPT-2).
_WORDS = {
    "transformers": re.compile(r"'(?:[stmd]|re|ve|ll)| ?[a-z]+| ?[0-9]+| ?[^\sa-z0-9]+|\s+(?!\S)|\s+"),
    "tortoise": re.compile(r"\w+|\s|[^\w\s]+", re.ASCII),
}

# Words repeat, so the merges of up to this many words are kept.
_MAX_KEPT_WORDS = 65536


@cache
def _byte_symbols() -> dict[int, str]:
    """Return GPT-2's printable symbol of each byte: itself where printable, else the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + rank) for rank, byte in enumerate(others)}


class ClvpTokenizer(PreTrainedTokenizer):
    """Byte-level byte-pair tokenizer of CLVP, with a cleaner that writes out numbers and abbreviations.

    A space is a token of its own, so a word after a space and one at the start differ by that token: `tokenizer("Hello
    world")["input_ids"]` is `[62, 84, 28, 2, 179, 79]` with Tortoise's vocabulary.

    Args:
        vocab_file: path of the JSON file token -> id.
        merges_file: path of the text file of merges, one "left right" per line, after an optional "#version" line.
        errors: how bytes that are not UTF-8 are decoded, as in `bytes.decode`.
        unk_token, bos_token, eos_token, pad_token: the special tokens; one that is not in the vocabulary is added.
        add_prefix_space: put a space before the text. It may also be given in a call.
        add_bos_token, add_eos_token: put `bos_token` before, `eos_token` after each sequence when
            `add_special_tokens=True`.
        text_cleaning: "transformers" cleans as transformers does; "tortoise" as Tortoise does, on which the checkpoint
            was trained. With "tortoise", special tokens written in the text are plain text, as in Tortoise ("[STOP]"
            does not stop); `split_special_tokens=False` in a call recognises them.
        domain_words: the words that a checkpoint of a closed domain was trained on, in lower case, saved with it; other
            words in a text give a remark. None: any words.

    A call with `is_split_into_words=True` puts a space before each word, including the first.

    Raises:
        ValueError: an unknown `text_cleaning`, or a vocabulary or merges file that is not of this layout.
        FileNotFoundError: one of the two files does not exist.
    """

    vocab_files_names = _FILES
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 (the base class's declaration)

    def __init__(
        self,
        vocab_file,
        merges_file,
        errors="replace",
        unk_token="[UNK]",
        bos_token="<|endoftext|>",
        eos_token="[STOP]",
        pad_token="[STOP]",
        add_prefix_space=False,
        add_bos_token=False,
        add_eos_token=False,
        text_cleaning="transformers",
        domain_words=None,
        **kwargs,
    ):
        if text_cleaning not in TEXT_CLEANERS:
            raise ValueError(f"text_cleaning must be one of {sorted(TEXT_CLEANERS)}, not {text_cleaning!r}.")
        self.encoder = _read_vocabulary(vocab_file)
        self.decoder = {index: token for token, index in self.encoder.items()}
        self.bpe_ranks = {pair: rank for rank, pair in enumerate(_read_merges(merges_file))}
        self.byte_encoder = _byte_symbols()
        self.byte_decoder = {symbol: byte for byte, symbol in self.byte_encoder.items()}
        self.errors = errors
        self.add_prefix_space = add_prefix_space
        self.add_bos_token = add_bos_token
        self.add_eos_token = add_eos_token
        self.text_cleaning = text_cleaning
        self.domain_words = None if domain_words is None else sorted(set(domain_words))
        self.cache = {}

        def special(token):
            return AddedToken(token, special=True) if isinstance(token, str) else token

        super().__init__(
            errors=errors,
            unk_token=special(unk_token),
            bos_token=special(bos_token),
            eos_token=special(eos_token),
            pad_token=special(pad_token),
            add_prefix_space=add_prefix_space,
            **{"special_tokens_pattern": "none", **kwargs},
        )
        # The base class keeps these arguments, and uses two of them with another meaning.
        self.init_kwargs |= dict(
            vocab_file=vocab_file,
            merges_file=merges_file,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            text_cleaning=text_cleaning,
            domain_words=self.domain_words,
        )
        if text_cleaning == "tortoise":
            self.split_special_tokens = True

    @property
    def vocab_size(self) -> int:
        """The number of tokens in the vocabulary file, without added tokens."""
        return len(self.encoder)

    @property
    def normalizer(self):
        """The function that cleans a text before it is split into tokens."""
        return TEXT_CLEANERS[self.text_cleaning]

    def get_vocab(self) -> dict[str, int]:
        """Return token -> id of the vocabulary and the added tokens."""
        return self.encoder | self.added_tokens_encoder

    # Text to ids

    def prepare_for_tokenization(self, text, is_split_into_words=False, **kwargs):
        """Return the text, with a space before it if asked for, and the remaining options."""
        add_prefix_space = kwargs.pop("add_prefix_space", self.add_prefix_space)
        if text and (add_prefix_space or is_split_into_words):
            text = " " + text
        return text, kwargs

    def _encode_plus(self, text, *args, is_split_into_words=False, **kwargs):
        if is_split_into_words:
            # The base class tokenizes word by word, without telling `tokenize`.
            kwargs["add_prefix_space"] = True
        return super()._encode_plus(text, *args, is_split_into_words=is_split_into_words, **kwargs)

    def _tokenize(self, text, **kwargs):
        tokens = []
        for word in _WORDS[self.text_cleaning].findall(self.normalizer(text)):
            if word not in self.cache:
                if len(self.cache) >= _MAX_KEPT_WORDS:
                    self.cache.clear()
                self.cache[word] = self._merge(word)
            tokens += self.cache[word]
        return tokens

    def _merge(self, word: str) -> list[str]:
        """Join the byte symbols of `word` by the merges, the best-ranked pair first, wherever it occurs."""
        symbols = [self.byte_encoder[byte] for byte in word.encode("utf-8")]
        while len(symbols) > 1:
            best = min(pairwise(symbols), key=lambda pair: self.bpe_ranks.get(pair, float("inf")))
            if best not in self.bpe_ranks:
                break
            merged, place = [], 0
            while place < len(symbols):
                joins = tuple(symbols[place : place + 2]) == best
                merged.append("".join(best) if joins else symbols[place])
                place += 2 if joins else 1
            symbols = merged
        space = self.byte_encoder[ord(" ")]
        return ["[SPACE]" if symbol == space and "[SPACE]" in self.encoder else symbol for symbol in symbols]

    def _convert_token_to_id(self, token):
        index = self.encoder.get(token)
        return self.unk_token_id if index is None else index

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        """Build the ids of one or two sequences, each with the special tokens that were asked for."""
        if not (self.add_bos_token or self.add_eos_token):
            return super().build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        before = [self.bos_token_id] if self.add_bos_token else []
        after = [self.eos_token_id] if self.add_eos_token else []
        sequences = [token_ids_0] if token_ids_1 is None else [token_ids_0, token_ids_1]
        return [index for sequence in sequences for index in (*before, *sequence, *after)]

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False):
        """Return 1 for each special token that `build_inputs_with_special_tokens` adds, else 0."""
        if already_has_special_tokens or not (self.add_bos_token or self.add_eos_token):
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens)
        before, after = [1] * bool(self.add_bos_token), [1] * bool(self.add_eos_token)
        sequences = [token_ids_0] if token_ids_1 is None else [token_ids_0, token_ids_1]
        return [flag for sequence in sequences for flag in (*before, *[0] * len(sequence), *after)]

    # Ids to text

    def _convert_id_to_token(self, index):
        return self.decoder.get(index)

    def convert_tokens_to_string(self, tokens) -> str:
        """Join `tokens` to the text that they spell; special tokens appear as they are written."""
        if None in tokens:
            raise ValueError(f"cannot decode an id outside the vocabulary (0 to {len(self) - 1}).")
        data = b"".join(
            bytes([self.byte_decoder[symbol]]) if symbol in self.byte_decoder else symbol.encode("utf-8", "replace")
            for symbol in "".join(tokens)
        )
        return data.decode("utf-8", errors=self.errors)

    def clean_up_tokenization(self, text) -> str:
        """Write spaces for [SPACE] and [STOP], drop unknown tokens, and make one space of two or three."""
        text = "".join(text) if isinstance(text, list) else text
        for token in ("[SPACE]", "[STOP]"):
            if token in self.encoder or token in self.added_tokens_encoder:
                text = text.replace(token, " ")
        if self.unk_token:
            text = text.replace(str(self.unk_token), "")
        return text.replace("   ", " ").replace("  ", " ")

    # Files

    def save_vocabulary(self, save_directory, filename_prefix=None) -> tuple[str, str]:
        """Write the vocabulary and the merges into `save_directory`, and return the two paths.

        Raises:
            NotADirectoryError: `save_directory` is not a directory.
        """
        if not os.path.isdir(save_directory):
            raise NotADirectoryError(f"the vocabulary is saved into a directory, which {save_directory} is not.")
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        vocab_file, merges_file = (os.path.join(save_directory, prefix + name) for name in _FILES.values())
        with open(vocab_file, "w", encoding="utf-8") as file:
            json.dump(self.encoder, file, indent=2, sort_keys=True, ensure_ascii=False)
            file.write("\n")
        with open(merges_file, "w", encoding="utf-8") as file:
            pairs = sorted(self.bpe_ranks, key=self.bpe_ranks.__getitem__)
            file.writelines(f"{line}\n" for line in (_VERSION_LINE, *(" ".join(pair) for pair in pairs)))
        return vocab_file, merges_file

    def save_pretrained(self, save_directory, legacy_format=None, filename_prefix=None, push_to_hub=False, **kwargs):
        """Save the tokenizer's files into `save_directory`; arguments and result as in the base class."""
        options = {name: True for name in ("add_bos_token", "add_eos_token") if getattr(self, name)}
        if options and push_to_hub:
            raise ValueError("save a tokenizer with add_bos_token or add_eos_token first, then push the directory.")
        # Fields that transformers does not know are written only if they differ from its behaviour.
        own = {"text_cleaning": "transformers", "domain_words": None}
        unsaid = {name: value for name, value in own.items() if self.init_kwargs[name] == value}
        for name in unsaid:
            del self.init_kwargs[name]
        try:
            files = super().save_pretrained(save_directory, legacy_format, filename_prefix, push_to_hub, **kwargs)
        finally:
            self.init_kwargs |= unsaid
        if options:
            # The base class omits these two.
            (path,) = (name for name in files if str(name).endswith("tokenizer_config.json"))
            with open(path, encoding="utf-8") as file:
                config = json.load(file)
            with open(path, "w", encoding="utf-8") as file:
                json.dump(config | options, file, indent=2, sort_keys=True, ensure_ascii=False)
                file.write("\n")
        return files


def _read_vocabulary(path) -> dict[str, int]:
    with open(path, encoding="utf-8") as file:
        try:
            vocabulary = json.load(file)
        except ValueError as error:
            raise ValueError(f"the vocabulary file {path} is not valid JSON: {error}.") from error
    if not isinstance(vocabulary, dict) or not all(type(index) is int for index in vocabulary.values()):
        raise ValueError(f"the vocabulary file {path} must be a JSON object of token -> id.")
    return vocabulary


def _read_merges(path) -> list[tuple[str, str]]:
    with open(path, encoding="utf-8") as file:
        lines = file.read().split("\n")
    if lines[0].startswith("#version"):
        del lines[0]
    pairs = []
    for pair in (line.split() for line in lines if line.strip()):
        if len(pair) != 2:
            raise ValueError(f"each line of the merges file {path} holds two tokens, but one is {' '.join(pair)!r}.")
        pairs.append((pair[0], pair[1]))
    return pairs
