"""The files of a text in a voice that `generate` writes: codes, scores, picture, latents; and a row in a summary."""

from pathlib import Path

import numpy as np

from clvp_fast.checkpoint import Checkpoint
from clvp_fast.cli import report
from clvp_fast.cli.items import Item
from clvp_fast.cli.pictures import draw_candidates
from clvp_fast.engine.requests import CandidateResult
from clvp_fast.models.clvp.text_remarks import text_remarks
from clvp_fast.models.clvp.tokens import finished_codes


def result_document(checkpoint: Checkpoint, item: Item, result: CandidateResult) -> dict:
    """Build the content of candidates.json for one result: the candidates, best first, and the engine's timings."""
    assert item.voice is not None  # it was spoken in
    rows = report.ranking(result.scores, result.lengths, result.stopped)
    for row in rows:
        row["kept"] = row["rank"] <= len(result.kept)
    return {
        "text": item.text,
        "voice": item.place,
        "checkpoint": checkpoint.name,
        "remarks": [*item.voice.remarks, *text_remarks(checkpoint.tokenizer, item.text)],
        "candidates": rows,
        "timings": {name: round(seconds, 3) for name, seconds in result.timings.items()},
    }


def write_arrays(
    folder: Path,
    checkpoint: Checkpoint,
    item: Item,
    result: CandidateResult,
    rows: list[dict],
    length: int,
    pictures: bool,
) -> list[str]:
    """Writes codes.npz, best candidate first, and what else is asked for; returns the names.

    Args:
        rows: of the candidates, as in candidates.json.
        length: of the codes that are written.
    """
    kept = np.asarray(result.kept)
    np.savez_compressed(
        folder / "codes.npz",
        # As the next stage takes them, from the stop on as Tortoise fixes them; one that was cut keeps its own end.
        codes=finished_codes(list(result.codes[kept]), length, checkpoint.model.config.decoder_config).numpy(),
        lengths=result.lengths[kept],
        scores=result.scores[kept],
        candidates=kept,
    )
    written = ["codes.npz"]
    if pictures:
        assert item.voice is not None  # as above
        draw_candidates(folder / "candidates.png", item.voice, checkpoint.feature_extractor, rows, item.text)
        written.append("candidates.png")
    if result.latents is not None:
        # A candidate's latents `[1, tokens, hidden_size]` are named by its number.
        latents = {str(candidate): states.cpu().numpy() for candidate, states in result.latents.items()}
        np.savez(folder / "latents.npz", **latents)
        written.append("latents.npz")
    return written


def summary_row(item: Item, document: dict | None) -> dict:
    """Build the row of an item in the summary: its best candidate, or why it has none."""
    row = {"folder": item.folder, "text": item.text, "voice": item.place, "error": item.error, "best": None}
    if document is not None:
        best = document["candidates"][0]
        row["best"] = {key: best[key] for key in ("candidate", "tokens", "score", "stopped")}
        row["timings"] = document["timings"]
    return row
