"""Corpora as files: the same rows in each form, rows that cannot be read, and the job's own copy."""

import csv
import json
import os
from decimal import Decimal
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clvp_fast.batch.inputs import RowFile, Task, digest_of, read_rows
from clvp_fast.batch.rows import Row
from tests.batch.jobs import VOICE, records, write_jsonl


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
        assert row.error.startswith(f"{tmp_path / 'corpus.jsonl'}, line {line}: no JSON object such as")


def nested(depth: int) -> str:
    return '{"id": "a", "text": "[[{{", "more": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}"


def test_lines_of_json_that_cannot_be_told(tmp_path):
    """Names that come twice, and nesting beyond a bound, which Python's reader would not survive."""
    path = tmp_path / "corpus.jsonl"
    lines = [
        '{"id": "a", "text": "b", "text": "c"}',
        nested(65),
        nested(100_000),
        '{"id": ' + "1" * 5000 + "}",
        nested(64),
    ]
    path.write_text("\n".join(lines))
    *bad, last = read_rows(path)
    said = ["it has 'text' twice", "it nests more than 64 deep", "it nests more than 64 deep", "digits"]
    assert len(bad) == len(said) and last.error is None
    for number, (row, reason) in enumerate(zip(bad, said, strict=True), start=1):
        assert f"corpus.jsonl, line {number}: " in row.error and reason in row.error


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_utf_16(tmp_path, suffix):
    path = tmp_path / f"corpus{suffix}"
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):  # with a mark, and without
        path.write_bytes("id,text\na,b\n".encode(encoding))
        with pytest.raises(ValueError, match="is UTF-16: save it as UTF-8"):
            list(read_rows(path))


def test_bad_lines_of_csv(tmp_path):
    lines = [b"\xef\xbb\xbfid, text ,voice", b"a,Hello.,", b"", b"b,Hello.", b"c,caf\xe9,", b"d,1,2,3", b'e,"x', b'y",']
    huge = b"f," + b"x" * 200_000 + b","
    (tmp_path / "corpus.csv").write_bytes(b"\r\n".join([*lines, huge, b"g,Bye.,"]))
    rows = list(read_rows(tmp_path / "corpus.csv"))
    assert [row.id for row in rows] == ["a", None, "c", None, "e", None, "g"]
    assert [row.index for row in rows] == list(range(7))
    assert rows[0].text == "Hello." and rows[4].text == "x\r\ny" and rows[6].text == "Bye."
    assert rows[1].error == f"{tmp_path / 'corpus.csv'}, line 4: 2 values, and the header has 3"
    assert "text is not valid Unicode" in rows[2].error
    assert rows[3].error == f"{tmp_path / 'corpus.csv'}, line 6: 4 values, and the header has 3"
    assert "corpus.csv, line 9: no row of CSV: field larger" in rows[5].error


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('id,text\na,Hello.\nb,"open\nc,Bye.\n', 3),  # to the end of the file
        ('id,text\na,"open\nb,"Hello."\nc,Bye.\n', 2),  # to a quote in another row
        ('id,text\na,"open\nb,"",""\n', 2),  # to what looks like the end of a value
        ('id,text\na,Hello.\nb,"open' + "\nc,Bye." * 40_000, 3),  # beyond the longest value
        ('"id,text\na,Hello.\n', 1),
        ('id,text,voice\na,"x"y,"open\nb,c,d"\ne,f,\n', 2),  # behind what is wrong already
        ('id,text\na,Hello.\nb,"one\ntwo",x\nc,Bye.\n', 3),  # closed, and a value too many
    ],
)
def test_quotes_that_swallow_rows(tmp_path, content, line):
    """Which rows there are cannot be told, so that none is taken."""
    (tmp_path / "corpus.csv").write_text(content)
    with pytest.raises(ValueError, match=rf"corpus\.csv, line {line}: .*is a quote in the row that begins there"):
        list(read_rows(tmp_path / "corpus.csv"))


def test_quotes_inside_of_values(tmp_path):
    """One that is not doubled fails its own row, and one in a value without quotes is part of it."""
    (tmp_path / "corpus.csv").write_text('id,text\na,"He said "hi" to me"\nb,5" wide\nc,"He said ""hi"""\n')
    first, *others = read_rows(tmp_path / "corpus.csv")
    assert "corpus.csv, line 2: no row of CSV" in first.error
    assert [row.text for row in others] == ['5" wide', 'He said "hi"']


@pytest.mark.parametrize("header", ["id,text,text", "id,text,id", "id, text,text ,voice", "id,text,seed,seed"])
def test_doubled_columns(tmp_path, header):
    (tmp_path / "corpus.csv").write_text(f"{header}\na,b,c,d\n")
    with pytest.raises(ValueError, match=r"corpus\.csv has the column '(id|text|seed)' twice"):
        list(read_rows(tmp_path / "corpus.csv"))
    names = [name.strip() for name in header.split(",")]
    pq.write_table(pa.table([["a"]] * len(names), names), tmp_path / "corpus.parquet")
    with pytest.raises(ValueError, match=r"corpus\.parquet has the column '(id|text|seed)' twice"):
        list(read_rows(tmp_path / "corpus.parquet"))


def test_doubled_columns_that_say_nothing(tmp_path):
    (tmp_path / "corpus.csv").write_text("id,text,,\na,b,,\n")
    assert [row.text for row in read_rows(tmp_path / "corpus.csv")] == ["b"]


@pytest.mark.parametrize("sign", [";", "\t", "|"])
def test_other_separators(tmp_path, sign):
    (tmp_path / "corpus.csv").write_text(f"id{sign}text\na{sign}Hello.\n")
    with pytest.raises(ValueError, match=r"has no column 'id'; .*; separate values by commas, not by ") as caught:
        list(read_rows(tmp_path / "corpus.csv"))
    assert str(caught.value).endswith(repr(sign))


def test_ends_of_lines(tmp_path):
    """Blank lines are none, before the header either; carriage returns alone make one line of the file."""
    path = tmp_path / "corpus.csv"
    path.write_bytes(b"\n\r\nid,text\r\n\r\r\na,Hello.\n")
    assert [row.text for row in read_rows(path)] == ["Hello."]
    path.write_bytes(b"id,text\na,Hel\rlo.\nb,Bye.\n")
    first, second = read_rows(path)
    assert first.error == f"{path}, line 2: no row of CSV: a carriage return stands outside of quotes"
    assert second.text == "Bye."
    for content in (b"id,text\ra,Hello.\r", b"id,text\ra,Hello."):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="ends its lines with carriage returns alone: save it with newlines"):
            list(read_rows(path))
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"id": 1, "text": "a"}\r{"id": 2, "text": "b"}')
    with pytest.raises(ValueError, match="ends its lines with carriage returns alone"):
        list(read_rows(path))
    path.write_bytes(b'{"id": 1,\r"text": "a"}\r\n{"id": 2, "text": "b"}')
    assert [row.text for row in read_rows(path)] == ["a", "b"]


def test_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "corpus.jsonl")
    with pytest.raises(ValueError, match=r"corpus\.jsonl is a pipe or a device, .*: give a file"):
        list(read_rows(tmp_path / "corpus.jsonl"))


def test_beside_a_link(tmp_path):
    """As from a store of blobs: voices are looked for where the link is."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/rows.jsonl").symlink_to(
        write_jsonl(tmp_path / "blobs/f00", [{"id": "a", "text": "b", "voice": "a.wav"}])
    )
    (row,) = read_rows(tmp_path / "corpus/rows.jsonl")
    assert row.voice == str(tmp_path / "corpus/a.wav")


def test_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder: give a file of rows"):
        list(read_rows(tmp_path))


KINDS = {
    "id": [
        (pa.array([b"a", b"b"], pa.binary()), ["a", "b"]),  # Spark
        (pa.array(["a", "b"], pa.large_string()), ["a", "b"]),  # pandas, polars
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),  # categories of pandas
        (pa.array(["a", "b"], pa.string_view()), ["a", "b"]),
        (pa.array([UUID(int=1), UUID(int=2)], pa.uuid()), [str(UUID(int=1)), str(UUID(int=2))]),  # DuckDB
        (pa.array([UUID(int=1).bytes, UUID(int=2).bytes], pa.binary(16)), [str(UUID(int=1)), str(UUID(int=2))]),
        (pa.array([Decimal(1), Decimal(2)], pa.decimal128(18, 0)), ["1", "2"]),
        (pa.array([1, 2], pa.uint64()), ["1", "2"]),
    ],
    "text": [
        (pa.array([b"a", "é".encode()], pa.large_binary()), ["a", "é"]),
        (pa.array(["a", "é"]).dictionary_encode(), ["a", "é"]),
    ],
    "temperature": [
        (pa.array([Decimal("0.70"), None], pa.decimal128(5, 2)), [0.7, None]),
        (pa.array([0.5, None], pa.float16()), [0.5, None]),
    ],
    "num_candidates": [
        (pa.array([Decimal("4.00"), None], pa.decimal128(5, 2)), [4, None]),
        (pa.array([4, None], pa.int8()), [4, None]),
    ],
    "do_sample": [(pa.array([1.0, 0.0]), [True, False]), (pa.array([True, False]), [True, False])],
}


@pytest.mark.parametrize("name", KINDS)
def test_types_of_parquet(tmp_path, name):
    """As DuckDB, Spark, pandas and datasets write them."""
    for column, expected in KINDS[name]:
        table = {"id": pa.array(["x", "y"]), "text": pa.array(["Hello."] * 2)} | {name: column}
        pq.write_table(pa.table(table), tmp_path / "corpus.parquet", store_schema=column.type != pa.binary(16))
        rows = list(read_rows(tmp_path / "corpus.parquet"))
        assert [row.error for row in rows] == [None, None], column.type
        found = [getattr(row, name, None) if name in ("id", "text") else row.sampling.get(name) for row in rows]
        assert found == expected and list(map(type, found)) == list(map(type, expected)), column.type


def test_text_of_parquet_that_is_no_utf_8(tmp_path):
    """Each row fails for itself, also where the column is said to be text."""
    texts = pa.array([b"a", b"\xff", b"c"], pa.binary())
    for column in (texts, pa.Array.from_buffers(pa.string(), 3, texts.buffers())):
        pq.write_table(pa.table({"id": ["x", "y", "z"], "text": column}), tmp_path / "corpus.parquet")
        rows = list(read_rows(tmp_path / "corpus.parquet"))
        assert [row.text for row in rows] == ["a", None, "c"]
        assert rows[1].id == "y" and "text is not valid Unicode" in rows[1].error


def test_values_of_parquet_that_python_cannot_say(tmp_path):
    """A path that is no UTF-8 beside a recording's bytes, or a number of another kind: the row fails alone."""
    names = pa.array([b"a.wav", b"\xff", b"c.wav"], pa.binary())
    paths = pa.Array.from_buffers(pa.string(), 3, names.buffers())
    voice = pa.StructArray.from_arrays([pa.array([VOICE.read_bytes()] * 3), paths], ["bytes", "path"])
    path = tmp_path / "corpus.parquet"
    pq.write_table(pa.table({"id": ["x", "y", "z"], "text": ["a", "b", "c"], "voice": voice}), path)
    rows = list(read_rows(path, keep=lambda content: tmp_path / "kept"))
    assert [row.id for row in rows] == ["x", "y", "z"] and [row.error is None for row in rows] == [True, False, True]
    assert rows[1].error.startswith("voice cannot be read: 'utf-8' codec can't decode byte 0xff")

    seeds = pa.array([None, 2**55, 3], pa.timestamp("ms"))
    pq.write_table(pa.table({"id": ["x", "y", "z"], "text": ["a", "b", "c"], "seed": seeds}), path)
    rows = list(read_rows(path))
    assert rows[0].error is None and rows[1].id == "y" and rows[1].error.startswith("seed cannot be read: ")
    assert rows[2].error.startswith("seed must be a number, not datetime.datetime(")


def test_recordings_in_cells(tmp_path):
    """`bytes` win over `path`, as in datasets; a path alone, or bytes that are a path, are as good as text."""
    content = VOICE.read_bytes()
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    given = [{"bytes": content, "path": "a.wav"}, {"bytes": None, "path": "a.wav"}, {"bytes": None, "path": None}, None]
    kept = []

    def keep(found):
        kept.append(found)
        return tmp_path / "kept"

    def read(column, keep=keep):
        table = pa.table({"id": list("abcd"), "text": ["Hello."] * 4, "voice": column})
        pq.write_table(table, tmp_path / "corpus.parquet")
        return list(read_rows(tmp_path / "corpus.parquet", keep=keep))

    rows = read(pa.array(given, struct))
    assert [row.voice for row in rows] == [str(tmp_path / "kept"), str(tmp_path / "a.wav"), None, None]
    assert kept == [content] and rows[2].error == "voice has neither bytes nor a path" and rows[3].error is None
    rows = read(pa.array([content, b"a.wav", "é.wav".encode(), None], pa.binary()))
    assert [row.voice for row in rows] == [str(tmp_path / name) for name in ("kept", "a.wav", "é.wav")] + [None]
    assert kept == [content] * 2
    rows = read(pa.array([b"a" * 4097, b"a\nb", b"a\0b", b"a" * 255], pa.binary()))
    assert kept[2:] == [b"a" * 4097, b"a\nb", b"a\0b"] and rows[3].voice == str(tmp_path / ("a" * 255))
    del kept[2:]
    rows = read(pa.array([content, bytes(5), b"RIFF\xff", bytes((64 << 20) + 1)], pa.large_binary()))
    assert "the recording in the row has 67108865 bytes, and may have 64 MiB" in rows[3].error and len(kept) == 5
    assert "not a recording's bytes" in read(pa.array(given, struct), None)[0].error


@pytest.mark.parametrize(("kind", "rows"), [(pa.string(), 1024), (pa.large_binary(), 8)])
def test_few_recordings_are_held_at_a_time(tmp_path, monkeypatch, kind, rows):
    voices = pa.array([b"a.wav"] * 1500, pa.binary()).cast(kind)
    table = {"id": pa.array(range(1500)), "text": ["Hello."] * 1500, "voice": voices}
    pq.write_table(pa.table(table), tmp_path / "corpus.parquet")
    batches, held = pq.ParquetFile.iter_batches, []

    def watched(*arguments, **options):
        for batch in batches(*arguments, **options):
            held.append(len(batch))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    assert len(list(read_rows(tmp_path / "corpus.parquet"))) == 1500 and max(held) == rows


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
