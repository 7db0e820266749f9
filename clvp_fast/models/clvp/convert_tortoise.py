"""Converts original Tortoise checkpoints (`autoregressive.pth`, `clvp2.pth`) to a CLVP model or a checkpoint folder.

The architecture follows from the tensors' shapes; Tortoise's heads have 64 channels. Every tensor of the two files is
used, or named in `tortoise_keys` as one that CLVP does not need; any other tensor stops the conversion.
"""

import json
import logging
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import GenerationConfig

from clvp_fast.models.clvp.configuration import ClvpConfig
from clvp_fast.models.clvp.feature_extraction import ClvpFeatureExtractor
from clvp_fast.models.clvp.modeling import ClvpModelForConditionalGeneration
from clvp_fast.models.clvp.tokenization import ClvpTokenizer
from clvp_fast.models.clvp.tortoise_keys import HEAD_DIM, UNUSED, Rule, decoder_rules, encoder_rules

logger = logging.getLogger(__name__)


def convert_tortoise_checkpoint(
    autoregressive: str | Path | Mapping[str, torch.Tensor],
    clvp: str | Path | Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
) -> ClvpModelForConditionalGeneration:
    """Make the CLVP model of two original Tortoise checkpoints, on the CPU and in eval mode.

    Args:
        autoregressive: `autoregressive.pth` (or a `.safetensors` file of the same keys), or its state dict.
        clvp: `clvp2.pth`, likewise.
        dtype: dtype of the parameters; by default that of the files. Rotary frequencies stay in float32.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is damaged, holds more than tensors, or has a missing, unknown or misshapen tensor; or the
            two do not belong together.
    """
    decoder_side = Original("the autoregressive checkpoint", autoregressive)
    encoder_side = Original("the CLVP checkpoint", clvp)
    config = ClvpConfig(**decoder_configs(decoder_side), **encoder_configs(encoder_side))
    check_pair(config, decoder_side, encoder_side)

    weights = decoder_side.convert(decoder_rules(config), dtype)
    weights |= encoder_side.convert(encoder_rules(config), dtype)
    with torch.device("meta"):
        model = ClvpModelForConditionalGeneration(config)
    model.load_state_dict(weights, assign=True)
    config.dtype = model.dtype
    decoder = config.decoder_config
    model.generation_config = GenerationConfig(
        bos_token_id=decoder.bos_token_id, eos_token_id=decoder.eos_token_id, pad_token_id=decoder.eos_token_id
    )
    return model.eval()


def write_checkpoint(
    autoregressive: str | Path,
    clvp: str | Path,
    folder: str | Path,
    *,
    tokenizer: str | Path | None = None,
    mel_norms: str | Path | None = None,
) -> None:
    """Write the checkpoint folder of two original Tortoise checkpoints.

    Args:
        autoregressive, clvp: the two files.
        folder: an existing folder, which gets weights and configurations, and the tokenizer and feature extractor if
            their files are found.
        tokenizer: Tortoise's `tokenizer.json`; by default looked for beside the checkpoints.
        mel_norms: Tortoise's `mel_norms.pth`; by default looked for there too.

    Raises:
        FileNotFoundError, ValueError: as `convert_tortoise_checkpoint`; nothing is written then.
    """
    model = convert_tortoise_checkpoint(autoregressive, clvp)
    config = model.config
    tokenizer = tokenizer or _beside("tokenizer.json", autoregressive, clvp)
    mel_norms = mel_norms or _beside("mel_norms.pth", autoregressive, clvp)
    vocabulary = _read_tokenizer(Path(tokenizer), config.text_config.vocab_size) if tokenizer else None
    norms = _read_mel_norms(Path(mel_norms), config.decoder_config.feature_size) if mel_norms else None

    folder = Path(folder)
    model.save_pretrained(folder)
    if vocabulary is None:
        logger.warning("no tokenizer.json beside the checkpoints and none given: the result has no vocabulary")
    else:
        _tokenizer_in(folder, vocabulary).save_pretrained(folder)
    if norms is None:
        logger.warning("no mel_norms.pth beside the checkpoints and none given: the result has no feature settings")
    else:
        ClvpFeatureExtractor(feature_size=len(norms), mel_norms=norms).save_pretrained(folder)


def tortoise_processors(
    tokenizer: str | Path, mel_norms: str | Path, config: ClvpConfig, text_cleaning: str = "tortoise"
) -> tuple[ClvpTokenizer, ClvpFeatureExtractor]:
    """Make the tokenizer and the feature extractor from Tortoise's `tokenizer.json` and `mel_norms.pth`.

    Raises:
        FileNotFoundError, ValueError: a file is missing, is of another kind, or does not fit `config`.
    """
    vocabulary = _read_tokenizer(Path(tokenizer), config.text_config.vocab_size)
    norms = _read_mel_norms(Path(mel_norms), config.decoder_config.feature_size)
    with TemporaryDirectory() as folder:
        made = _tokenizer_in(Path(folder), vocabulary, text_cleaning=text_cleaning)
    return made, ClvpFeatureExtractor(feature_size=len(norms), mel_norms=norms)


def _tokenizer_in(folder: Path, vocabulary: tuple[dict[str, int], list[str]], **options) -> ClvpTokenizer:
    """Write the two files of a vocabulary, and return the tokenizer that reads them."""
    vocab, merges = vocabulary
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    return ClvpTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), **options)


class Original:
    """The tensors of one original checkpoint, and the errors that name them."""

    def __init__(self, kind: str, given: str | Path | Mapping[str, torch.Tensor]):
        self.name = kind
        if isinstance(given, (str, Path)):
            self.name = f"{kind} {given}"
            given = _read_file(Path(given))
        if not isinstance(given, Mapping):
            raise TypeError(f"{self.name} must be a path or a state dict, got {type(given).__name__}")
        for key, value in given.items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(
                    f"{self.name} must hold tensors alone, but {key!r} is a {type(value).__name__}: give the plain "
                    "state dict"
                )
        self.tensors = dict(given)

    def shape(self, key: str, axes: int) -> tuple[int, ...]:
        """Return the shape of a tensor; raise ValueError if it is missing or does not have `axes` axes."""
        if key not in self.tensors:
            raise ValueError(self._lacks([key]))
        shape = tuple(self.tensors[key].shape)
        if len(shape) != axes:
            raise ValueError(f"{self.name}: {key} must have {axes} axes, but its shape is {list(shape)}")
        return shape

    def count(self, prefix: str) -> int:
        """Count the numbers after `prefix` in the keys; return at least 1, so that absent tensors are reported."""
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        return max(1, len({found[1] for found in map(pattern.match, self.tensors) if found}))

    def heads(self, key: str, hidden_size: int) -> int:
        """Return the number of heads of a width; raise ValueError for one that is not a multiple of a head."""
        if hidden_size == 0 or hidden_size % HEAD_DIM:
            raise ValueError(
                f"{self.name}: {key} is {hidden_size} wide, but Tortoise's width is a multiple of its head size "
                f"{HEAD_DIM}"
            )
        return hidden_size // HEAD_DIM

    def check(self, rules: list[Rule]) -> None:
        """Raise `ValueError` if tensors are missing, too many, or of another shape than `rules` say."""
        missing = [rule.source for rule in rules if rule.source not in self.tensors]
        if missing:
            raise ValueError(self._lacks(missing))
        known = {rule.source for rule in rules}
        unknown = [key for key in self.tensors if key not in known and not UNUSED.fullmatch(key)]
        if unknown:
            raise ValueError(
                f"{self.name} has {_listed(unknown)}, which this kind of Tortoise checkpoint does not have: nothing "
                "was converted, for it would be lost"
            )
        for rule in rules:
            tensor = self.tensors[rule.source]
            if tuple(tensor.shape) != rule.shape or not tensor.is_floating_point():
                raise ValueError(
                    f"{self.name}: {rule.source} must be floating point of shape {list(rule.shape)} to fit the other "
                    f"tensors, but is {str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
                )

    def convert(self, rules: Iterable[Rule], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        """Return copies of the tensors by CLVP's names; raise as `check`."""
        rules = list(rules)
        self.check(rules)
        weights = {}
        for rule in rules:
            tensor = self.tensors[rule.source]
            for target, part in zip(rule.targets, rule.convert(tensor), strict=True):
                keep = dtype or tensor.dtype
                if target.endswith("inv_freq"):
                    keep = torch.promote_types(keep, torch.float32)
                weights[target] = part.to("cpu", keep, copy=True, memory_format=torch.contiguous_format).detach()
        return weights

    def _lacks(self, keys: list[str]) -> str:
        return f"{self.name} lacks {_listed(keys)}: is it the right file of Tortoise, and whole?"


def _listed(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"


def decoder_configs(original: Original) -> dict:
    """Derive `decoder_config` from `autoregressive.pth`."""
    vocab_size, hidden_size = original.shape("mel_embedding.weight", 2)
    inner = original.shape("gpt.h.0.mlp.c_fc.weight", 2)[1]
    decoder = dict(
        vocab_size=vocab_size,
        max_position_embeddings=original.shape("mel_pos_embedding.emb.weight", 2)[0],
        max_text_tokens=original.shape("text_pos_embedding.emb.weight", 2)[0],
        hidden_size=hidden_size,
        num_hidden_layers=original.count("gpt.h."),
        num_attention_heads=original.heads("mel_embedding.weight", hidden_size),
        n_inner=None if inner == 4 * hidden_size else inner,
        num_mel_attn_blocks=original.count("conditioning_encoder.attn."),
        feature_size=original.shape("conditioning_encoder.init.weight", 3)[1],
        # The two rows after the speech codes, in Tortoise's order.
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
    )
    return dict(decoder_config=decoder)


def encoder_configs(original: Original) -> dict:
    """Derive `text_config`, `speech_config` and `projection_dim` from `clvp2.pth`."""
    projection_dim = original.shape("to_text_latent.weight", 2)[0]
    configs: dict[str, Any] = dict(projection_dim=projection_dim)
    for side in ("text", "speech"):
        vocab_size, hidden_size = original.shape(f"{side}_emb.weight", 2)
        layers = f"{side}_transformer.transformer.attn_layers.layers."
        configs[f"{side}_config"] = dict(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=original.shape(f"{layers}1.1.wrap.net.3.weight", 2)[1],
            projection_dim=projection_dim,
            num_hidden_layers=(original.count(layers) + 1) // 2,
            num_attention_heads=original.heads(f"{side}_emb.weight", hidden_size),
        )
    # Tortoise begins a text with the row after its tokens, and stops it with token 0.
    text = configs["text_config"]
    text |= dict(bos_token_id=text["vocab_size"] - 1, eos_token_id=0)
    return configs


def check_pair(config: ClvpConfig, decoder_side: Original, encoder_side: Original) -> None:
    """Raise `ValueError` if the two files have different vocabularies."""
    texts = decoder_side.shape("text_embedding.weight", 2)[0]
    codes = config.decoder_config.vocab_size - 2
    for ours, theirs, key, other in (
        (texts, config.text_config.vocab_size, "text_embedding", "text_emb"),
        (codes, config.speech_config.vocab_size, "mel_embedding (less its start and stop token)", "speech_emb"),
    ):
        if ours != theirs:
            raise ValueError(
                f"{decoder_side.name} and {encoder_side.name} do not belong together: {key} has {ours} rows and "
                f"{other} has {theirs}"
            )


def _read_file(path: Path):
    """Load a `.safetensors` or a torch file; from the latter only tensors and plain containers, never code."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: download Tortoise's models first, or give the right path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise ValueError(f"{path} holds Python objects besides tensors, which could run code: refused") from error
        raise ValueError(f"{path} is not a file of tensors, or is damaged; copy it again") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a file of tensors, or is damaged or truncated; copy it again") from error


def _beside(name: str, *files: str | Path) -> Path | None:
    return next((path for file in files if (path := Path(file).parent / name).is_file()), None)


def _read_tokenizer(path: Path, rows: int) -> tuple[dict[str, int], list[str]]:
    """Return vocabulary and merges ("left right") of a `tokenizer.json`."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: download Tortoise's models first, or give the right path")
    try:
        bpe = json.loads(path.read_text(encoding="utf-8"))["model"]
        vocab = {token: int(index) for token, index in bpe["vocab"].items()}
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not Tortoise's tokenizer.json: it has no byte-pair vocabulary and merges"
        ) from error
    if max(vocab.values(), default=0) >= rows:
        raise ValueError(f"{path} numbers {max(vocab.values()) + 1} tokens, but the checkpoint has rows for {rows}")
    return vocab, merges


def _read_mel_norms(path: Path, feature_size: int) -> list[float]:
    norms = _read_file(path)
    if not isinstance(norms, torch.Tensor) or norms.shape != (feature_size,) or not norms.isfinite().all():
        raise ValueError(f"{path} must hold one tensor of {feature_size} finite numbers, a norm for each mel channel")
    return norms.tolist()
