"""Turns rows into outcomes on one device, in the job's own process or in a worker of a cluster."""

import json
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from clvp_fast.batch.failures import failure_of
from clvp_fast.batch.outcomes import Outcome
from clvp_fast.batch.rows import Row
from clvp_fast.batch.settings import Settings
from clvp_fast.checkpoint import Checkpoint, best_device, load_checkpoint
from clvp_fast.engine.building import build_engine
from clvp_fast.engine.defaults import MEMORY_FRACTION
from clvp_fast.engine.engine import CandidateEngine
from clvp_fast.engine.requests import CandidateRequest, CandidateResult
from clvp_fast.engine.voice_files import load_voice
from clvp_fast.engine.voices import Voice
from clvp_fast.io.files import is_special
from clvp_fast.models.clvp.text_remarks import text_remarks
from clvp_fast.versions import versions


class Worker:
    """An engine over a checkpoint, and the voices that its rows name.

    Half types decode in the engine's deterministic mode, so that a row's results do not depend on the rows beside it.

    Args:
        settings: open ones are determined here; the attribute has them all.
        memory_fraction: the share of free memory that may be used beside the weights.

    Raises:
        FileNotFoundError, ValueError: a missing or damaged checkpoint, a missing GPU, `max_new_tokens` beyond the
            checkpoint's positions, too little memory, or a half type without a kernel here.
    """

    def __init__(self, settings: Settings, memory_fraction: float = MEMORY_FRACTION):
        device = settings.device or best_device()
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device 'cuda': torch sees no CUDA device here; use 'cpu', or leave it out")
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        checkpoint = load_checkpoint(
            settings.checkpoint,
            device=device,
            dtype=getattr(torch, settings.dtype),
            text_cleaning=settings.text_cleaning,
        )
        self.engine = self._engine(checkpoint, settings, memory_fraction)
        self.settings = replace(
            settings,
            device=device,
            max_new_tokens=self.engine.max_new_tokens,
            packed_weights=self.engine.memory.packed_weights,
            batch_size=self.engine.memory.max_batch,
            threads=torch.get_num_threads() if device == "cpu" else None,
        )
        self.checkpoint_digest = _digest_of(checkpoint)

    @staticmethod
    def _engine(checkpoint: Checkpoint, settings: Settings, memory_fraction: float) -> CandidateEngine:
        # float32 needs no asking: on a CPU its bits do not depend on the batch, and on a GPU this is the default.
        deterministic = True if settings.dtype != "float32" else None
        try:
            return build_engine(checkpoint, settings, memory_fraction, deterministic=deterministic)
        except RuntimeError as error:
            if not deterministic or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                "a job that can be stopped needs each row to give the same in every batch, which "
                f"{settings.dtype} does not here: use another dtype ({error})"
            ) from error

    def description(self) -> dict[str, Any]:
        """Describe the worker for a job's manifest."""
        return {"settings": self.settings.as_dict(), "checkpoint": self.checkpoint_digest, "versions": versions()}

    def outcomes(self, rows: Iterable[Row]) -> Iterator[Outcome]:
        """Yield the outcome of each row as soon as it is known; rows are taken from the iterable as there is room.

        Raises:
            ValueError: there is too little memory for a single candidate.
        """
        failed: deque[Outcome] = deque()
        keep = self.settings.keep or 2**31
        try:
            for result in self.engine.generate(self._requests(rows, failed), keep=keep):
                yield from _drained(failed)
                yield self._outcome(result)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ValueError(
                "there is too little memory for a single candidate: free some, choose fewer max_new_tokens, or a half "
                "type as dtype"
            ) from error
        yield from _drained(failed)

    def _requests(self, rows: Iterable[Row], failed: deque[Outcome]) -> Iterator[CandidateRequest]:
        """Yield requests for the rows with a usable voice and usable parameters; the others go to `failed`."""
        for row in rows:
            try:
                request = self._request(row)
            except Exception as error:
                failed.append(Outcome(row.index, row.id, error=failure_of(error)))
            else:
                yield request

    def _request(self, row: Row) -> CandidateRequest:
        if row.error is not None:
            raise ValueError(row.error)
        sampling = self.settings.sampling(**row.sampling | {"seed": row.seed(self.settings.seed)})
        voice, remarks = self.voice(row.voice)
        return CandidateRequest(text=row.text, conditioning=voice, sampling=sampling, id=(row, remarks))

    def voice(self, place: str | None) -> tuple[Voice, tuple[str, ...]]:
        """Return the voice at a path (None: the job's own) and remarks on its recordings; each voice is read once.

        Raises:
            ValueError: there is no usable voice, with the reason.
            Exception: an error of the whole job, as `failure_of` decides.
        """
        place = place or self.settings.voice
        if place is None:
            raise ValueError("the row names no voice, and the job has none for such rows")
        voice = self.engine.voices.at(place, partial(self._read_voice, place))
        if isinstance(voice, str):
            raise ValueError(voice)
        return voice

    def _read_voice(self, place: str) -> tuple[Voice, tuple[str, ...]] | str:
        """Return a voice and its remarks, or the reason why there is none, for all rows that name it."""
        try:
            _require_kept(Path(place))
            loaded = load_voice(self.engine.voices, place, self.settings.crop_seed)
            return loaded.voice, loaded.remarks
        except Exception as error:
            return failure_of(error)

    def _outcome(self, result: CandidateResult) -> Outcome:
        row, remarks = result.request.id
        try:
            if result.error is not None:
                raise result.error
            remarks += text_remarks(self.engine.processor.tokenizer, row.text)
            sampling = result.request.sampling
            assert sampling is not None and sampling.seed is not None  # `_request` has set them
            return Outcome.of(row, sampling.seed, result, self.settings, remarks)
        except Exception as error:
            return Outcome(row.index, row.id, error=failure_of(error))


def _require_kept(place: Path) -> None:
    """Raise `ValueError` for a pipe or a device, which a resumed job could not read again."""
    if is_special(place):
        raise ValueError(f"voice must be the path of a file or folder, and {place} is a pipe or a device")


def _drained(waiting: deque[Outcome]) -> Iterator[Outcome]:
    while waiting:
        yield waiting.popleft()


def _digest_of(checkpoint: Checkpoint) -> str:
    """Return 32 hexadecimal digits that identify a checkpoint: its configuration, vocabulary, features and weights.

    Weights enter by their CRC-32, which detects every change of one number, and misses another change once in four
    billion. It takes half a second per gigabyte, and a cryptographic digest more than twice as long.
    """
    digest = blake2b(digest_size=16)
    tokenizer, extractor = checkpoint.tokenizer, checkpoint.feature_extractor
    config = {name: value for name, value in checkpoint.model.config.to_dict().items() if name not in _PASSING}
    parts = [config, tokenizer.get_vocab(), extractor.to_dict()]
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    for name, tensor in checkpoint.model.state_dict().items():
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} {zlib.crc32(content):08x} ".encode())
    return digest.hexdigest()


# Fields of a configuration that only say from where and with which version it was loaded.
_PASSING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_commit_hash")


def ready_worker(settings: Settings, memory_fraction: float) -> Worker:
    """Return a [`Worker`] that is warmed up on a GPU. Raises as `Worker` does."""
    worker = Worker(settings, memory_fraction)
    if worker.settings.device == "cuda":
        worker.engine.warm_up()
    return worker
