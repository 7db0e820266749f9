"""Speech of the two voices on disk: clips, spectrograms for the codec, and codes of more and more sentences.

Every file depends only on its number, and is made if it is missing, so that an interrupt loses at most one file.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from clvp_fast.vocoder import Codec
from examples.train import texts, voices
from examples.train.state import STOP, averages_of, note, save_arrays

# The number of sentences in a file; the voices take turns.
SENTENCES = 200
# Clips of each voice that condition the decoder.
CLIPS = 24


def spoken(said: list[str], seed: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each sentence as a voice's number and log-mel `[80, frames]`, rounded to float16; the voices take turns."""
    for index, sentence in enumerate(said):
        STOP.check()
        number = index % len(voices.NAMES)
        yield number, voices.features(voices.voice(voices.NAMES[number])(sentence, seed + index)).half().float()


def speech_file(path: Path, said: list[str], seed: int) -> None:
    """Write log-mel of sentences, the voices taking turns: `[80, all frames]` float16, and where each ends."""
    mels = [mel.half().numpy() for _, mel in spoken(said, seed)]
    ends = np.cumsum([mel.shape[1] for mel in mels])
    save_arrays(path, mels=np.concatenate(mels, 1), ends=ends, said=np.array(said))


def make_speech(folder: Path, count: int) -> list[Path]:
    """Make `count` files of speech for the codec; some sentences are short, because words at the ends are hard."""
    paths = [folder / "speech" / f"{number:04d}.npz" for number in range(count)]
    for number, path in enumerate(paths):
        if not path.is_file():
            speech_file(path, texts.unique(1000 + number, SENTENCES, texts.UNSEEN), 1_000_000 * (number + 1))
    return paths


def read_speech(path: Path) -> list[tuple[int, torch.Tensor]]:
    """Yield pairs of a voice's number and log-mel `[80, frames]` float32."""
    with np.load(path) as kept:
        parts = np.split(kept["mels"], kept["ends"][:-1], axis=1)
    return [(index % 2, torch.from_numpy(part.astype(np.float32))) for index, part in enumerate(parts)]


def make_clips(folder: Path) -> torch.Tensor:
    """Make features of `CLIPS` clips of each voice, `[voices, CLIPS, 80, frames]`: each some sentences, cut to 6 s."""
    path = folder / "clips.npz"
    if not path.is_file():
        said = texts.unique(77, 4 * CLIPS, texts.UNSEEN)
        found = [[_clip(name, said[4 * index : 4 * index + 4]) for index in range(CLIPS)] for name in voices.NAMES]
        save_arrays(path, clips=np.stack([np.stack(clips) for clips in found]))
    with np.load(path) as kept:
        return torch.from_numpy(kept["clips"])


def _clip(name: str, said: list[str]) -> np.ndarray:
    return voices.clip_features(clip_samples(name, said)).numpy()


def clip_samples(name: str, said: list[str]) -> np.ndarray:
    """Return sentences in a voice, one after another, as float32 samples."""
    STOP.check()
    gap = np.zeros(voices.RATE // 8, dtype=np.float32)
    return np.concatenate([part for k, line in enumerate(said) for part in (voices.voice(name)(line, k), gap)])


def load_codec(folder: Path, codec: Codec) -> Codec:
    """Load the latest training into `codec`."""
    codec.load_state_dict(averages_of(folder / "codec.pt"))
    return codec.eval()


def codes_file(path: Path, said: list[str], mels: Iterable[tuple[int, torch.Tensor]], codec: Codec) -> None:
    """Write codes of sentences that are spoken in `mels`: int16 of all, and where each ends."""
    codes = [codec.codes_of(mel[None])[0].short().numpy() for _, mel in mels]
    save_arrays(path, codes=np.concatenate(codes), ends=np.cumsum([len(row) for row in codes]), said=np.array(said))


def read_codes(path: Path) -> list[tuple[int, str, torch.Tensor]]:
    """Yield triples of a voice's number, the sentence, and codes `[length]` int64."""
    with np.load(path) as kept:
        rows, said = np.split(kept["codes"].astype(np.int64), kept["ends"][:-1]), kept["said"].tolist()
    return [
        (index % 2, sentence, torch.from_numpy(row))
        for index, (sentence, row) in enumerate(zip(said, rows, strict=True))
    ]


def make_held_out(folder: Path, codec: Codec) -> list[tuple[int, str, torch.Tensor]]:
    """Make codes of the sentences that are watched during training."""
    path = folder / "held_out.npz"
    if not path.is_file():
        held_out_file(path, texts.HELD_OUT, codec)
    return read_codes(path)


def held_out_file(path: Path, said: list[str], codec: Codec) -> None:
    """Write codes of the first sentences of `texts.HELD_OUT`."""
    codes_file(path, said, spoken(said, 900_000_000), codec)


def _fresh(number: int) -> tuple[list[str], int]:
    """Return the sentences of file `number` of the stream, and the seed of their speech."""
    said = texts.Writer(1_000_000 + number).sentences(texts.UNSEEN)
    return [next(said) for _ in range(SENTENCES)], 2_000_000_000 + number * SENTENCES


def speak_ahead(folder: Path, count: int, enough: Callable[[], bool]) -> None:
    """Make the speech of files 0 to `count` of the stream, until it is `enough`."""
    for number in range(count):
        if enough():
            break
        path = _ahead(folder, number)
        if not path.is_file() and not _codes(folder, number).is_file():
            speech_file(path, *_fresh(number))


def stream_codes(folder: Path, codec: Codec, count: int) -> None:
    """Write files of codes 0 to `count`, each of fresh sentences, and remove the speech that was made ahead."""
    for number in range(count):
        path, ahead = _codes(folder, number), _ahead(folder, number)
        if not path.is_file():
            said, seed = _fresh(number)
            codes_file(path, said, read_speech(ahead) if ahead.is_file() else spoken(said, seed), codec)
            if number % 20 == 19:
                note(folder, stage="stream", sentences=(number + 1) * SENTENCES)
        ahead.unlink(missing_ok=True)


def _ahead(folder: Path, number: int) -> Path:
    return folder / "ahead" / f"{number:05d}.npz"


def _codes(folder: Path, number: int) -> Path:
    return folder / "codes" / f"{number:05d}.npz"


class Corpus:
    """The existing codes, by the length of their text, and how often each was used."""

    def __init__(self, folder: Path, ids_of: Callable[[str], list[int]]):
        self.folder, self.ids_of = folder / "codes", ids_of
        self.items: list[tuple[int, str, torch.Tensor]] = []
        self.ids: list[torch.Tensor] = []
        self.by_length: dict[int, list[int]] = {}
        self.taken = np.zeros(0, dtype=np.int64)
        self._read: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Read files that were made since."""
        for path in sorted(self.folder.glob("*.npz")):
            if path.name in self._read:
                continue
            self._read.add(path.name)
            for item in read_codes(path):
                ids = torch.tensor(self.ids_of(item[1]))
                self.by_length.setdefault(len(ids), []).append(len(self.items))
                self.items.append(item)
                self.ids.append(ids)
        grown = np.zeros(len(self.items), dtype=np.int64)
        grown[: len(self.taken)] = self.taken
        self.taken = grown

    def batch(self, random: np.random.Generator, count: int) -> list[int]:
        """Return `count` items of one text length, or at least half as many, the least used ones first."""
        while True:
            some = int(random.integers(len(self.items)))
            same = np.array(self.by_length[len(self.ids[some])])
            if len(same) >= min(count // 2, len(self.items) // 40):
                break
        order = np.argsort(self.taken[same] + random.random(len(same)))[:count]
        chosen = same[order]
        self.taken[chosen] += 1
        return chosen.tolist()

    def __len__(self) -> int:
        return len(self.items)


def each_voice(items) -> Iterator[list]:
    """Yield items of the first voice, then of the second."""
    for number in range(len(voices.NAMES)):
        yield [item for item in items if item[0] == number]
