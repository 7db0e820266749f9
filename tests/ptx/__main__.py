"""`python -m tests.ptx core`, `check` and `mutate`: the tests of the kernels on their PTX, without a GPU.

core: those of core_sm80.txt and core_sm90.txt, and all of each kernel whose source is not that of its committed row.
check: all of every kernel on every target. A kernel whose tests passed gets its row in checked.jsonl; called again, it
goes on with those whose source, tests or emulator are not those of their row.
mutate: plants faults in the kernels of these files, and tells which its tests see; called again, it goes on.
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

import triton

from tests.ptx import mutants, native, suites
from tests.ptx.suites import ROOT

_WRITING = threading.Lock()


def _environment() -> dict[str, str]:
    """Return an environment with a folder of its own for compiled kernels, which lack what a GPU would need."""
    folder = os.environ.get("PTX_CACHE") or str(ROOT / "out/ptx-cache")
    return os.environ | {"TRITON_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}


def _command(target: int, *arguments: str) -> list[str]:
    plugin = ["-p", "tests.ptx.plugin", "-p", "no:cacheprovider", "--ptx-arch", str(target), "-k", suites.CHOSEN]
    return [sys.executable, "-m", "pytest", "-q", *plugin, *arguments]


def core(target: int, workers: int) -> bool:
    """Run the core tests, and return whether all passed."""
    tests = suites.core(target)
    for kernel in suites.changed(f"sm_{target}"):
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
        kernel=kernel, target=f"sm_{target}", source=suites.source_hash(kernel), checker=suites.checker_hash(kernel)
    )
    row |= dict(tests=found["passed"], seconds=seconds, ran=ran, instructions=of, compiler=_compiler(kernel))
    with _WRITING:
        suites.write(row | {"utc": datetime.now(UTC).isoformat(timespec="seconds")})
    return True


def _compiler(kernel: str) -> str:
    return f"nvcc {native.toolchain().nvcc_version}" if kernel in suites.NATIVE else f"triton {triton.__version__}"


def _is_known(kernel: str, target: int) -> bool:
    row = suites.rows().get((kernel, f"sm_{target}"), {})
    return row.get("source") == suites.source_hash(kernel) and row.get("checker") == suites.checker_hash(kernel)


def check(kernels: list[str], targets: list[int], workers: int, again: bool) -> int:
    todo = [(kernel, target) for target in targets for kernel in kernels if again or not _is_known(kernel, target)]
    with ThreadPoolExecutor(workers) as pool:
        passed = list(pool.map(lambda pair: _check(*pair), todo))
    failed = [f"{kernel} on sm_{target}" for (kernel, target), well in zip(todo, passed, strict=True) if not well]
    print(f"failed: {', '.join(failed)}" if failed else f"passed: {len(todo)} runs; others had passed before")
    return bool(failed)


def mutate(kernels: list[str], targets: list[int], seconds: float) -> int:
    """Plant faults; each kernel on each target has the same share of the time."""
    folder = ROOT / "out/ptx-mutants"
    folder.mkdir(parents=True, exist_ok=True)
    share = seconds / len(kernels) / len(targets)
    for target in targets:
        for kernel in kernels:
            mine = tuple(suites.files(kernel))
            tests = [line for line in suites.core(target) if line.startswith(mine)]
            if not tests or (kernel in suites.NATIVE and native.missing()):
                continue
            wanted = ["--ptx-mutants", str(folder / f"{kernel}-sm_{target}.jsonl"), "--ptx-seconds", str(share)]
            command = _command(target, "-p", "tests.ptx.mutating", *wanted, *tests)
            run = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
            if run.returncode:
                print(run.stdout[-3000:] + run.stderr[-3000:], flush=True)
            _survey(folder)
    return 0


def _survey(folder: Path) -> None:
    """Write the committed rows on faults, and their page, from those of the folder."""
    found: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        rows = map(json.loads, path.read_text().splitlines())
        found.setdefault(path.stem.rpartition("-")[0], []).extend(rows)
    surveyed = mutants.survey(found, mutants.reasons_of_survivors())
    suites.MUTATED.write_text("".join(json.dumps(row) + "\n" for row in surveyed))
    suites.FAULTS_PAGE.write_text(suites.with_faults(suites.FAULTS_PAGE.read_text()))
    sums = [sum(row[name] for row in surveyed) for name in ("faults", "seen", "places", "seen_places")]
    left = sum(len(row["open"]) for row in surveyed)
    print("{} faults, {} seen; {} places, {} seen, {} open".format(*sums, left), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=__doc__)
    parser.add_argument("what", choices=("core", "check", "mutate"))
    parser.add_argument("kernel", nargs="*", help=f"check, mutate: {', '.join(suites.SUITES)}; all by default")
    parser.add_argument("--arch", type=int, nargs="+", default=suites.TARGETS, help="compute capabilities")
    parser.add_argument("--seconds", type=float, default=3600, help="mutate: for all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="check: also what has passed as it is")
    arguments = parser.parse_args(argv)
    if arguments.what == "core":
        return not all([core(target, arguments.workers) for target in arguments.arch])
    if unknown := sorted(set(arguments.kernel) - set(suites.SUITES)):
        parser.error(f"no kernel {', '.join(unknown)}")
    if arguments.what == "mutate":
        return mutate(arguments.kernel or list(suites.SUITES), arguments.arch, arguments.seconds)
    return check(arguments.kernel or list(suites.SUITES), arguments.arch, arguments.workers, arguments.again)


if __name__ == "__main__":
    sys.exit(main())
