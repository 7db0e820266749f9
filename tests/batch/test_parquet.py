"""Corpora in Parquet: the types of those who write it, recordings in cells, and values that cannot be read."""

from decimal import Decimal
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clvp_fast.batch.inputs import read_rows
from tests.batch.jobs import VOICE, records, write_parquet

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
    """Read the types that DuckDB, Spark, pandas and datasets write."""
    for column, expected in KINDS[name]:
        table = {"id": pa.array(["x", "y"]), "text": pa.array(["Hello."] * 2)} | {name: column}
        pq.write_table(pa.table(table), tmp_path / "corpus.parquet", store_schema=column.type != pa.binary(16))
        rows = list(read_rows(tmp_path / "corpus.parquet"))
        assert [row.error for row in rows] == [None, None], column.type
        found = [getattr(row, name, None) if name in ("id", "text") else row.sampling.get(name) for row in rows]
        assert found == expected and list(map(type, found)) == list(map(type, expected)), column.type


def test_text_of_parquet_that_is_no_utf_8(tmp_path):
    """Fail each bad row alone, even if the column is declared as text."""
    texts = pa.array([b"a", b"\xff", b"c"], pa.binary())
    for column in (texts, pa.Array.from_buffers(pa.string(), 3, texts.buffers())):
        pq.write_table(pa.table({"id": ["x", "y", "z"], "text": column}), tmp_path / "corpus.parquet")
        rows = list(read_rows(tmp_path / "corpus.parquet"))
        assert [row.text for row in rows] == ["a", None, "c"]
        assert rows[1].id == "y" and "text is not valid Unicode" in rows[1].error


def test_values_of_parquet_that_python_cannot_say(tmp_path):
    """Fail a row alone for a path that is not UTF-8 beside a recording's bytes, or a number of another kind."""
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
    """Prefer `bytes` over `path`, as datasets does; a path alone, or bytes that are a path, count as text."""
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


def test_damaged_parquet(tmp_path):
    path = write_parquet(tmp_path / "corpus.parquet", records(2000))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        list(read_rows(path))
    path.write_bytes(whole[:300] + bytes(200) + whole[500:])
    with pytest.raises(ValueError, match="is damaged from row"):
        list(read_rows(path))
