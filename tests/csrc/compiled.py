"""Programs and libraries of the tests, compiled by g++ from `tests/csrc/` and `csrc/`."""

import fcntl
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
# fuzz.cpp has the program, and the others the functions that it calls.
FUZZERS = (
    "fuzz",
    "fuzz_linear",
    "fuzz_mlp",
    "fuzz_window_attention",
    "fuzz_window_block",
    "fuzz_norm",
    "fuzz_sample",
    "fuzz_paged",
    "fuzz_prefill",
    "fuzz_rotary_attention",
    "fuzz_calls",
)
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
# Checks of accesses as calls, and none of local arrays, which are registers: inline they take minutes to compile.
SANITIZED = [
    "-g1",
    "-Og",  # half the time to compile of -O1
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
    "--param=asan-instrumentation-with-call-threshold=0",
    "--param=asan-stack=0",
]


def compile_cpp(target: Path, *sources: Path, flags: list[str]) -> Path:
    """Compile and link `target`; fails with what the compiler says."""
    command = ["g++", "-std=c++17", "-pthread", *WARNINGS, *flags, *map(str, sources), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def emulator(source: str, factory: pytest.TempPathFactory) -> Path:
    """Return the library of the emulator in `source`, compiled once a run; workers that share its tests wait for it."""
    shared = factory.getbasetemp()
    shared = shared.parent if shared.name.startswith("popen-") else shared
    target = shared / f"{Path(source).stem}.so"
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            compile_cpp(target.with_suffix(".part"), HERE / source, flags=["-O1", "-fPIC", "-shared"]).rename(target)
    return target
