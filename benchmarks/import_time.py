"""What `import clvp_fast` costs beyond `import torch`, each in fresh interpreters."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from benchmarks.harness import ROOT, Provider, Task, measure


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    yield Task({}, partial(rows, 1 if smoke else 5))


def rows(repeats: int) -> list[dict]:
    def run(statement: str) -> None:
        subprocess.run([sys.executable, "-c", statement], check=True, cwd=ROOT)

    measured = measure(
        "import_time",
        {},
        [
            Provider("import torch", lambda: run("import torch"), 0.0, 0.0),
            Provider("import torch, clvp_fast", lambda: run("import torch, clvp_fast"), 0.0, 0.0),
            Provider("import transformers' CLVP", lambda: run("from transformers import ClvpModel"), 0.0, 0.0),
        ],
        repeats,
    )
    # The memory is that of other processes, which the harness cannot see.
    return [row | {"peak_extra_bytes": None} for row in measured]
