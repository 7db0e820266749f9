"""How the native library is compiled: one description for setup.py, which loads this file by its path, and native.py.

Imports the standard library alone. The library is `csrc/` compiled by a C++ compiler, and by nvcc where there is one.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

LIBRARY, RECORD, LOG, HEADER = "libclvp_fast.so", "build.json", "build.log", "clvp_fast.h"

# NaN and infinity keep their meaning: no -ffast-math.
_NUMERICS = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra", *_NUMERICS]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
ISA_FLAGS = {
    "avx512bf16": [*_AVX512, "-mavx512bf16"],
    "avx512": _AVX512,
    "avx2": ["-mavx2", "-mfma"],
    "portable": [],
}
# avx512bf16 has more to offer to products of bfloat16 alone.
_PRODUCTS = ("paged_attention", "linear", "mlp", "window_attention", "window_block")
ISA_SOURCES = dict.fromkeys(ISA_FLAGS, ("log_mel", *_PRODUCTS, "sample")) | {"avx512bf16": _PRODUCTS}
CUDA_SOURCES = ("log_mel", "persistent_decode")
_HOST_FLAGS = "-Xcompiler=-fPIC,-pthread,-fvisibility=hidden"
# --threads 0: the architectures are compiled side by side on all cores.
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "--threads=0", "-Xptxas=-v,--warn-on-spills", _HOST_FLAGS]
ARCHITECTURES = (80, 90, 100)


class BuildError(RuntimeError):
    """The library cannot be compiled; the message is one sentence, `log` what the compilers said (or empty)."""

    def __init__(self, message: str, log: str = ""):
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Toolchain:
    """The compilers of this machine. Without nvcc, `nvcc` is None and `no_cuda` says why."""

    cxx: tuple[str, ...]
    cxx_version: str
    nvcc: str | None
    nvcc_version: str | None
    architectures: tuple[int, ...]
    no_cuda: str | None


def find_toolchain() -> Toolchain:
    """`CXX`, else g++, c++ or clang++ of PATH; nvcc of `CUDA_HOME`, else of PATH or /usr/local/cuda.

    Raises:
        BuildError: there is no C++ compiler that works.
    """
    if os.name == "nt":
        raise BuildError("it is made for Linux and macOS")
    try:
        chosen = shlex.split(os.environ.get("CXX") or "")
    except ValueError as error:
        raise BuildError(f"CXX is no command ({error})") from error
    cxx = chosen or [name for name in ("g++", "c++", "clang++") if shutil.which(name)][:1]
    if not cxx:
        raise BuildError("there is no C++ compiler: install g++, or name one in CXX")
    cxx[0] = os.path.abspath(shutil.which(cxx[0]) or cxx[0])  # it will run in another folder
    version = _output([*cxx, "--version"]).partition("\n")[0]
    if not version:
        raise BuildError(f"{shlex.join(cxx)} is no C++ compiler that works: install g++, or name another in CXX")
    return Toolchain(tuple(cxx), version, **_find_nvcc())


def _find_nvcc() -> dict:
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc, where = shutil.which("nvcc", path=os.path.join(home, "bin")), f"in CUDA_HOME ({home})"
    else:
        nvcc, where = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin"), "on PATH"
    version = re.search(r"V([\d.]+)", _output([nvcc, "--version"])) if nvcc else None
    known = _output([nvcc, "--list-gpu-code"]).split() if version else []
    architectures = tuple(arch for arch in ARCHITECTURES if f"sm_{arch}" in known)
    if architectures:
        return {"nvcc": nvcc, "nvcc_version": version[1], "architectures": architectures, "no_cuda": None}
    absent = f"{nvcc} compiles for none of its architectures" if nvcc else f"there is no nvcc {where}"
    return {"nvcc": None, "nvcc_version": None, "architectures": (), "no_cuda": absent}


def _output(command: list[str]) -> str:
    """What `command` prints, or nothing if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def compile_commands(csrc: Path, tools: Toolchain) -> dict[str, list[str]]:
    """Object file to the command that makes it, in the folder where the command runs."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    cxx = [*tools.cxx, *CXX_FLAGS]
    only = [] if x86 else ["-DCLVP_FAST_PORTABLE_ONLY"]
    commands = {"cpu.o": [*cxx, *only, "-c", f"{csrc}/cpu.cpp", "-o", "cpu.o"]}
    for isa in ISA_FLAGS if x86 else ["portable"]:
        flags = [*only, f"-DCLVP_FAST_ISA={isa}", *ISA_FLAGS[isa]]
        for stem in ISA_SOURCES[isa]:
            name = f"{stem}_{isa}.o"
            commands[name] = [*cxx, *flags, "-c", f"{csrc}/{stem}_isa.cpp", "-o", name]
    if tools.nvcc:
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in tools.architectures]
        newest = tools.architectures[-1]
        targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        nvcc = [tools.nvcc, *_host_compiler(tools), *NVCC_FLAGS, *targets]
        for name in _cuda_objects():
            commands[name] = [*nvcc, "-c", f"{csrc}/{name[:-2]}.cu", "-o", name]
    return commands


def _cuda_objects() -> list[str]:
    return [f"{stem}_cuda.o" for stem in CUDA_SOURCES]


def link_command(objects: list[str], tools: Toolchain) -> list[str]:
    """The command that makes the library. nvcc links its own runtime statically: torch may carry another."""
    if set(_cuda_objects()) & set(objects):
        linker = [tools.nvcc, *_host_compiler(tools), "-cudart=static", "-Xcompiler=-pthread"]
    else:
        linker = [*tools.cxx, "-pthread"]
    return [*linker, "-shared", *objects, "-o", LIBRARY]


def _host_compiler(tools: Toolchain) -> list[str]:
    """nvcc takes one word for a compiler; where CXX has more, as `ccache g++`, it takes its own default."""
    return ["-ccbin", tools.cxx[0]] if len(tools.cxx) == 1 else []


def content_hash(csrc: Path, tools: Toolchain) -> str:
    """16 hexadecimal digits that change with a source, a flag, a compiler's version or the processor's architecture."""
    commands = compile_commands(Path("csrc"), tools)
    digest = hashlib.sha256()
    described = [platform.system(), platform.machine(), commands, link_command(list(commands), tools), asdict(tools)]
    digest.update(json.dumps(described).encode())
    for path in sorted(csrc.rglob("*")):
        if path.suffix in (".h", ".cuh", ".cpp", ".cu"):
            content = path.read_bytes()
            digest.update(f"\n{path.relative_to(csrc).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def build(csrc: Path, folder: Path, tools: Toolchain) -> dict:
    """Compiles `csrc` into the existing `folder`: the library, its header, the compilers' log, and a record of it all.

    If the CUDA part alone does not compile, the library is made without it, and `no_cuda` of the record says so.

    Returns:
        The record: the toolchain's fields, `no_cuda` (None: the library has its CUDA part) and the library's `sha256`.

    Raises:
        BuildError: the C++ part does not compile or link; `log` has what the compilers said.
    """
    commands = compile_commands(csrc.resolve(), tools)
    work = folder / "objects"
    work.mkdir()
    log = _run_all(commands, work)
    built = [name for name in commands if (work / name).exists()]
    no_cuda = tools.no_cuda
    cuda = set(_cuda_objects())
    if tools.nvcc and not cuda <= set(built):
        no_cuda = f"nvcc {tools.nvcc_version} did not compile the CUDA part"
        built = [name for name in built if name not in cuda]
    failed = set(commands) - set(built) - cuda
    if not failed:
        log += _run(link_command(built, tools), work)
    if failed or not (work / LIBRARY).exists():
        raise BuildError(f"{tools.cxx_version} did not compile it", log)
    os.replace(work / LIBRARY, folder / LIBRARY)
    shutil.copyfile(csrc / HEADER, folder / HEADER)
    shutil.rmtree(work)
    record = asdict(tools) | {"no_cuda": no_cuda, "sha256": sha256(folder / LIBRARY)}
    (folder / LOG).write_text(log, encoding="utf-8")
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run_all(commands: dict[str, list[str]], folder: Path) -> str:
    """Runs the commands in `folder`, side by side where there is ninja; returns what they print."""
    search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    ninja = shutil.which("ninja", path=search)  # pip puts it beside Python, which need not be on PATH
    if ninja is None:
        return "".join(_run(command, folder) for command in commands.values())
    lines = ["rule run", "  command = $line", ""]
    for output, command in commands.items():
        lines += [f"build {output}: run", f"  line = {shlex.join(command).replace('$', '$$')}", ""]
    (folder / "build.ninja").write_text("\n".join(lines), encoding="utf-8")
    return _run([ninja, "-v", "-k", "0"], folder)


def _run(command: list[str], folder: Path) -> str:
    """The command and what it prints. Whether it did its work is seen by its output file."""
    try:
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        printed = done.stdout.decode(errors="replace")
    except OSError as error:
        printed = f"{error}\n"
    return f"$ {shlex.join(command)}\n{printed}"
