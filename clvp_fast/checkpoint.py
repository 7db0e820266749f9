"""Loads models by name: the demo, a folder, or a hub id. Errors describe a damaged folder in one sentence."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from clvp_fast import (
    ClapModel,
    ClapProcessor,
    ClvpConfig,
    ClvpFeatureExtractor,
    ClvpModelForConditionalGeneration,
    ClvpProcessor,
    ClvpTokenizer,
)
from clvp_fast.demo import reserved_checkpoint
from clvp_fast.io.errors import cut
from clvp_fast.io.files import user_path
from clvp_fast.io.names import RESERVED, nearest
from clvp_fast.models.clvp.convert_tortoise import convert_tortoise_checkpoint, tortoise_processors
from clvp_fast.models.clvp.tokens import most_text
from clvp_fast.vocoder import Vocoder, load_vocoder

_JSON_FILES = ("config.json", "vocab.json", "preprocessor_config.json")
_OPTIONAL_JSON_FILES = ("generation_config.json", "tokenizer_config.json", "model.safetensors.index.json")
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# The most characters of a text that are read, and that an error sentence shows.
_LONGEST_TEXT, _SHOWN = 1 << 16, 81


@dataclass
class Checkpoint:
    """A loaded model with its tokenizer, its feature extractor, and its vocoder if the checkpoint has one."""

    name: str
    model: ClvpModelForConditionalGeneration
    tokenizer: ClvpTokenizer
    feature_extractor: ClvpFeatureExtractor
    vocoder: Vocoder | None = None

    @property
    def processor(self) -> ClvpProcessor:
        """The feature extractor and the tokenizer in one."""
        return ClvpProcessor(self.feature_extractor, self.tokenizer)


def best_device() -> str:
    """Return "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_checkpoint(name: str | Path) -> str | Path:
    """Resolve `demo` and `random` to their folders, a folder to itself after a check, and anything else to a hub id.

    Raises:
        FileNotFoundError: `name` looks like a path but does not exist, or the folder lacks a file.
        ValueError: `name` is a file, or a file of the folder is damaged.
    """
    if str(name) in RESERVED:
        name = reserved_checkpoint(str(name))
    return _folder_or_id(name, "'demo', a folder", (*_JSON_FILES, "merges.txt"))


def _folder_or_id(name: str | Path, known: str, required: tuple[str, ...]) -> str | Path:
    path = user_path(name)
    if path.is_dir():
        check_folder(path, required)
        return path
    if path.exists():
        raise ValueError(
            f"a checkpoint is a folder, and {path} is a file; `clvp-fast convert` makes one from .pth files"
        )
    if isinstance(name, Path) or str(name).count("/") != 1 or str(name).startswith((".", "~", "/")):
        raise FileNotFoundError(
            f"there is no checkpoint folder {path}; {_suggestion(name)}give {known}, or a hub id as owner/name"
        )
    return str(name)


def _suggestion(name: str | Path) -> str:
    """Ask whether a folder of a similar name, or the demo, was meant; return "" without one."""
    path = Path(name)
    try:
        beside = [one.name for one in path.parent.iterdir() if one.is_dir()] if path.parent.is_dir() else []
    except OSError:
        beside = []
    near = nearest(path.name, [*beside, *RESERVED * (str(name) == path.name)])
    return "" if near is None else f"did you mean {path.with_name(near)}? Or "


def check_folder(folder: Path, required: tuple[str, ...]) -> None:
    """Raise an error for the first file of a checkpoint folder that is missing, superfluous or truncated."""
    for name in required:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"checkpoint {folder} has no {name}: put it there, or give the folder of a whole checkpoint"
            )
    weights = [name for name in _WEIGHT_FILES if (folder / name).is_file()]
    if not weights:
        raise FileNotFoundError(f"checkpoint {folder} has no weights: model.safetensors is missing")
    if "model.safetensors" in weights and "model.safetensors.index.json" in weights:
        raise ValueError(
            f"checkpoint {folder} has both model.safetensors and model.safetensors.index.json; remove the old one"
        )
    for name in (*_JSON_FILES, *_OPTIONAL_JSON_FILES):
        path = folder / name
        if path.is_file():
            _read_json(path)
    for path in _safetensors_files(folder):
        _check_safetensors(path)


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: it is not valid JSON ({error}); copy the checkpoint again") from error


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        return [single] if single.is_file() else []
    listed = sorted(set(_read_json(index).get("weight_map", {}).values()))
    missing = [name for name in listed if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"checkpoint {folder} lacks {', '.join(missing)}, which {index.name} names")
    extra = sorted(path.name for path in folder.glob("model-*.safetensors") if path.name not in listed)
    if extra:
        raise ValueError(f"checkpoint {folder} holds {', '.join(extra)}, which {index.name} does not name")
    return [folder / name for name in listed]


def _check_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as weights:
            weights.keys()
    except (SafetensorError, struct.error) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}); copy the checkpoint again") from error


def load_checkpoint(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    text_cleaning: str = "tortoise",
) -> Checkpoint:
    """Load model (in eval mode, on `device`, in `dtype`), tokenizer and feature extractor of the checkpoint `name`.

    The options with which original Tortoise was trained and runs are on: its text cleaning (unless
    `text_cleaning="transformers"`), its positions of generated tokens, and pooling without padding.

    Raises:
        FileNotFoundError, ValueError: see `resolve_checkpoint`; ValueError also for tensors that are missing, left
            over, or of another shape than the configuration says, and for a hub id that cannot be loaded.
    """
    source = resolve_checkpoint(name)
    try:
        config = ClvpConfig.from_pretrained(source)
        tokenizer = ClvpTokenizer.from_pretrained(source, text_cleaning=text_cleaning)
        feature_extractor = ClvpFeatureExtractor.from_pretrained(source)
        config.text_config.pool_padding = False
        config.decoder_config.contiguous_positions = True
        model, report = ClvpModelForConditionalGeneration.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # transformers' loaders raise many types for a damaged file
        suggested = "" if Path(source).is_dir() else _suggestion(name).removesuffix(" Or ")
        told = f"checkpoint {name} cannot be loaded: {_reason(error)}"
        raise ValueError(f"{told}; {suggested}" if suggested else told) from error
    _check_tensors(name, report)
    _check_vocabulary(name, tokenizer, config)
    vocoder = load_vocoder(source, feature_extractor) if isinstance(source, Path) else None
    return Checkpoint(str(name), model.to(device).eval(), tokenizer, feature_extractor, vocoder)


def load_tortoise(
    name: str,
    autoregressive: Path,
    clvp: Path,
    tokenizer: Path,
    mel_norms: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    text_cleaning: str = "tortoise",
) -> Checkpoint:
    """Load original Tortoise's files as `load_checkpoint` loads the folder that `clvp-fast convert` makes of them.

    Raises:
        FileNotFoundError, ValueError: as from `convert_tortoise_checkpoint`, for any of the files.
    """
    model = convert_tortoise_checkpoint(autoregressive, clvp, dtype=dtype)
    model.config.decoder_config.contiguous_positions = True
    processors = tortoise_processors(tokenizer, mel_norms, model.config, text_cleaning)
    placed = cast(Any, model).to(device)  # transformers types `to` as a function of the module
    return Checkpoint(name, placed.eval(), *processors)


def load_clap(
    name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[ClapModel, ClapProcessor]:
    """Load the CLAP model (in eval mode, on `device`, in `dtype`) and the processor of a folder or a hub id.

    Raises:
        FileNotFoundError, ValueError: as from `load_checkpoint`; there is no demo of CLAP.
    """
    if str(name) in RESERVED:
        raise ValueError(f"there is no {name} of CLAP; give a folder, or a hub id such as laion/clap-htsat-unfused")
    source = _folder_or_id(name, "a folder", ("config.json",))
    try:
        model, report = ClapModel.from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
        processor = ClapProcessor.from_pretrained(source)
    except Exception as error:  # transformers' loaders raise many types for a damaged file
        raise ValueError(f"checkpoint {name} cannot be loaded: {_reason(error)}") from error
    # Buffers are computed, even if an older checkpoint has them.
    made = {key for key, _ in model.named_buffers() if not key.endswith(("running_mean", "running_var"))}
    _check_tensors(name, report | {"missing_keys": set(report["missing_keys"]) - made}, "CLAP")
    return model.to(device).eval(), processor


def _check_tensors(name: str | Path, report: dict, what: str = "CLVP") -> None:
    for kind, keys in (
        ("lacks tensors", report["missing_keys"]),
        (f"holds tensors that {what} does not have", report["unexpected_keys"]),
        ("holds tensors of another shape than its config.json says", report["mismatched_keys"]),
    ):
        if keys:
            shown = sorted(_describe_key(key) for key in keys)
            more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
            raise ValueError(f"checkpoint {name} {kind}: {', '.join(shown[:3])}{more}")


def _describe_key(key) -> str:
    if isinstance(key, str):
        return key
    name, found, expected = key
    return f"{name} {list(found)} instead of {list(expected)}"


def _check_vocabulary(name: str | Path, tokenizer: ClvpTokenizer, config: ClvpConfig) -> None:
    rows, tokens = config.text_config.vocab_size, max(tokenizer.get_vocab().values()) + 1
    if tokens > rows:
        raise ValueError(f"checkpoint {name}: vocab.json numbers {tokens} tokens, and config.json has rows for {rows}")


def _reason(error: Exception) -> str:
    """Return why a checkpoint could not be loaded; another error may hide that the hub could not be reached."""
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            return "it is not in the cache, and the hub cannot be reached; download it first, or give a folder"
        behind = behind.__cause__ or behind.__context__
    return _first_sentence(error)


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].removesuffix(".") if lines else type(error).__name__


def text_limit(model: ClvpModelForConditionalGeneration) -> int:
    """Return the most tokens that a text may have."""
    return most_text(model.config.decoder_config)


def _ids(tokenizer: ClvpTokenizer, text: str) -> list[int]:
    return cast(list[int], tokenizer(text)["input_ids"])  # transformers types the results of every tokenizer


def require_text(text: str) -> None:
    """Raise `ValueError` for an empty text."""
    if not text.strip():
        raise ValueError("the text is empty; give the sentence to speak")


def sayable_ids(model: ClvpModelForConditionalGeneration, tokenizer: ClvpTokenizer, text: str) -> list[int]:
    """Return the token ids of a text.

    Raises:
        ValueError: the text has nothing to say, more tokens than the checkpoint has positions for, or more than 65,536
            characters.
    """
    require_text(text)
    if len(text) > _LONGEST_TEXT:  # spelling out its numbers could take minutes while other requests wait
        raise ValueError(
            f"the text is too long: {len(text)} characters, and at most {_LONGEST_TEXT} are read; split it up"
        )
    ids = _ids(tokenizer, text)
    silent = [tokenizer.unk_token_id, *_ids(tokenizer, " ")]
    if all(token in silent for token in ids):
        raise ValueError(
            f"nothing of the text {cut(text, _SHOWN)!r} is in the checkpoint's vocabulary; write it in Latin letters"
        )
    if len(ids) > text_limit(model):
        raise ValueError(
            f"the text is too long: {len(ids)} tokens, and this checkpoint takes {text_limit(model)}; split it up"
        )
    return ids
