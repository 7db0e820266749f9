"""The program of a rival's process: it reads the lines and arrays of `decoder_process.py`, and answers.

No module of torch's is imported, so that the process has the memory and the threads of the rival alone.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


@dataclass
class Job:
    """A decode step of several candidates behind a text and tokens that are stored.

    model: the file or folder of weights. folder: of the arrays. candidates: how many; those behind the distinct ones
        repeat them. prompt_len: of the stored tokens, those that all candidates share. threads: as many as torch has.
    settings: of the rival.
    """

    model: str
    folder: str
    candidates: int
    prompt_len: int
    threads: int
    settings: dict = field(default_factory=dict)

    def array(self, name: str) -> np.ndarray:
        return np.load(Path(self.folder, f"{name}.npy"))

    def distinct_of(self, distinct: int) -> np.ndarray:
        """Return `[candidates]`: which of the distinct ones each candidate repeats."""
        return np.arange(self.candidates) % distinct

    def dense(self, kind: str) -> list[np.ndarray]:
        """Return "keys" or "values" as one `[candidates, num_heads, tokens, head_dim]` for each layer."""
        stored = self.array(kind)
        index = self.distinct_of(stored.shape[1])
        return [layer[index] for layer in stored]


def serve(load: Callable[[Job], Callable[[np.ndarray], np.ndarray]], entered: str = "hidden") -> None:
    """Answer the lines of stdin: `enter` the tokens in a file, `run` the same again, or tell the `peak`.

    load: makes of a job the step: embeddings `[candidates, hidden_size]` to logits `[candidates, vocab_size]`, behind
        the same stored tokens at every call. If it has a method `run`, this is the step that is repeated.
    entered: "tokens", if the step takes tokens `[candidates]`.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a process that is stopped sees no end of stdin
    job = Job(**json.loads(sys.argv[1]))
    # A library that prints would break the exchange: it prints to stderr.
    answers, sys.stdout = sys.stdout, sys.stderr
    step, array = load(job), None
    for line in sys.stdin:
        answer = {}
        if (asked := json.loads(line)) == "peak":
            status = Path("/proc/self/status").read_text()
            answer["bytes"] = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        elif asked == "enter":
            array = job.array(entered)
            np.save(Path(job.folder, "logits.npy"), step(array))
        elif hasattr(step, "run"):
            step.run()
        else:
            step(array)
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # without waiting for threads of the rival
