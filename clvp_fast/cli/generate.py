"""`clvp-fast generate`: turns texts and voices into ranked candidates, with codes, scores and pictures."""

import argparse
import time
from contextlib import ExitStack
from pathlib import Path

from clvp_fast.cli import report
from clvp_fast.cli.generation import Generation
from clvp_fast.cli.inputs import load_for, sampling_for, sampling_of
from clvp_fast.cli.items import check_first, gather, read_texts
from clvp_fast.cli.listen import REPORT
from clvp_fast.cli.results import remove_stale
from clvp_fast.io.files import staged_folder, user_path


def run(arguments: argparse.Namespace) -> None:
    given = sampling_of(arguments)
    voice_file = _voice_file(arguments)
    texts = read_texts(arguments)
    check_first(texts, arguments)
    with ExitStack() as staging:
        folder = staging.enter_context(staged_folder(arguments.out))
        voice_folder = staging.enter_context(staged_folder(voice_file.parent)) if voice_file else None
        started = time.perf_counter()
        checkpoint = load_for(arguments)
        sampling = sampling_for(checkpoint, given)
        if arguments.keep and sampling.num_candidates and arguments.keep > sampling.num_candidates:
            report.note(f"--keep {arguments.keep}: there are {sampling.num_candidates} candidates, and all are kept")
        items = gather(checkpoint, texts, arguments)
        generation = Generation(checkpoint, items, sampling, folder, arguments)
        generation.seconds["load"] = time.perf_counter() - started
        document = generation.run()
        if voice_file and voice_folder:
            spoken_in = items[0].voice
            assert spoken_in is not None  # the only voice; a bad one would have ended the run
            spoken_in.voice.save(voice_folder / voice_file.name)
        names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    remove_stale(Path(arguments.out), names)
    # The summary of several items names the folders.
    files = generation.files
    if "requests" in document and not arguments.json:
        files = [name for name in files if name in ("summary.json", REPORT)]
    written = [Path(arguments.out, name) for name in files] + ([voice_file] if voice_file else [])
    _tell(document, written, arguments.json)
    failed = sum(item.error is not None for item in items)
    if failed:
        raise ValueError(f"{failed} of {len(items)} requests failed, and the notes name each; the others are written")


def _voice_file(arguments: argparse.Namespace) -> Path | None:
    """Return the path where the voice is saved, or None."""
    if not arguments.save_voice:
        return None
    if len(arguments.voice) > 1:
        raise ValueError(f"--save-voice saves one voice, and {len(arguments.voice)} are given; name one --voice")
    path = user_path(arguments.save_voice)
    if path.is_dir():
        raise ValueError(f"--save-voice needs a file, and {path} is a folder; name a file in it")
    return path


def _tell(document: dict, written: list[Path], as_json: bool) -> None:
    if as_json:
        report.print_json(document | {"written": [str(path) for path in written]})
        return
    if "requests" in document:
        rows = [row["best"] for row in document["requests"] if row["best"]]
        report.print_summary(document["requests"])
    else:
        rows = document["candidates"]
        report.print_ranking(rows)
    if not all(row["stopped"] for row in rows):
        limit = document["settings"]["max_new_tokens"]
        report.note(f"tokens marked + : cut at {limit} tokens before the candidate came to its end")
    report.print_written(written)
