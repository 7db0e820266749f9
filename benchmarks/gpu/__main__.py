"""`python -m benchmarks.gpu check|bench|evidence`: one part of at most `--seconds`; called again, it continues.

Everything is written into one folder at once: `journal.jsonl` has the outcome of each test and row, a folder named
after the card has the rows, `evidence.md` compares them with the aims, and a log for each step has its output. The exit
code is 0 for success, 1 if something failed, and 3 if nothing failed but something is left for another part.
"""

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.gpu import aims, steps
from benchmarks.gpu.journal import Journal, State
from benchmarks.gpu.supervise import Step, run_step
from benchmarks.harness import ROOT, source
from clvp_fast.versions import versions

OK, FAILED, LEFT = 0, 1, 3
_SHOWN = 20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("what", choices=("check", "bench", "evidence"))
    parser.add_argument("--out", type=_folder, default=ROOT / "out/gpu", help="default: %(default)s")
    parser.add_argument("--seconds", type=_seconds, default=540, help="of this part (default: %(default)s)")
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

        for line in counting.counted(planned):
            print(line, flush=True)
        return OK
    card = card_of(sys.executable)
    if card is None:
        print(
            f"{arguments.what} needs a CUDA device that answers, and a torch in {sys.executable} that sees it (choose "
            "another with GPU_PYTHON=...); --count tells without a GPU what would be run",
            file=sys.stderr,
        )
        return FAILED
    having = versions()
    libraries = ", ".join(f"{name} {having[name]}" for name in ("torch", "triton", "transformers"))
    journal = Journal(out / "journal.jsonl", f"{source('tests')} on {card} with {libraries}")
    print(f"{card}; everything goes to {out}", flush=True)

    def table() -> str:
        text = aims.table(out, card, journal)
        (out / "evidence.md").write_text(text)
        return text

    measures = arguments.what != "check"
    try:
        with journal.held():
            code = run(planned, journal, out, begin + arguments.seconds, table if measures else lambda: None)
            if measures:
                print(table())
    except BlockingIOError:
        print(f"another run writes to {out}: wait for its end, for two at once slow each other down", file=sys.stderr)
        return FAILED
    except OSError as error:
        print(f"{out} cannot be written ({error}): choose another place with GPU_OUT=...", file=sys.stderr)
        return FAILED
    print(verdict(planned, journal), flush=True)
    return code


def _folder(word: str) -> Path:
    if not word:
        raise argparse.ArgumentTypeError("a folder was expected, such as out/gpu, and not ''")
    return Path(word)


def _seconds(word: str) -> float:
    try:
        seconds = float(word)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"a number of seconds was expected, such as 540, and not {word!r}")
    return seconds


def card_of(python: str, seconds: float = 120) -> str | None:
    """Return the name of torch's GPU, asked in another process, so that this one holds no memory of it.

    None where there is no GPU, or no answer within `seconds`.
    """
    ask = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    try:
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() or None


def run(
    planned: Iterable[Step],
    journal: Journal,
    out: Path,
    deadline: float,
    after: Callable[[], object] = lambda: None,
) -> int:
    """Run the incomplete steps until `deadline`; those that were late come after those that had no turn.

    after: is called behind each. Raises `OSError` where nothing can be written.
    """
    for step in sorted(planned, key=lambda step: journal.state(step.name).late):
        state = journal.state(step.name)
        if state.whole or time.monotonic() >= deadline:
            continue
        began = time.monotonic()
        run_step(step, journal, deadline, out / "logs", steps.environment())
        after()
        print(f"{time.monotonic() - began:5.0f} s  {told(step, journal.state(step.name))}", flush=True)
    states = [journal.state(step.name) for step in planned]
    if any(map(_failed, states)):
        return FAILED
    return OK if all(state.whole for state in states) else LEFT


def _failed(state: State) -> bool:
    return bool(state.failed or state.broken or (state.late and not state.whole))


def told(step: Step, state: State) -> str:
    """Write a line on a step, and a line for each fault."""
    words = [f"{len(state.passed)} well"]
    words += [f"{len(state.left_out)} left out"] if state.left_out else []
    words += [f"{len(state.failed)} FAILED"] if state.failed else []
    words += ["BROKEN"] if state.broken else []
    if not state.whole:
        words.append("OUT OF ITS TIME" if state.late else "not whole")
    wrong = [*([state.broken.strip().splitlines()[-1]] if state.broken else []), *state.failed]
    more = [f"... and {len(wrong) - _SHOWN} more, in the journal"] if len(wrong) > _SHOWN else []
    return "\n".join([f"{step.name:<28} {', '.join(words)}", *(f"         {line}" for line in wrong[:_SHOWN] + more)])


def verdict(planned: Iterable[Step], journal: Journal) -> str:
    """Write the last line: the steps that failed, and those that are left."""
    states = {step.name: journal.state(step.name) for step in planned}
    failed = [name for name, state in states.items() if _failed(state)]
    left = [name for name, state in states.items() if not state.whole and name not in failed]
    said = [f"FAILED: {', '.join(failed)}"] if failed else []
    said += [f"left for another part, so call it again: {', '.join(left)}"] if left else []
    return "; ".join(said) or f"all of {len(states)} steps are well"


if __name__ == "__main__":
    sys.exit(main())
