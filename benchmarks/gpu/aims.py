"""The aims of kernels, as docs/kernels.md has them, beside the measurements.

An aim is stated for `BANDWIDTH`; on a card whose copies run at another rate, which is measured, it is so much longer.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cost.devices import H200
from benchmarks.document import seconds
from benchmarks.gpu.journal import Journal
from benchmarks.harness import ROOT, newest_rows, source
from benchmarks.machine import bandwidth

DOCUMENT = ROOT / "docs/kernels.md"
#: Bytes a second for which the aims are stated: those of an H200's memory.
BANDWIDTH = H200.sheet_bytes_per_s


@dataclass(frozen=True)
class Aim:
    """workload, shape, provider: of the row; `shape` is what its shape must have. seconds: at `BANDWIDTH`. why: where
    the number comes from.
    """

    workload: str
    shape: dict
    provider: str
    seconds: float
    why: str

    @property
    def words(self) -> str:
        return f"{self.workload}, {', '.join(f'{name} {value}' for name, value in self.shape.items())}"


AIMS = (
    Aim("log_mel", {"clips": 1024}, "clvp_fast kernel", 0.6e-3, "711 MB, and the arithmetic in their shadow"),
    Aim(
        "window_attention",
        {"side": 64, "shift": 0},
        "clvp_fast kernel",
        168e-6 / 0.78,
        "805 MB, 168 µs, at 78 % of the memory's rate",
    ),
    Aim(
        "decode_step",
        {"candidates": 1},
        "clvp_fast bfloat16, one launch, captured",
        206e-6,
        "772 MB of weights, 161 µs, at 78 % of the memory's rate",
    ),
    Aim("generate", {"candidates": 256, "new_tokens": 500}, "clvp_fast engine, bfloat16", 1.3, "1.03 s of bytes"),
)


def table(folder: Path, card: str, journal: Journal) -> str:
    """Write each aim, scaled to the card, beside its newest row of this code in `folder`, or why there is none."""
    rows = [row for row in newest_rows(folder) if row["device"]["name"] == card and row["source"] == source()]
    lines = [
        f"| aim, scaled to {card} | provider | aim | measured | measured / aim |",
        "|---|---|---|---|---|",
    ]
    ends = [line for line in journal.lines() if line["event"] == "end"]
    for aim in AIMS:
        row = next((row for row in rows if _is_of(row, aim)), None)
        cells = [aim.words, aim.provider]
        if row is None:
            why = "no row" + next((f": {_told(end)}" for end in reversed(ends) if is_of(end["item"], aim)), "")
            lines.append(f"| {' | '.join([*cells, f'{seconds(aim.seconds)} at 4.8 TB/s', why, ''])} |")
            continue
        scaled = aim.seconds * BANDWIDTH / bandwidth(row["device"])
        median = row["seconds"] and row["seconds"]["median"]
        found = [seconds(median), f"{median / scaled:.2f}"] if median else [row["refused"], ""]
        rate = f"{bandwidth(row['device']) / 1e12:.2f} TB/s"
        lines.append(f"| {' | '.join([*cells, f'{seconds(scaled)} at {rate}', *found])} |")
    return "\n".join(lines) + "\n"


def _is_of(row: dict, aim: Aim) -> bool:
    same = row["workload"] == aim.workload and row["provider"] == aim.provider
    return same and all(row["shape"].get(name) == value for name, value in aim.shape.items())


def is_of(item: str, aim: Aim) -> bool:
    """Tell by its name whether an item is the measurement of an aim."""
    found = re.fullmatch(rf"{aim.workload} ({{.*}}) {re.escape(aim.provider)}", item)
    return found is not None and aim.shape.items() <= json.loads(found[1]).items()


def _told(end: dict) -> str:
    """Write an item's result in one cell."""
    first = next(iter(end["why"].strip().splitlines()), "")
    return f"{end['outcome']} ({first[:200]})".replace("|", "\\|")


def in_document() -> str:
    """Return the aims that docs/kernels.md has."""
    lines = ["| what | provider | aim | from |", "|---|---|---|---|"]
    lines += [f"| {aim.words} | {aim.provider} | {seconds(aim.seconds)} | {aim.why} |" for aim in AIMS]
    return "\n".join(lines)
