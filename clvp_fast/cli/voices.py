"""The voices of `generate`: their names in its results, and notes on their recordings."""

import os
import re
from pathlib import Path

from clvp_fast.cli.page import REPORT, SOUND
from clvp_fast.cli.report import note
from clvp_fast.engine.voice_files import LoadedVoice, load_voice
from clvp_fast.engine.voices import VoiceCache
from clvp_fast.io.files import user_path

# Names that a file system may confuse count as equal.
_PLAIN = re.compile(r"[^\w.-]+")

#: Names of results beside the folders of voices, from this run or from an earlier one with one voice.
TAKEN = (REPORT, SOUND, "summary.json", "candidates.json", "candidates.png", "codes.npz", "latents.npz")


def voice_names(places: list[str]) -> list[str]:
    """Return a folder name for each voice, from its file or folder; repeated names are numbered from 2.

    A name that a result has is numbered too.
    """
    names: list[str] = []
    for place in map(Path, places):
        path = Path(os.path.abspath(place))  # gives `..` and `.` a name
        name = base = _PLAIN.sub("-", path.name if path.is_dir() else path.stem).strip(".-") or "voice"
        number = 1
        while name.lower() in (*TAKEN, *(other.lower() for other in names)):
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return names


def noted_voice(voices: VoiceCache, place: str, crop_seed: int | None = None) -> LoadedVoice:
    """Load a voice, with a note for each of its remarks."""
    voice = load_voice(voices, place, crop_seed)
    for remark in voice.remarks:
        note(f"{user_path(place)}: {remark}")
    return voice
