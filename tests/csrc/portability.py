"""The library and its C++ tests with the oldest compiler that is served, and for aarch64, under QEMU.

    python -m tests.csrc.portability

Packages of Debian's that a step needs are installed where the user is root; a step whose packages cannot be had is
skipped, and says so. The exit status is 1 if a step failed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import patch

from clvp_fast.native import build
from tests.csrc.compiled import CSRC, FUZZERS, HERE, WARNINGS

CASES = 150
PACKAGES = {
    "g++-11": "g++-11",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
}
# AddressSanitizer does not run under QEMU.
UNDEFINED = ["-Og", "-fsanitize=undefined,float-cast-overflow", "-fno-sanitize-recover=all"]


def main() -> int:
    oldest = partial(_check, "g++-11", [], [])
    emulated = partial(_check, "aarch64-linux-gnu-g++", UNDEFINED, ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"])
    steps = {"g++-11": oldest, "aarch64": emulated}
    needs = {"g++-11": ["g++-11"], "aarch64": ["aarch64-linux-gnu-g++", "qemu-aarch64"]}
    failed = False
    for name, step in steps.items():
        start = time.monotonic()
        absent = [PACKAGES[program] for program in needs[name] if not _have(program)]
        if absent:
            print(f"{name}: skipped, {', '.join(absent)} cannot be had", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            wrong = step(folder=Path(folder))
        failed = failed or wrong is not None
        print(f"{name}: {'failed' if wrong else 'passed'} in {time.monotonic() - start:.0f} s", flush=True)
        if wrong:
            print(wrong, file=sys.stderr)
    return int(failed)


def _have(program: str) -> bool:
    """Tell whether `program` is there, after an attempt to install it."""
    if not shutil.which(program) and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", PACKAGES[program]]):
            subprocess.run(["apt-get", "-qq", *command], env=environment, capture_output=True)
    return shutil.which(program) is not None


def _check(cxx: str, flags: list[str], run: list[str], folder: Path) -> str | None:
    """Compile the library's objects and the tests' programs with `cxx`, run these, and return the failures."""
    with patch.dict(os.environ, CXX=cxx):
        library = build.compile_commands(CSRC, build.find_toolchain(elsewhere=True))
    plain = [cxx, "-std=c++17", "-O1", "-pthread", "-fPIC", *flags, f"-I{HERE / 'stand_in'}"]
    tests = (*FUZZERS, "log_mel_emulator", "persistent_emulator", "known", "halves", "device")
    commands = {name: [*command, *flags] for name, command in library.items()}
    commands |= {f"{stem}.o": [*plain, "-c", f"{HERE / stem}.cpp", "-o", f"{stem}.o"] for stem in tests}
    fuzz = [f"{stem}.o" for stem in (*FUZZERS, "log_mel_emulator")]
    links = {
        "known": [*plain, "known.o", *library, "-o", "known"],
        "fuzz": [*plain, *fuzz, *library, "-o", "fuzz"],
    }
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        told = list(threads.map(lambda command: _run([*command, *WARNINGS], folder), commands.values()))
    for command in (*links.values(), [*run, "./known"], [*run, "./fuzz", str(CASES)]):
        if not any(told):
            told.append(_run(command, folder))
    return next(filter(None, told), None)


def _run(command: list[str], folder: Path) -> str | None:
    """Return the output of a command that fails, or None."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return f"$ {' '.join(command)}\n{done.stdout}{done.stderr}" if done.returncode else None


if __name__ == "__main__":
    sys.exit(main())
