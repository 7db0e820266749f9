"""`python -m tests.ptx core`, `check` and `mutate`: the tests of the kernels on their PTX, without a GPU.

core: those of core_sm80.txt and core_sm90.txt, and all of each kernel whose source is not that of its committed row.
check: all of every kernel on every target. A kernel whose tests passed gets its row in checked.jsonl; called again, it
goes on with those whose source, tests or emulator are not those of their row.
mutate: plants faults in the kernels of these files, tells which its tests see, and replaces the rows of these kernels
in mutated.jsonl; called again, it goes on. With --again, it tries faults at places where none was seen on all tests.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

try:
    import triton
except ModuleNotFoundError:
    raise SystemExit(
        "tests.ptx: it compiles Triton's kernels, and there is no triton here: pip install triton"
    ) from None

from tests.ptx import mutants, native, suites
from tests.ptx.suites import ROOT

_WRITING = threading.Lock()


def _environment() -> dict[str, str]:
    return os.environ | {"TRITON_CACHE_DIR": str(suites.cache()), "OMP_NUM_THREADS": "1"}


def _command(target: int, *arguments: str) -> list[str]:
    plugin = ["-p", "tests.ptx.plugin", "-p", "no:cacheprovider", "--ptx-arch", str(target), "-k", suites.CHOSEN]
    return [sys.executable, "-m", "pytest", "-q", *plugin, *arguments]


def core(target: int, workers: int) -> bool:
    """Run the core tests, and return whether all passed."""
    tests = suites.core(target)
    if reason := native.missing():
        print(f"{', '.join(suites.NATIVE)}: cannot tell whether their rows are of their sources: {reason}", flush=True)
    for kernel in suites.changed(target):
        print(
            f"{kernel}: its source is not that of its row in checked.jsonl, so that all of its tests are run",
            flush=True,
        )
        tests += suites.files(kernel)
    spread = ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []
    return not subprocess.run(_command(target, *spread, *tests), cwd=ROOT, env=_environment()).returncode


def _check(kernel: str, target: int) -> bool:
    """Run a kernel's tests, write its row if they passed, and return whether they did."""
    if kernel in suites.NATIVE and (reason := native.missing()):
        print(f"sm_{target} {kernel:<18}skipped: {reason}", flush=True)
        return True
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        command = _command(target, "--ptx-record", str(record), *suites.files(kernel))
        run = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
        found = json.loads(record.read_text()) if record.exists() else {}
    seconds = round(time.monotonic() - began)
    ran, of = found.get("ran", 0), found.get("instructions", 0)
    passed = run.returncode == 0 and ran
    print(
        f"sm_{target} {kernel:<18}{found.get('passed', 0):>5} tests {seconds:>5} s  {ran} of {of} instructions",
        flush=True,
    )
    if not passed:
        print(run.stdout[-6000:] + run.stderr[-2000:] + f"exit status {run.returncode}", flush=True)
        return False
    row = dict(
        kernel=kernel, target=f"sm_{target}", source=suites.source_hash(kernel, target),
        checker=suites.checker_hash(kernel), tests=found["passed"], seconds=seconds, ran=ran, instructions=of,
        compiler=_compiler(kernel),
    )  # fmt: skip
    with _WRITING:
        suites.write(row | {"utc": datetime.now(UTC).isoformat(timespec="seconds")})
    return True


def _compiler(kernel: str) -> str:
    return f"nvcc {native.toolchain().nvcc_version}" if kernel in suites.NATIVE else f"triton {triton.__version__}"


def _is_known(kernel: str, target: int) -> bool:
    row = suites.rows().get((kernel, f"sm_{target}"), {})
    return row.get("source") == suites.source_hash(kernel, target) and row.get("checker") == suites.checker_hash(kernel)


def check(kernels: list[str], targets: list[int], workers: int, again: bool) -> int:
    todo = [(kernel, target) for target in targets for kernel in kernels if again or not _is_known(kernel, target)]
    with ThreadPoolExecutor(workers) as pool:
        passed = list(pool.map(lambda pair: _check(*pair), todo))
    failed = [f"{kernel} on sm_{target}" for (kernel, target), well in zip(todo, passed, strict=True) if not well]
    print(f"failed: {', '.join(failed)}" if failed else f"passed: {len(todo)} runs; others had passed before")
    return bool(failed)


def mutate(kernels: list[str], targets: list[int], seconds: float, again: bool) -> int:
    """Plant faults, and write the rows; each kernel on each target has the same share of the time, which may be 0."""
    folder = ROOT / "out/ptx-mutants"
    folder.mkdir(parents=True, exist_ok=True)
    todo, failed = [(kernel, target) for target in targets for kernel in kernels], False
    for kernel, target in todo if seconds else ():
        if kernel in suites.NATIVE and (reason := native.missing()):
            print(f"sm_{target} {kernel:<18}skipped: {reason}", flush=True)
            continue
        failed |= not _plant(kernel, target, folder, seconds / len(todo), again)
        _survey(folder, kernel, target)
    if not seconds:
        _survey(folder)
    return failed


def _plant(kernel: str, target: int, folder: Path, seconds: float, again: bool) -> bool:
    """Try faults of one kernel on its core tests, or again, where none was seen, on all; return success."""
    mine = tuple(suites.files(kernel))
    tests = mine if again else [line for line in suites.core(80) if line.startswith(mine)]
    file = folder / f"{kernel}-sm_{target}-{suites.source_hash(kernel, target)}.jsonl"
    wanted = ["--ptx-mutants", str(file), "--ptx-seconds", str(seconds), *["--ptx-again"] * again]
    command = _command(target, "-p", "tests.ptx.mutating", *wanted, *tests)
    run = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
    if run.returncode:
        print(run.stdout[-3000:] + run.stderr[-3000:], flush=True)
    return not run.returncode


def _survey(folder: Path, *told) -> None:
    """Merge what the folder has of the present sources into the committed rows on faults.

    told: the kernel and target whose share and open places are printed; of all by default.
    """
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        kernel, target, source = (*path.stem.split("-"), "", "")[:3]
        if kernel in suites.SUITES and source == suites.source_hash(kernel, int(target.removeprefix("sm_"))):
            found[kernel, target, source] = list(mutants.latest(path).values()), mutants.counted(path)
    rows = mutants.merged(suites.faults(), mutants.survey(found))
    suites.write_faults(mutants.explained(rows, mutants.reasons_of_survivors()))
    for kernel, target in [(told[0], f"sm_{told[1]}")] if told else sorted({name[:2] for name in found}):
        mine = [row for row in suites.faults() if (row["kernel"], row["target"]) == (kernel, target)]
        names = ("faults", "of", "seen", "places", "seen_places")
        counts = [sum(row[name] or 0 for row in mine) for name in names]
        print("{} {}: {} of {} faults, {} seen; {} places, {} seen".format(target, kernel, *counts), flush=True)
        for row in mine:
            for at, text in row["open"].items():
                print(f"    open: {at} {row['kind']}: {text}", flush=True)


def _number(kind: type, least: int):
    """Return a reader of an argument that is at least so much."""

    def read(text: str):
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number from {least} on, got {text}")
        return value

    read.__name__ = kind.__name__
    return read


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=__doc__)
    parser.add_argument("what", choices=("core", "check", "mutate"))
    parser.add_argument("kernel", nargs="*", help=f"check, mutate: {', '.join(suites.SUITES)}; all by default")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=suites.TARGETS, default=suites.TARGETS, help="compute capabilities"
    )
    parser.add_argument(
        "--seconds", type=_number(float, 0), default=3600, help="mutate: for all; 0: only write rows and page"
    )
    parser.add_argument("--workers", type=_number(int, 1), default=2)
    parser.add_argument("--again", action="store_true", help="check: what passed too; mutate: what no test saw")
    arguments = parser.parse_args(argv)
    if unknown := sorted(set(arguments.kernel) - set(suites.SUITES)):
        parser.error(f"no kernel {', '.join(unknown)}; there are {', '.join(suites.SUITES)}")
    if arguments.what == "core":
        if arguments.kernel:
            parser.error("core runs a fixed list of tests, and takes no kernel; check does")
        return not all([core(target, arguments.workers) for target in arguments.arch])
    kernels = list(dict.fromkeys(arguments.kernel)) or list(suites.SUITES)
    targets = list(dict.fromkeys(arguments.arch))
    if arguments.what == "mutate":
        return mutate(kernels, targets, arguments.seconds, arguments.again)
    return check(kernels, targets, arguments.workers, arguments.again)


if __name__ == "__main__":
    sys.exit(main())
