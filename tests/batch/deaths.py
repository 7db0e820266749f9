"""Jobs that die, in processes of their own; run as `python -m tests.batch.deaths CORPUS FOLDER MOMENT...`.

A child dies by SIGKILL at its first rename of a file, in another folder at its second, and so on, with the moments
`before` and `behind` right before and right behind each, with `either` by turns before and behind; each job is then
begun again. Prints how many died, a line each.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from clvp_fast.batch import job, summary
from tests.batch.jobs import VOICE, NoModel, blank_overview

SHARD_ROWS = 20


def in_child(work: Callable[[], object]) -> int:
    """Do `work` in a copy of this process; return how that ended: 0, or minus the signal that killed it."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(rename: int, behind: bool) -> None:
    """End this process at its `rename`-th rename from now on."""
    replace, left = os.replace, rename

    def dying(source, target):
        nonlocal left
        left -= 1
        if left or behind:
            replace(source, target)
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = dying


def main(corpus: str, folder: str, *moments: str) -> None:
    job._executor = lambda settings, *_: NoModel(settings)
    job._JOURNAL_SECONDS = 0.0
    summary.draw_overview = blank_overview

    def run(out: Path) -> None:
        job.run(corpus, out, progress=False, shard_rows=SHARD_ROWS, voice=VOICE)

    for moment in moments:
        for rename in range(1, 100):
            behind = moment == "behind" or (moment == "either" and rename % 2 == 0)
            out = Path(folder, f"{moment}-{rename}")
            status = in_child(lambda out=out, rename=rename, behind=behind: (die_at(rename, behind), run(out)))
            if status == 0:
                break
            assert status == -signal.SIGKILL, status
            assert in_child(lambda out=out: run(out)) == 0
            print(out.name, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
