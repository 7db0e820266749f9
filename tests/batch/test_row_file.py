"""The copy of its rows that a job keeps, and what it takes out of it."""

import numpy as np
import pytest

from clvp_fast.batch.inputs import RowFile, Task
from clvp_fast.batch.rows import Row
from tests.batch.jobs import records


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
