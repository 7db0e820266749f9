"""A copy of a rival's package for AVX2 on a CPU that has more: what a library asks of CPUID is answered by us.

ONNX Runtime and OpenVINO choose their kernels by the instruction `cpuid`, and have no switch. In a copy of the package,
each `cpuid` of its libraries becomes two bytes that are no instruction of 64-bit code; a small library that is
preloaded (`avx2_cpuid.cpp`) answers the fault. The installed package stays as it is.
"""

import hashlib
import platform
import re
import shutil
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from benchmarks.providers import Absent
from benchmarks.rivals.held_down import before
from clvp_fast.io.files import build_folder_once, cache_folder
from clvp_fast.native import build

SOURCE = Path(__file__).with_name("avx2_cpuid.cpp")
_CPUID = bytes.fromhex("0fa2")
# PUSH ES and POP ES: no instructions of 64-bit code, where a CPU faults on the first, and no compiler writes them.
_FAULT = bytes.fromhex("0607")


def variables(package: str) -> dict[str, str]:
    """Return the variables of a Python process that imports an installed package and sees a CPU of AVX2.

    Raises:
        Absent: the machine is no x86-64 Linux, a tool is missing, or no library of the package has a `cpuid`.
    """
    preloaded = answering_library()
    name = f"{package}-{version(package)}-avx2"
    folder = build_folder_once(cache_folder() / "rivals" / name, lambda target: _copy(package, target))
    return {
        "LD_PRELOAD": before(preloaded, "LD_PRELOAD"),
        "PYTHONPATH": before(folder, "PYTHONPATH"),
    }


def answering_library() -> Path:
    """Return the library to preload, which is compiled if it is not in the cache. Raises as `variables`."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise Absent("its kernels can be held down on x86-64 Linux only")
    if shutil.which("objdump") is None:
        raise Absent("its kernels are held down with objdump, which is missing: install binutils")
    try:
        tools = build.find_toolchain()
    except build.BuildError as error:
        raise Absent(f"its kernels are held down by a small library, and {error}") from error
    marks = [f"-DCPUID_BYTE_{place}={byte}" for place, byte in enumerate(_FAULT)]
    command = [*tools.cxx, "-std=c++17", "-O1", "-shared", "-fPIC", *marks, str(SOURCE), "-o"]
    digest = hashlib.sha256(" ".join(marks).encode() + SOURCE.read_bytes()).hexdigest()[:16]

    def compiled(folder: Path) -> None:
        subprocess.run([*command, str(folder / "cpuid.so")], check=True)

    return build_folder_once(cache_folder() / "rivals" / f"avx2-cpuid-{digest}", compiled) / "cpuid.so"


def _copy(package: str, target: Path) -> None:
    """Copy a package into a folder, without `cpuid` in its libraries."""
    installed = Path(find_spec(package).origin).parent
    shutil.copytree(installed, target / package, ignore=shutil.ignore_patterns("__pycache__"))
    libraries = [path for path in (target / package).rglob("*.so*") if path.is_file() and not path.is_symlink()]
    if not sum(map(without_cpuid, libraries)):
        raise Absent(f"no library of {package} has an instruction cpuid that could be replaced")


def without_cpuid(library: Path) -> int:
    """Replace each `cpuid` in the code of a program or library; return how many there were.

    The code is disassembled, as the two bytes of a `cpuid` also occur within other instructions.
    """
    content, count = bytearray(library.read_bytes()), 0
    sections = _sections(library)
    for address in _cpuids(library):
        begin, offset = next((begin, offset) for size, begin, offset in sections if begin <= address < begin + size)
        place = offset + address - begin
        if content[place : place + 2] != _CPUID:
            raise RuntimeError(f"{library} has no cpuid at {address:#x}, where objdump tells of one")
        content[place : place + 2] = _FAULT
        count += 1
    library.write_bytes(content)
    return count


def _sections(library: Path) -> list[tuple[int, int, int]]:
    """Return size, address and place in the file of each section."""
    table = subprocess.run(["objdump", "-h", library], capture_output=True, text=True, check=True).stdout
    rows = re.findall(r"^ *\d+ \S+ +(\w+) +(\w+) +\w+ +(\w+) ", table, re.MULTILINE)
    return [tuple(int(number, 16) for number in row) for row in rows]


def _cpuids(library: Path) -> list[int]:
    """Return the addresses of the instructions `cpuid`."""
    command = ["objdump", "-d", "--no-show-raw-insn", library]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        found = [line.split(":", 1)[0] for line in process.stdout if line.rstrip().endswith("\tcpuid")]
    if process.returncode:
        raise RuntimeError(f"objdump cannot read {library}")
    return [int(address, 16) for address in found]
