"""Corpora as files: the same rows in each form, and rows of JSON and CSV that cannot be read."""

import csv
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clvp_fast.batch.inputs import digest_of, read_rows
from clvp_fast.batch.rows import Row
from tests.batch.jobs import records, write_jsonl, write_parquet


def write_csv(path, rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
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
    """Refuse names that come twice, and nesting beyond a bound, which Python's reader would not survive."""
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
    """Take no row at all, because the rows cannot be told apart."""
    (tmp_path / "corpus.csv").write_text(content)
    with pytest.raises(ValueError, match=rf"corpus\.csv, line {line}: .*is a quote in the row that begins there"):
        list(read_rows(tmp_path / "corpus.csv"))


def test_quotes_inside_of_values(tmp_path):
    """Fail the row of a quote that is not doubled; a quote in a value without quotes is part of it."""
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
    """Blank lines are none, before the header either; carriage returns only make one line of the file."""
    path = tmp_path / "corpus.csv"
    path.write_bytes(b"\n\r\nid,text\r\n\r\r\na,Hello.\n")
    assert [row.text for row in read_rows(path)] == ["Hello."]
    path.write_bytes(b"id,text\na,Hel\rlo.\nb,Bye.\n")
    first, second = read_rows(path)
    assert first.error == f"{path}, line 2: no row of CSV: a carriage return stands outside of quotes"
    assert second.text == "Bye."
    for content in (b"id,text\ra,Hello.\r", b"id,text\ra,Hello."):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="ends its lines with carriage returns only: save it with newlines"):
            list(read_rows(path))
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"id": 1, "text": "a"}\r{"id": 2, "text": "b"}')
    with pytest.raises(ValueError, match="ends its lines with carriage returns only"):
        list(read_rows(path))
    path.write_bytes(b'{"id": 1,\r"text": "a"}\r\n{"id": 2, "text": "b"}')
    assert [row.text for row in read_rows(path)] == ["a", "b"]


def test_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "corpus.jsonl")
    with pytest.raises(ValueError, match=r"corpus\.jsonl is a pipe or a device, .*: give a file"):
        list(read_rows(tmp_path / "corpus.jsonl"))


def test_beside_a_link(tmp_path):
    """Look for voices where the link is, as links may lead to a store of blobs."""
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


@pytest.mark.parametrize("kind", [".csv", ".parquet"])
def test_missing_columns(tmp_path, kind):
    path = WRITERS[kind](tmp_path / f"corpus{kind}", [{"name": "a", "text": "Hello."}])
    with pytest.raises(ValueError, match=r"has no column 'id'; its columns are 'name', 'text'"):
        list(read_rows(path))


def test_digest(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"x" * (1 << 20) + b"y")
    first = digest_of(path)
    assert first == digest_of(path)
    path.write_bytes(b"x" * (1 << 20) + b"z")
    assert digest_of(path) != first and len(first) == 32


def test_bad_json_numbers_are_no_texts(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"id": 1, "text": float("nan")}) + "\n")
    (row,) = read_rows(path)
    assert row.error == "the row has no text"
