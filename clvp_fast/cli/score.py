"""`clvp-fast score`: ranks speech codes against a text, or recordings (`score_audio.py`)."""

import argparse
import json
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from clvp_fast.checkpoint import Checkpoint
from clvp_fast.cli import report
from clvp_fast.cli.inputs import load_for, text_ids
from clvp_fast.engine.ranking import Ranker
from clvp_fast.models.clvp.similarity import normalized
from clvp_fast.models.clvp.text_remarks import text_remarks
from clvp_fast.models.clvp.tokens import end_text, known_codes, text_end
from clvp_fast.versions import versions

#: The number of candidates that go through the speech encoder at a time, which bounds memory.
_BATCH = 32


def run(arguments: argparse.Namespace) -> None:
    if arguments.model == "clap":
        from clvp_fast.cli import score_audio

        score_audio.run(arguments)
        return
    if arguments.codes is None or arguments.text is None or arguments.audio or arguments.texts:
        return arguments.refuse("CODES and TEXT are needed; --audio and --text go with --model clap")
    arguments.checkpoint = arguments.checkpoint or "demo"
    codes, lengths, numbers = read_codes(Path(arguments.codes))
    checkpoint = load_for(arguments)
    ids = text_ids(checkpoint, arguments.text)
    if arguments.scoring == "trimmed":
        scores = score_trimmed(checkpoint, ids, codes, lengths)
    else:
        scores = score(checkpoint, ids, codes)
    rows = report.ranking(scores, lengths, numbers=numbers)
    if arguments.json:
        document = {"text": arguments.text, "codes": arguments.codes, "checkpoint": arguments.checkpoint}
        document["remarks"] = list(text_remarks(checkpoint.tokenizer, arguments.text))
        report.print_json(document | {"candidates": rows, "versions": versions()})
    else:
        report.print_ranking(rows)


def read_codes(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read speech codes `[candidates, length]` int64, the number of spoken tokens of each, and its number.

    The latter two are `[candidates]`, from `lengths` and `candidates` of the file; by default whole rows, counted from
    0.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a folder; not an .npz with `codes`, an .npy or a .json; not whole numbers; rows of unequal length;
            no rows; impossible lengths or numbers.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a file of codes in it, such as codes.npz")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of codes at {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else np.load(path)
        if isinstance(content, np.lib.npyio.NpzFile):
            content = {name: content[name] for name in ("codes", "lengths", "candidates") if name in content}
    except (OSError, EOFError, ValueError, RecursionError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as .npz, .npy or .json of speech codes") from error
    if isinstance(content, np.ndarray | list):
        content = {"codes": content}
    if not isinstance(content, dict) or "codes" not in content:
        raise ValueError(f"{path} has no array named 'codes'")
    try:
        codes = np.asarray(content["codes"])
    except ValueError as error:
        raise ValueError(
            f"{path}: every list of codes must have the same length; pad them as `generate` does"
        ) from error
    if codes.ndim == 1:
        codes = codes[None]
    if codes.ndim != 2 or codes.size == 0 or codes.dtype.kind not in "iu":
        shape = list(codes.shape)
        raise ValueError(f"{path}: codes must be whole numbers [candidates, length], got {codes.dtype} {shape}")
    if codes.max() >= 2**63:
        raise ValueError(f"{path}: codes must be those of speech, got {codes.max()}")
    rows, longest = codes.shape
    lengths = _of_rows(path, content, "lengths", rows, longest, f"from 0 to {longest}, as many as a row has codes")
    numbers = _of_rows(path, content, "candidates", rows, 2**63 - 1, "from 0, the number of each row")
    return (
        codes.astype(np.int64),
        np.full(rows, longest) if lengths is None else lengths,
        np.arange(rows) if numbers is None else numbers,
    )


def _of_rows(path: Path, content, name: str, rows: int, most: int, wanted: str) -> np.ndarray | None:
    """Return whole numbers `[rows]` from 0 to `most`, if a file has them beside its codes."""
    if content.get(name) is None:
        return None
    try:
        numbers = np.asarray(content[name])
    except ValueError:  # lists of unequal lengths
        numbers = np.empty(0, dtype=object)
    if numbers.dtype.kind in "iu" and numbers.shape != (rows,):
        raise ValueError(f"{path}: {rows} candidates need as many {name}, got {list(numbers.shape)}")
    if numbers.dtype.kind not in "iu" or numbers.min() < 0 or numbers.max() > most:
        raise ValueError(f"{path}: {name} must be whole numbers {wanted}")
    return numbers


@torch.inference_mode()
def score(checkpoint: Checkpoint, ids: torch.Tensor, codes: np.ndarray) -> np.ndarray:
    """Return scaled cosine similarities `[candidates]` float32 of a text `ids` `[1, length]` and rows of codes."""
    model = checkpoint.model
    _check_range(checkpoint, codes)
    given = known_codes(torch.from_numpy(codes), model.config).to(model.device)
    ids, _ = end_text(ids, None, text_end(model.config.text_config))
    text = normalized(model.text_encoder_model(input_ids=ids).embeds.float())
    scores = []
    with report.counting_progress(len(given) <= _BATCH) as progress:
        task = progress.add_task("ranking", total=len(given))
        for part in given.split(_BATCH):
            embeds = normalized(model.speech_encoder_model(input_ids=part).embeds.float())
            scores.append(embeds @ text[0])
            progress.update(task, advance=len(part))
    return (torch.cat(scores) * model.logit_scale.float().exp()).cpu().numpy()


def score_trimmed(checkpoint: Checkpoint, ids: torch.Tensor, codes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Score the first `lengths[i]` codes of each row i, as `score`; a row without codes gets -inf."""
    _check_range(checkpoint, codes)
    rows = [row[:length] for row, length in zip(codes, lengths, strict=True)]
    with report.waiting("ranking"):
        return Ranker(checkpoint.model, mode="trimmed").rank(ids[0], rows).scores.cpu().numpy()


def _check_range(checkpoint: Checkpoint, codes: np.ndarray) -> None:
    limit = checkpoint.model.config.decoder_config.vocab_size - 1
    if codes.min() < 0 or codes.max() > limit:
        raise ValueError(f"codes must lie from 0 to {limit} for this checkpoint, got {codes.min()} to {codes.max()}")
