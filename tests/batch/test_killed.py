"""A job that is killed again and again gives what an undisturbed one gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.batch.jobs import assert_whole, failures, results

# CLVP_FAST_KILLS="2000 20" is the longest run; its 2 000 rows take minutes.
LONG = os.environ.get("CLVP_FAST_KILLS", "150 6").split()


@pytest.mark.slow  # `make test` has deaths at every write (test_job.py)
@pytest.mark.parametrize("rows, kills", [LONG])
def test_killed_at_random_instants(tmp_path, rows, kills):
    command = [sys.executable, "-m", "tests.batch.killed", rows, kills, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert found.returncode == 0, found.stderr
    print(found.stdout)
    struck = [line for line in found.stdout.splitlines() if line.startswith("killed")]
    assert len(struck) == int(kills)
    assert any(": 0 of " not in line for line in struck), struck  # some of them in the midst of the work
    assert_whole(tmp_path / "killed", int(rows))
    assert_whole(tmp_path / "undisturbed", int(rows))
    assert results(tmp_path / "killed") == results(tmp_path / "undisturbed")
    assert failures(tmp_path / "killed") == failures(tmp_path / "undisturbed")
