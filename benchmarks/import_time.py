"""The cost of `import clvp_fast` beyond `import torch`, each in fresh interpreters."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from benchmarks.harness import ROOT, Provider, Task, task

STATEMENTS = {
    "import torch": "import torch",
    "import torch, clvp_fast": "import torch, clvp_fast",
    "import transformers' CLVP": "from transformers import ClvpModel",
}


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    makers = {name: partial(_made, name, statement) for name, statement in STATEMENTS.items()}
    yield task("import_time", {}, makers, 1 if smoke else 5)


def _made(name: str, statement: str) -> Provider:
    def run() -> None:
        subprocess.run([sys.executable, "-c", statement], check=True, cwd=ROOT)

    # The memory is that of other processes, which the harness cannot see.
    return Provider(name, run, 0.0, 0.0, counted={"peak_extra_bytes": None})
