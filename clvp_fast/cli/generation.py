"""Decodes the texts and voices of one `generate` as one batch, and writes each result as it comes."""

import argparse
from pathlib import Path

from clvp_fast.checkpoint import Checkpoint
from clvp_fast.cli import report
from clvp_fast.cli.drawing import Drawing
from clvp_fast.cli.items import Item
from clvp_fast.cli.listen import Listening, vocoder_of
from clvp_fast.cli.results import result_document, summary_row, write_arrays
from clvp_fast.engine.requests import CandidateResult
from clvp_fast.engine.sampling_params import SamplingParams
from clvp_fast.io.files import write_json
from clvp_fast.versions import versions


class Generation:
    """Run items through an engine, and write files below `folder`.

    Args:
        items: the items to speak; those with an error are skipped, and those that fail get one.
        sampling: the parameters of every item.
        arguments: those of the command line.

    Attributes:
        files: the files that were written, below `folder`.
        seconds: the time of each stage.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        items: list[Item],
        sampling: SamplingParams,
        folder: Path,
        arguments: argparse.Namespace,
    ):
        self.checkpoint, self.items, self.sampling = checkpoint, items, sampling
        self.folder, self.arguments = folder, arguments
        self.files: list[str] = []
        self.seconds: dict[str, float] = {}
        self._shared: dict = {}  # the fields that all documents share
        vocoder = vocoder_of(checkpoint) if arguments.listen else None
        self._listening = Listening(checkpoint, vocoder, folder) if vocoder else None
        self._rows: dict[Item, dict] = {}  # rows of the summary, by item with a result
        self._alone: dict | None = None  # the document of the only item
        self._tokens = 0

    def run(self) -> dict:
        """Generate, rank and write everything; return the document of a single item, or the summary of several.

        Raises:
            ValueError: a single item or all of several fail, or there is too little memory for one candidate.
        """
        ready = [item for item in self.items if item.error is None]
        if ready:
            self._decode(ready)
        self._note_failures()
        if not self._rows and self._alone is None:
            raise ValueError(f"none of the {len(self.items)} requests can be spoken; the notes name each")
        if self._listening:
            self.files += self._listening.write_page(self._shared)
        measured = {
            "seconds": {stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
            "tokens_per_second": round(self._tokens / self.seconds["generate_and_score"], 1),
        }
        if self._alone is not None:
            return self._write_document("candidates.json", self._alone | measured)
        rows = [self._rows.get(item) or summary_row(item, None) for item in self.items]
        document = {"checkpoint": self.checkpoint.name, "requests": rows, **self._shared, **measured}
        return self._write_document("summary.json", document)

    def _decode(self, ready: list[Item]) -> None:
        drawing = Drawing(self.checkpoint, self.sampling, self.arguments, len(ready))
        plan = drawing.engine.memory
        self._shared = {
            "settings": self._settings() | {"packed_weights": plan.packed_weights, "batch_size": plan.max_batch},
            "memory": {"budget": plan.budget, "planned": plan.total, "parts": plan.parts},
            "versions": versions(),
        }
        written = drawing.draw(ready, self._receive)
        self.seconds |= drawing.seconds | {"write": written}

    def _receive(self, item: Item, result: CandidateResult) -> None:
        """Write a result."""
        self._tokens += int(result.lengths.sum())
        document = result_document(self.checkpoint, item, result) | self._shared
        folder = self.folder / item.folder
        folder.mkdir(parents=True, exist_ok=True)
        length, pictures = self.sampling.max_new_tokens, not self.arguments.no_pictures
        names = write_arrays(folder, self.checkpoint, item, result, document["candidates"], length, pictures)
        if self._listening:
            names += self._listening.receive(item, result, document)
        self.files += [str(Path(item.folder, name)) for name in names]
        if item.folder:
            self._rows[item] = summary_row(item, self._write_document(f"{item.folder}/candidates.json", document))
        else:
            self._alone = document

    def _note_failures(self) -> None:
        """Print a note for each reason, with the items that it applies to."""
        reasons: dict[str, list[Item]] = {}
        for item in self.items:
            if item.error:
                reasons.setdefault(item.error, []).append(item)
        for reason, items in reasons.items():
            more = f" and {len(items) - 1} more" if len(items) > 1 else ""
            report.note(f"{items[0].folder}{more}: {reason}")

    def _settings(self) -> dict:
        sampling, arguments = self.sampling, self.arguments
        names = ["do_sample", "temperature", "top_p", "top_k", "typical_p", "min_p", "repetition_penalty"]
        if not sampling.do_sample:
            names = ["do_sample", "repetition_penalty"]
        names += ["num_candidates", "max_new_tokens", "seed"]
        return {
            **{name: getattr(sampling, name) for name in names},
            "crop_seed": arguments.crop_seed,
            "scoring": arguments.scoring,
            "score_dtype": arguments.score_dtype or arguments.dtype,
            "device": str(self.checkpoint.model.device),
            "dtype": arguments.dtype,
            "int8_weights": arguments.int8_weights,
            "activation_dtype": arguments.activation_dtype,
            "float8_pages": arguments.float8_pages,
            "text_cleaning": arguments.text_cleaning,
        }

    def _write_document(self, name: str, document: dict) -> dict:
        write_json(self.folder / name, document)
        self.files.append(name)
        return document
