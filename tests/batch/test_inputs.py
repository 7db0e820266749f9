"""Corpora as files: the same rows in each form, rows that cannot be read, and the job's own copy."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clvp_fast.batch.inputs import RowFile, Task, digest_of, read_rows
from clvp_fast.batch.rows import Row
from tests.batch.jobs import records, write_jsonl


def write_csv(path, rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path, rows):
    pq.write_table(
        pa.Table.from_pylist(rows, pa.unify_schemas([pa.Table.from_pylist([row]).schema for row in rows])), path
    )
    return path


WRITERS = {".jsonl": write_jsonl, ".csv": write_csv, ".parquet": write_parquet}


@pytest.mark.parametrize("kind", WRITERS)
def test_forms(tmp_path, kind):
    given = records(30)
    given[4]["text"] = 'Two lines,\n"quoted", ünïcode 🙂.'
    given[5] |= {"seed": 2**62, "do_sample": False, "speaker": "ignored"}
    shares, unused = [], set()
    rows = list(read_rows(WRITERS[kind](tmp_path / f"corpus{kind.upper()}", given), shares.append, unused))
    assert rows == [Row.read(index, record, tmp_path) for index, record in enumerate(given)]
    assert rows[7].voice == str(tmp_path / "nowhere.wav") and rows[5].sampling == {"seed": 2**62, "do_sample": False}
    assert shares == sorted(shares) and shares[-1] == 1
    assert unused == {"speaker"}


def test_bad_lines_of_json(tmp_path):
    lines = [
        b'\xef\xbb\xbf{"id": 0, "text": "a"}',
        b"{",
        b"",
        b"[1]",
        b'{"id": 1, "text": "\xff"}',
        b'{"id": 2, "text": "b"}',
    ]
    (tmp_path / "corpus.jsonl").write_bytes(b"\r\n".join(lines))
    first, *bad, last = read_rows(tmp_path / "corpus.jsonl")
    assert (first.id, first.text, last.id, last.index) == ("0", "a", "2", 4)
    assert [row.index for row in bad] == [1, 2, 3] and all(row.id is None for row in bad)
    for row, line in zip(bad, (2, 4, 5), strict=True):
        assert row.error.startswith(f"line {line} is no JSON object such as")


def test_bad_lines_of_csv(tmp_path):
    lines = [b"\xef\xbb\xbfid, text ,voice", b"a,Hello.,", b"", b"b,Hello.", b"c,caf\xe9,", b"d,1,2,3", b'e,"x', b'y",']
    huge = b"f," + b"x" * 200_000 + b","
    (tmp_path / "corpus.csv").write_bytes(b"\r\n".join([*lines, huge, b"g,Bye.,"]))
    rows = list(read_rows(tmp_path / "corpus.csv"))
    assert [row.id for row in rows] == ["a", None, "c", None, "e", None, "g"]
    assert [row.index for row in rows] == list(range(7))
    assert rows[0].text == "Hello." and rows[4].text == "x\r\ny" and rows[6].text == "Bye."
    assert rows[1].error == "line 4 has 2 values, and the header 3"
    assert "text is not valid Unicode" in rows[2].error
    assert rows[3].error == "line 6 has 4 values, and the header 3"
    assert "line 9 is no row of CSV: field larger" in rows[5].error


@pytest.mark.parametrize("kind", [".csv", ".parquet"])
def test_missing_columns(tmp_path, kind):
    path = WRITERS[kind](tmp_path / f"corpus{kind}", [{"name": "a", "text": "Hello."}])
    with pytest.raises(ValueError, match=r"has no column 'id'; its columns are 'name', 'text'"):
        list(read_rows(path))


def test_damaged_parquet(tmp_path):
    path = write_parquet(tmp_path / "corpus.parquet", records(2000))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        list(read_rows(path))
    path.write_bytes(whole[:300] + bytes(200) + whole[500:])
    with pytest.raises(ValueError, match="is damaged from row"):
        list(read_rows(path))


def test_digest(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"x" * (1 << 20) + b"y")
    first = digest_of(path)
    assert first == digest_of(path)
    path.write_bytes(b"x" * (1 << 20) + b"z")
    assert digest_of(path) != first and len(first) == 32


def copy(tmp_path, rows, shard_rows):
    RowFile.write(tmp_path / "rows.parquet", rows, shard_rows)
    return RowFile(tmp_path / "rows.parquet")


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (1, [1]), (6, [6]), (7, [6, 1]), (18, [6, 6, 6])])
def test_copy(tmp_path, count, sizes):
    rows = [Row.read(index, record) for index, record in enumerate(records(count))]
    file = copy(tmp_path, iter(rows), 6)
    assert (file.num_rows, file.num_shards) == (count, len(sizes))
    assert [file.rows_of(shard) for shard in range(len(sizes))] == sizes
    assert [row for shard in range(len(sizes)) for row in file.shard(shard)] == rows


def test_copy_keeps_everything(tmp_path):
    rows = [
        Row(0, "a", "Hello.", "/voices/a.wav", {"seed": 2**63, "temperature": 0.1, "do_sample": False}),
        Row(1, None, error="line 2 is no JSON"),
        Row(2, "ünïcode 🙂\0", "two\nlines"),
    ]
    assert copy(tmp_path, rows, 2).shard(0) + copy(tmp_path, rows, 2).shard(1) == rows


def test_ids_that_come_again(tmp_path):
    rows = [Row(index, row_id, "Hello.") for index, row_id in enumerate(["a", "b", "a", None, "c", None, "b", "a"])]
    rows[6] = Row(6, "b", error="it has an error already")
    file = copy(tmp_path, rows, 3)
    found = [row for shard in range(3) for row in file.shard(shard)]
    errors = [row.error for row in found]
    assert errors[2] == errors[7] == "its id is also that of row 0: give each row one of its own"
    assert errors[6] == "it has an error already"
    assert [errors[i] for i in (0, 1, 3, 4, 5)] == [None] * 5
    assert [row.id for row in found] == [row.id for row in rows]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_damaged_copy(tmp_path):
    file = copy(tmp_path, [Row(i, f"{i}", "Hello." * i) for i in range(50)], 50)
    content = bytearray((tmp_path / "rows.parquet").read_bytes())
    content[60] ^= 0xFF
    (tmp_path / "rows.parquet").write_bytes(content)
    file = RowFile(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows\.parquet is damaged .* remove it, and it is made again"):
        file.shard(0)


def test_tasks(tmp_path):
    rng = np.random.default_rng(0)
    rows = [Row(index, f"{index}", "x" * int(rng.integers(1, 200))) for index in range(20)]
    file = copy(tmp_path, rows, 12)
    every = Task(1).rows_of(file)
    assert sorted(row.index for row in every) == list(range(12, 20))
    assert [len(row.text) // 32 for row in every] == sorted((len(row.text) // 32 for row in every), reverse=True)
    assert sorted(row.index for row in Task(1, (13, 19)).rows_of(file)) == [13, 19]


def test_bad_json_numbers_are_no_texts(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"id": 1, "text": float("nan")}) + "\n")
    (row,) = read_rows(path)
    assert row.error == "the row has no text"
