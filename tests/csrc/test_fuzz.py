"""The C interface under the sanitizers: `fuzz.cpp` with random and hostile calls."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from clvp_fast.native import build
from tests.csrc.compiled import CSRC, FUZZERS, HERE, SANITIZED, compile_cpp

CASES = 400


@pytest.mark.slow
def test_hostile_calls(tmp_path):
    tools = replace(build.find_toolchain(), cxx=("g++",))
    commands = build.compile_commands(CSRC, tools)
    for stem in (*FUZZERS, "log_mel_emulator"):
        source = str(HERE / f"{stem}.cpp")
        commands[f"{stem}.o"] = ["g++", "-std=c++17", "-Wall", "-Wextra", "-c", source, "-o", f"{stem}.o"]

    def compile_one(command):
        subprocess.run([*command, *SANITIZED], cwd=tmp_path, check=True)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(compile_one, reversed(commands.values())))
    program = compile_cpp(tmp_path / "fuzz", *(tmp_path / name for name in commands), flags=SANITIZED)
    done = subprocess.run([program, str(CASES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == f"{CASES} cases\n"
