"""`generate --listen`: writes the kept candidates as recordings, and a page to hear and see them."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.image import imsave

from clvp_fast.checkpoint import Checkpoint
from clvp_fast.cli import report
from clvp_fast.cli.items import Item
from clvp_fast.cli.page import REPORT, SOUND, TITLE, Page, Section, data_url
from clvp_fast.engine.requests import CandidateResult
from clvp_fast.io.errors import sentence
from clvp_fast.models.clvp.tokens import known_codes
from clvp_fast.vocoder import SETTINGS_FILE, WEIGHTS_FILE, Vocoder


def vocoder_of(checkpoint: Checkpoint) -> Vocoder | None:
    """Return the checkpoint's vocoder, or None with a note on what is missing."""
    if checkpoint.vocoder is None:
        report.note(
            f"checkpoint '{checkpoint.name}' has no vocoder ({SETTINGS_FILE} and {WEIGHTS_FILE}), so there is nothing "
            "to hear; codes and scores are still written"
        )
    return checkpoint.vocoder


class Listening:
    """Writes recordings of results as they come, and the page of all recordings.

    Args:
        folder: the folder of the results; recordings of an item are in `sound/` of its own folder below it.
    """

    def __init__(self, checkpoint: Checkpoint, vocoder: Vocoder, folder: Path):
        self.checkpoint, self.vocoder, self.folder = checkpoint, vocoder, folder
        self.page = Page(TITLE)

    def receive(self, item: Item, result: CandidateResult, document: dict) -> list[str]:
        """Speak the kept candidates of a result, and add the names of their recordings to the rows of `document`.

        If the voice cannot be used or the vocoder fails, there are no recordings, and a note says why.

        Returns:
            The files that were written, below the item's folder.
        """
        assert item.voice is not None  # the item was spoken
        rows = [row for row in document["candidates"] if row["kept"]]
        try:
            if item.voice.mel is None:
                raise ValueError(
                    "a saved voice has no recording, which the vocoder needs; give its recordings to hear candidates"
                )
            candidates = [row["candidate"] for row in rows]
            sounds = spoken(self.checkpoint, self.vocoder, item.voice.mel, result, candidates)
            # Features refuse NaN and infinity from any vocoder, before anything is written.
            pictures = [mel_picture(self._mel(samples)) if len(samples) else None for samples in sounds]
        except ValueError as error:
            report.note(f"{f'{item.folder}: ' if item.folder else ''}nothing can be heard: {sentence(error)}")
            return []
        facts = [f"Voice: {Path(item.place).name}", *document["remarks"]]
        picture = data_url("image/png", mel_picture(item.voice.mel))
        section = self.page.add_section(Section(item.text, Path(item.place).name, facts, picture))
        folder = self.folder / item.folder / SOUND
        folder.mkdir(parents=True, exist_ok=True)
        digits = len(str(len(rows)))
        for row, samples, heard in zip(rows, sounds, pictures, strict=True):
            name = f"{SOUND}/rank-{row['rank']:0{digits}}.wav"
            seconds = len(samples) / self.vocoder.sampling_rate
            content = wav(samples, self.vocoder.sampling_rate)
            (self.folder / item.folder / name).write_bytes(content)
            row |= {"sound": name, "seconds": round(seconds, 3)}
            shown = None if heard is None else data_url("image/png", heard)
            self.page.add(section, row, seconds, data_url("audio/wav", content), shown)
        return [SOUND]

    def _mel(self, samples: np.ndarray) -> np.ndarray:
        """Return log-mel features `[bins, frames]` of the sound of any vocoder."""
        extractor = self.checkpoint.feature_extractor
        if self.vocoder.sampling_rate != extractor.sampling_rate:
            import soxr

            samples = soxr.resample(samples, self.vocoder.sampling_rate, extractor.sampling_rate)
        options = {"sampling_rate": extractor.sampling_rate, "padding": False, "max_length": len(samples)}
        return extractor(samples, return_tensors="np", **options)["input_features"][0]

    def write_page(self, shared: dict) -> list[str]:
        """Write the page, if there is any recording; `shared` has the fields of the run that all documents share."""
        if not any(section.candidates for section in self.page.sections):
            return []
        named = Path(self.checkpoint.name).name
        facts = {"checkpoint": named, **shared.get("settings", {}), **shared.get("versions", {})}
        self.page.settings = {name.replace("_", " "): str(value) for name, value in facts.items()}
        (self.folder / REPORT).write_text(self.page.html(), encoding="utf-8", errors="replace")
        if left_out := self.page.what_is_left_out:
            report.note(f"{REPORT} leaves {left_out} out, to keep its size; {SOUND} has all recordings")
        return [REPORT]


def spoken(
    checkpoint: Checkpoint, vocoder: Vocoder, mel: np.ndarray | None, result: CandidateResult, candidates: Sequence[int]
) -> list[np.ndarray]:
    """Return the sound of some candidates of a result, each `[samples]`; raise what the vocoder does.

    mel: the voice's log-mel; None: it has none, and the vocoder a voice of its own.
    """
    codes = [torch.from_numpy(result.codes[number, : result.lengths[number]]) for number in candidates]
    return vocoder.speak(
        [known_codes(row, checkpoint.model.config).numpy() for row in codes],
        torch.zeros(0) if mel is None else torch.from_numpy(mel),
        None if result.latents is None else [result.latents[number] for number in candidates],
    )


def wav(samples: np.ndarray, rate: int) -> bytes:
    """Return samples as a WAV file of 16 bits; no samples give one of silence, as some players refuse empty files."""
    import soundfile

    content = io.BytesIO()
    soundfile.write(content, samples if len(samples) else np.zeros(1, np.float32), rate, "PCM_16", format="WAV")
    return content.getvalue()


def mel_picture(mel: np.ndarray) -> bytes:
    """Draw log-mel `[bins, frames]` as a PNG with one pixel for each value, low bins at the bottom."""
    content = io.BytesIO()
    imsave(content, mel, cmap="magma", origin="lower", format="png")
    return content.getvalue()
