"""Programs and libraries of the tests, compiled by g++ from `tests/csrc/` and `csrc/`."""

import os
import shlex
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
SANITIZED = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def build(target: Path, *sources: Path, flags: list[str]) -> Path:
    """Compile and link `target`; fails with what the compiler says."""
    cxx = shlex.split(os.environ.get("CXX", "g++"))
    command = [*cxx, "-std=c++17", "-pthread", *WARNINGS, *flags, *map(str, sources), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target
