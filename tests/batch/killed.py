"""A job on the random checkpoint that is killed and begun again.

    python -m tests.batch.killed ROWS KILLS FOLDER [SEED]

One run is undisturbed; another is killed by SIGKILL at random instants, so many times, and then comes to its end. The
place of each kill is printed; `tests.batch.test_killed` compares the folders.
"""

import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path
from threading import Thread

from clvp_fast.batch import job, worker
from tests.batch.deaths import in_child
from tests.batch.jobs import QUICK, records, write_jsonl


def shards_of(out: Path) -> int:
    return len(list((out / "shards").glob("*.parquet")))


def journaled(out: Path) -> int:
    return sum(path.stat().st_size for path in (out / "unfinished").glob("*"))


def die_at(out: Path, shards: int, seconds: float) -> None:
    """Kill this process a number of seconds after a number of shards is there."""
    while shards_of(out) < shards:
        time.sleep(0.005)
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def main(rows: str, kills: str, folder: str, seed: str = "0") -> None:
    assert worker.Worker  # torch and transformers are loaded once, before the children are made
    rng = random.Random(seed)
    corpus = write_jsonl(Path(folder, "corpus.jsonl"), records(int(rows)))
    shard_rows = -(-int(rows) // 12)
    job._JOURNAL_SECONDS = 0.05

    def run(out: Path) -> None:
        job.run(corpus, out, progress=False, shard_rows=shard_rows, **QUICK)

    assert in_child(lambda: run(Path(folder, "undisturbed"))) == 0

    out, shards = Path(folder, "killed"), -(-int(rows) // shard_rows)
    # By progress, which the child itself watches: by the clock of another process it might be done, on a busy machine.
    # The rest after the last kill takes several times as long as the wait for it.
    shares = sorted(rng.uniform(0, 0.5) for _ in range(int(kills)))
    for number, share in enumerate(shares, start=1):
        death = partial(die_at, out, int(share * shards), rng.uniform(0, shard_rows / 100))
        status = in_child(lambda death=death: (Thread(target=death, daemon=True).start(), run(out)))
        assert status == -signal.SIGKILL, status
        print(f"killed {number}: {shards_of(out)} of {shards} shards, {journaled(out)} bytes of journals", flush=True)
    assert in_child(lambda: run(out)) == 0
    left = json.loads((out / "summary.json").read_text())["this_run"]["rows"]
    print(f"the last run did {left} rows", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
