"""Rows of every kind through a job over an engine without a model: each row is spoken or failed, once, always."""

import csv
import json
import math
import random
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clvp_fast.batch import job
from clvp_fast.batch.failures import LONGEST
from clvp_fast.batch.inputs import read_rows
from tests.batch.jobs import VOICE, assert_whole, failures, results

_TEXTS = (
    "Hello.",
    "",
    " ",
    "東京 is big.",
    "🙂",
    "\u2028",
    "a\0b",
    "x" * 3000,
    '5" wide',
    "one, two\nthree\r\nfour",
    "'\"",
)
_IDS = ("", "a/b", "../up", "\0", "é", " ", "nan", "x" * 2000)
_VOICES = ("", str(VOICE), "nowhere.wav", "~draft.wav", "~", "/dev/null", ".", "x" * 5000, "a\0b", "\udcff")
_NUMBERS = ("", 0, 1, -1, 2, 0.5, 10**12, 10**22, -(2**70), 1e308, math.inf, "1e999", "many", "0x10", "١", True, " 3 ")
_NAMES = ("num_candidates", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "do_sample", "min_p")
_ODD = (None, [], [1], {}, {"bytes": None}, {"a": {"b": [1]}}, False, math.nan)


def record(rng: random.Random, index: int) -> dict:
    """Make a row, mostly good, with one or two strange values."""
    row = {"id": f"row-{index}", "text": "Hello.", "voice": str(VOICE)}
    for _ in range(rng.choice((0, 0, 1, 2))):
        name = rng.choice(("id", "text", "voice", *_NAMES))
        row[name] = rng.choice({"id": _IDS, "text": _TEXTS, "voice": _VOICES}.get(name, _NUMBERS))
    return row


def json_lines(path, rng, count):
    """Write values of other types, and lines that are torn, twice-named and deeply nested."""
    lines = []
    for index in range(count):
        row = record(rng, index)
        if rng.random() < 0.1:
            row[rng.choice(("id", "text", "voice", *_NAMES))] = rng.choice(_ODD)
        line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode(errors="surrogateescape")
        if rng.random() < 0.1:
            cut = line[: rng.randrange(1, len(line))]
            line = rng.choice(
                (cut, b"[" * 5000, b"null", b"\xff" + line, line[:-1] + b', "id": 1}', cut + b"\0" + line)
            )
        lines.append(line)
    path.write_bytes(b"\n".join(lines))


def csv_rows(path, rng, count):
    """Write rows that are too long and too short, and quotes that are not doubled."""
    names = ("id", "text", "voice", *_NAMES)
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for index in range(count):
            row = record(rng, index)
            values = [row.get(name, "") for name in names]
            spoilt = rng.random()
            # A row of several lines with too few or too many values is none that can be told from an open quote.
            whole = any("\n" in str(value) for value in values)
            if spoilt < 0.05:
                file.write(f'row-{index},"He said "no"",{VOICE}\r\n')
            else:
                ragged = values[:-1] if spoilt < 0.1 else values + [1] if spoilt < 0.15 else values
                writer.writerow(values if whole else ragged)


def parquet_rows(path, rng, count):
    """Write columns of several types, in many row groups."""
    rows = [record(rng, index) for index in range(count)]
    for row in rows:
        row |= {name: value.encode(errors="replace").decode() for name, value in row.items() if isinstance(value, str)}
    content = VOICE.read_bytes()
    cells = [rng.choice((content, content[:99], b"nowhere.wav", b"\xff", None)) for _ in rows]
    table = {
        "id": pa.array([row["id"] for row in rows], rng.choice((pa.string(), pa.binary(), pa.large_string()))),
        "text": pa.array([row["text"].encode() for row in rows], rng.choice((pa.binary(), pa.large_binary()))),
        "voice": pa.array([{"bytes": cell, "path": row["voice"]} for cell, row in zip(cells, rows, strict=True)]),
        "seed": pa.array([rng.choice((None, rng.getrandbits(64))) for _ in rows], pa.uint64()),
        "top_k": pa.array([rng.choice((None, Decimal("3.00"), Decimal(10) ** 25)) for _ in rows], pa.decimal128(38, 2)),
        "temperature": pa.array([rng.choice((None, 0.5, math.nan, -1.0, math.inf)) for _ in rows], pa.float16()),
        "num_candidates": pa.array([rng.choice(("1", "2", "0", "", "many")) for _ in rows]).dictionary_encode(),
    }
    pq.write_table(pa.table(table), path, row_group_size=37)


FORMS = {".jsonl": json_lines, ".csv": csv_rows, ".parquet": parquet_rows}


@pytest.mark.parametrize("suffix", FORMS)
@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_rows_in_are_rows_spoken_and_rows_failed(tmp_path, null_job, suffix, count):
    source, out = tmp_path / f"corpus{suffix}", tmp_path / "out"
    FORMS[suffix](source, random.Random(count), count)
    expected = len(list(read_rows(source, keep=lambda content: tmp_path / "kept")))
    assert expected >= count * 0.99  # a torn line of JSON may hold nothing
    options = {"shard_rows": 64, "progress": False, "num_candidates": 2, "max_new_tokens": 4, "voice": VOICE}
    summary = job.run(source, out, **options)
    assert_whole(out, expected)
    assert summary["rows"] == expected == summary["spoken"] + summary["failed"]
    assert summary["spoken"] > count / 16 and summary["failed"] > count / 16
    assert all(len(failure["error"]) <= LONGEST for failure in failures(out))
    assert (out / "failures.jsonl").stat().st_size < (LONGEST + 3000) * summary["failed"]
    before = results(out), failures(out)
    assert job.run(source, out, **options)["this_run"]["rows"] == 0
    assert (results(out), failures(out)) == before
