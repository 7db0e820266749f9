"""The files that `generate` writes for a text in a voice: codes, scores, picture, latents; and its row in a summary."""

import re
from pathlib import Path

import numpy as np

from clvp_fast.checkpoint import Checkpoint
from clvp_fast.cli import report
from clvp_fast.cli.items import Item
from clvp_fast.cli.page import REPORT, SOUND, is_page
from clvp_fast.cli.pictures import draw_candidates
from clvp_fast.engine.requests import CandidateResult
from clvp_fast.models.clvp.text_remarks import text_remarks
from clvp_fast.models.clvp.tokens import finished_codes


def result_document(checkpoint: Checkpoint, item: Item, result: CandidateResult) -> dict:
    """Build the content of candidates.json for one result: the candidates, best first, and the engine's timings."""
    assert item.voice is not None  # the item was spoken
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
    """Write codes.npz, best candidate first, and the other files that are asked for; return their names.

    Args:
        rows: the candidates, as in candidates.json.
        length: the length of the codes that are written.
    """
    kept = np.asarray(result.kept)
    np.savez_compressed(
        folder / "codes.npz",
        # For the next stage: from the stop token on as Tortoise fixes them; a candidate that was cut keeps its own end.
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
        # Latents `[1, tokens, hidden_size]` are named by the number of the candidate.
        latents = {str(candidate): states.cpu().numpy() for candidate, states in result.latents.items()}
        np.savez(folder / "latents.npz", **latents)
        written.append("latents.npz")
    return written


def remove_stale(out: Path, names: set[str]) -> None:
    """Remove files of an earlier run that do not belong to new results, with a note.

    These are old recordings, pictures and latents beside new codes, and the page of an earlier run.

    Args:
        names: the files of this run, below `out`.
    """
    found = [out / REPORT] if is_page(out / REPORT) else []
    for folder in {(out / name).parent for name in names if Path(name).name == "codes.npz"}:
        found += [path for name in ("candidates.png", "latents.npz") if (path := folder / name).is_file()]
        found += [path for path in folder.glob(f"{SOUND}/rank-*.wav") if re.fullmatch(r"rank-\d+\.wav", path.name)]
    stale = sorted(path for path in found if str(path.relative_to(out)) not in names)
    for path in stale:
        path.unlink()
        if path.parent.name == SOUND and not any(path.parent.iterdir()):
            path.parent.rmdir()
    if stale:
        more = f" and {len(stale) - 1} more" if len(stale) > 1 else ""
        report.note(f"{stale[0]}{more} of an earlier run no longer belonged to the results and was removed")


def summary_row(item: Item, document: dict | None) -> dict:
    """Build an item's row in the summary: its best candidate, or its error."""
    row = {"folder": item.folder, "text": item.text, "voice": item.place, "error": item.error, "best": None}
    if document is not None:
        best = document["candidates"][0]
        row["best"] = {key: best[key] for key in ("candidate", "tokens", "score", "stopped")}
        row["timings"] = document["timings"]
    return row
