"""The files of a job, one by one."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clvp_fast.batch.folder import JobFolder, Journal
from clvp_fast.batch.outcomes import outcome_schema, shard_schema
from clvp_fast.batch.rows import Row
from clvp_fast.batch.settings import Settings
from clvp_fast.io.files import UnwritableError
from tests.batch.jobs import NoModel

SETTINGS = Settings()


@pytest.fixture
def outcomes():
    model = NoModel(SETTINGS)
    return [
        model.outcome(Row(index, f"{index}", "Hello.", "nowhere.wav" if index == 2 else None)) for index in range(4)
    ]


@pytest.fixture
def folder(tmp_path):
    folder = JobFolder(tmp_path / "out")
    yield folder
    folder.close()


def rows(outcomes):
    return [(outcome.row, outcome.error) for outcome in outcomes]


def test_a_journal_is_on_disk_before_it_is_closed(folder, outcomes):
    """Find everything that a process has added after it was killed."""
    schema, path = outcome_schema(SETTINGS), folder.journal_path(3)
    journal = Journal(path, outcomes[:1], schema)
    assert rows(Journal.read(path, schema)) == rows(outcomes[:1])
    journal.add(outcomes[1:3])
    assert rows(Journal.read(path, schema)) == rows(outcomes[:3])
    journal.add([])
    journal.add(outcomes[3:])
    assert rows(Journal.read(path, schema)) == rows(outcomes)
    journal.close()
    assert path.parent.name == "unfinished" and [path] == list(path.parent.iterdir())


def test_a_length_that_is_none(folder, outcomes):
    """Read a length from torn bytes, without asking for that much memory."""
    schema, path = outcome_schema(SETTINGS), folder.journal_path(0)
    Journal(path, outcomes, schema).close()
    content = path.read_bytes()
    for torn in (b"\xff" * 64, bytes(64)):
        path.write_bytes(content + torn)
        assert rows(Journal.read(path, schema)) == rows(outcomes)


def test_a_journal_is_closed_on_a_full_disk(folder, outcomes):
    journal = Journal(folder.journal_path(0), [], outcome_schema(SETTINGS))
    journal.close()
    journal._file = open("/dev/full", "wb")  # noqa: SIM115 - closed by the journal
    with pytest.raises(UnwritableError, match="the disk is full"):
        journal.add(outcomes)
    journal.close()
    assert journal._file.closed


def test_a_journal_of_other_columns_is_of_no_use(folder, outcomes):
    path = folder.journal_path(0)
    Journal(path, outcomes, outcome_schema(SETTINGS)).close()
    assert Journal.read(path, outcome_schema(Settings(embeddings=True))) == []


def test_a_shard_holds_lines_and_failures(folder, outcomes):
    folder.write_shard(5, reversed(outcomes), shard_schema(SETTINGS), "digest")
    about = folder.check_shard(5, 4, "digest")
    assert about["failures"] == [{"row": 2, "id": "2", "error": outcomes[2].error}]
    assert rows(folder.read_shard(5)) == [(0, None), (1, None), (3, None)]
    assert folder.check_shard(4, 4, "digest") is None
    for wrong in ((5, 3, "digest"), (5, 4, "other")):
        with pytest.raises(ValueError, match="is of another job"):
            folder.check_shard(*wrong)


def test_a_table_of_others_is_no_shard(folder):
    pq.write_table(pa.table({"a": [1]}), folder.shard_path(0))
    with pytest.raises(ValueError, match=r"part-000000\.parquet is damaged"):
        folder.check_shard(0, 1, "digest")


def test_no_changed_byte_of_a_shard_is_taken(folder, outcomes):
    """Most of those in compressed pages would be read without an error, as other results."""
    folder.write_shard(0, outcomes, shard_schema(SETTINGS), "digest")
    path, pages = folder.shard_path(0), pq.read_metadata(folder.shard_path(0)).row_group(0)
    column = pages.column(pages.num_columns - 1)
    end = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size
    content, table = path.read_bytes(), pq.read_table(path)
    refused = 0
    for place in range(4, end, 29):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x15]) + content[place + 1 :])
        try:
            folder.check_shard(0, 4, "digest")
        except ValueError:
            refused += 1
        else:
            assert pq.read_table(path).equals(table), place
    assert refused > end / 29 / 2


def test_leftovers_of_a_dead_process_vanish(tmp_path):
    JobFolder(tmp_path).close()
    left = [tmp_path / ".rows.parquet.part.again.part", tmp_path / "shards/.part-000009.parquet.part"]
    for path in left:
        path.write_text("half")
    (tmp_path / ".mine").write_text("not the job's")
    JobFolder(tmp_path).close()
    assert not any(path.exists() for path in left) and (tmp_path / ".mine").exists()


def test_voices_that_cannot_be_kept(folder):
    (folder.folder / "voices").write_text("a file")
    with pytest.raises(UnwritableError, match="a file stands where the folder should be"):
        folder.keep_voice(b"content")


def test_failures_that_cannot_be_written(folder):
    folder.failures.mkdir()
    for write in (folder.append_failures, folder.write_failures):
        with pytest.raises(UnwritableError, match="cannot write into"):
            write([{"row": 0, "id": "a", "error": "no"}])


def test_failures_are_utf_8_in_any_locale(tmp_path):
    code = (
        "import pathlib, sys; from clvp_fast.batch.folder import JobFolder; folder = JobFolder(pathlib.Path('out')); "
    )
    code += "failure = {'id': '\\xe9 \\u6771'}; folder.write_failures([failure]); folder.append_failures([failure])"
    old = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=os.environ | old)
    assert (tmp_path / "out/failures.jsonl").read_text(encoding="utf-8") == '{"id": "é 東"}\n' * 2
