"""Every file of csrc/ is compiled or included, and shipped with the sources; every C++ file is linted."""

import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

from clvp_fast.native import build

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".cpp", ".h", ".cu", ".cuh"}
TOOLS = build.Toolchain(("g++",), "", "x86_64", tuple(build.ISA_FLAGS), nvcc="nvcc", architectures=(90,))


def files_in(folder: str) -> set[str]:
    """Return paths from the repository's root, without files that editors and interpreters leave."""
    found = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in found}


def test_every_file_is_of_a_part_of_the_library():
    """Find dead sources, which no part compiles and no other file includes."""
    parts = {part: set(build.part_sources(ROOT / "csrc", TOOLS, part)) for part in build.LIBRARIES}
    assert {f"csrc/{name}" for name in parts["cpu"] | parts["cuda"]} == files_in("csrc")
    assert {name.partition("/")[0] for name in parts["cpu"] if "/" in name} == {"cpu"}
    assert {name.partition("/")[0] for name in parts["cuda"] if "/" in name} == {"cuda"}


def test_every_file_is_shipped_with_the_sources():
    (line,) = (line for line in (ROOT / "MANIFEST.in").read_text().splitlines() if " csrc " in line)
    command, _, *patterns = line.split()
    assert command == "recursive-include"
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in files_in("csrc"))


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_every_file_is_linted():
    command = ["make", "--silent", "--eval=listed: ; @echo $(CPP_SOURCES)", "listed"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    files = files_in("csrc") | files_in("tests/csrc") | files_in("benchmarks/rivals")
    sources = {name for name in files if Path(name).suffix in SUFFIXES}
    assert len(listed) == len(sources) and set(listed) == sources
