"""`python -m benchmarks.gpu check|bench|evidence`: one part of at most `--seconds`; called again, it goes on.

Everything is written into one folder as it comes: `journal.jsonl` has what each test and row came to, a folder named
after the card the rows, `evidence.md` the table against the aims, and a log a step what it printed. Ends with 0 where
all is well, 1 where something failed, and 3 where nothing failed and something is left for another part.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.gpu import aims, steps
from benchmarks.gpu.journal import Journal, State
from benchmarks.gpu.supervise import Step, run_step
from benchmarks.harness import ROOT, source

OK, FAILED, LEFT = 0, 1, 3
_SHOWN = 20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("what", choices=("check", "bench", "evidence"))
    parser.add_argument("--out", type=Path, default=ROOT / "out/gpu", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=540, help="of this part (default: %(default)s)")
    parser.add_argument("--sanitizer", default="compute-sanitizer")
    parser.add_argument(
        "--count", action="store_true", help="run nothing: what would be run, and its memory; needs no GPU"
    )
    arguments = parser.parse_args(argv)
    begin, out = time.monotonic(), arguments.out.resolve()
    planned = {
        "check": lambda: steps.check(arguments.sanitizer),
        "bench": lambda: steps.bench(out),
        "evidence": lambda: steps.evidence(arguments.sanitizer, out),
    }[arguments.what]()
    if arguments.count:
        from benchmarks.gpu import pretended  # before anything asks torch for a GPU

        pretended.pretend()
        from benchmarks.gpu import counting

        print(counting.counted(planned))
        return OK
    card = card_of(sys.executable)
    if card is None:
        print(
            f"{arguments.what} needs a CUDA device, and {sys.executable} with a torch that sees it (choose with "
            "GPU_PYTHON=...); --count tells without one what would be run",
            file=sys.stderr,
        )
        return FAILED
    journal = Journal(out / "journal.jsonl", f"{source('tests')} on {card}")
    print(f"{card}; everything goes to {out}", flush=True)
    code = run(planned, journal, out, begin + arguments.seconds)
    if arguments.what != "check":
        table = aims.table(out, card)
        (out / "evidence.md").write_text(table)
        print(table)
    print(verdict(planned, journal), flush=True)
    return code


def card_of(python: str) -> str | None:
    """The name of the GPU that torch sees, asked in a process that ends: this one holds nothing of it."""
    ask = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True)
    return done.stdout.strip() or None


def run(planned: Iterable[Step], journal: Journal, out: Path, deadline: float) -> int:
    """Run the steps that are not whole until `deadline`; those that were late come behind those that had no turn."""
    for step in sorted(planned, key=lambda step: journal.state(step.name).late):
        state = journal.state(step.name)
        if state.whole or time.monotonic() >= deadline:
            continue
        began = time.monotonic()
        run_step(step, journal, deadline, out / "logs", steps.environment())
        print(f"{time.monotonic() - began:5.0f} s  {told(step, journal.state(step.name))}", flush=True)
    states = [journal.state(step.name) for step in planned]
    if any(map(_failed, states)):
        return FAILED
    return OK if all(state.whole for state in states) else LEFT


def _failed(state: State) -> bool:
    return bool(state.failed or state.broken or (state.late and not state.whole))


def told(step: Step, state: State) -> str:
    """A line on a step, and a line for each thing that is wrong."""
    words = [f"{state.passed} well"]
    words += [f"{len(state.failed)} FAILED"] if state.failed else []
    words += ["BROKEN"] if state.broken else []
    if not state.whole:
        words.append("OUT OF ITS TIME" if state.late else "not whole")
    wrong = [*([state.broken.strip().splitlines()[-1]] if state.broken else []), *state.failed]
    more = [f"... and {len(wrong) - _SHOWN} more, in the journal"] if len(wrong) > _SHOWN else []
    return "\n".join([f"{step.name:<28} {', '.join(words)}", *(f"         {line}" for line in wrong[:_SHOWN] + more)])


def verdict(planned: Iterable[Step], journal: Journal) -> str:
    """The last line: the steps that failed, and those that are left."""
    states = {step.name: journal.state(step.name) for step in planned}
    failed = [name for name, state in states.items() if _failed(state)]
    left = [name for name, state in states.items() if not state.whole and name not in failed]
    said = [f"FAILED: {', '.join(failed)}"] if failed else []
    said += [f"left for another part, so call it again: {', '.join(left)}"] if left else []
    return "; ".join(said) or f"all of {len(states)} steps are well"


if __name__ == "__main__":
    sys.exit(main())
