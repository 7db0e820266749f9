"""The build of the native library, for setup.py, which loads this file by its path, and for the loader.

This file imports only the standard library. The native library has two parts, each a shared object: `csrc/cpu/`,
compiled by a C++ compiler for several instruction sets, and `csrc/cuda/`, compiled by nvcc.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Set
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event

#: The parts, and their files.
LIBRARIES = {"cpu": "libclvp_fast.so", "cuda": "libclvp_fast_cuda.so"}
RECORD, LOG, HEADER = "build.json", "build.log", "clvp_fast.h"

# NaN and infinity keep their meaning: no -ffast-math.
_NUMERICS = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra", *_NUMERICS]
STATIC_FLAGS = ["-static-libstdc++", "-static-libgcc"]
# Linked code is hidden from others, and unused code is left out, as it may need a newer glibc.
_HIDDEN = ["-Xlinker", "--exclude-libs=ALL", "-Xlinker", "--gc-sections"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
_AVX2 = ["-mavx2", "-mfma"]
ISA_FLAGS = {
    "avx512bf16": [*_AVX512, "-mavx512bf16"],
    "avx512vnni": [*_AVX512, "-mavx512vnni"],
    "avx512": _AVX512,
    "avxvnni": [*_AVX2, "-mavxvnni"],
    "avx2": _AVX2,
    "portable": [],
}
# Sets without code of their own for most files use that of these.
_ISA_NEEDS = {"avx512bf16": {"avx512vnni", "avx512"}, "avx512vnni": {"avx512"}, "avxvnni": {"avx2"}}
# The flags in /proc/cpuinfo of a CPU with an instruction set; csrc/cpu/dispatch.cpp tests the same.
_CPU_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_CPU_AVX2 = {"avx2", "fma"}
_CPU_FLAGS = {
    "avx512bf16": _CPU_AVX512 | {"avx512_vnni", "avx512_bf16"},
    "avx512vnni": _CPU_AVX512 | {"avx512_vnni"},
    "avx512": _CPU_AVX512,
    "avxvnni": _CPU_AVX2 | {"avx_vnni"},
    "avx2": _CPU_AVX2,
    "portable": set(),
}
# avx512bf16 is faster only for products of bfloat16, the sets with VNNI only for products of 8 bits. The files that
# compile slowest come first.
_PRODUCTS = (
    "mlp",
    "window_block",
    "panel_linear",
    "linear",
    "window_attention",
    "paged_decode",
    "paged_prefill",
    "rotary_attention",
)
_INTEGERS = ("int8_linear",)
ISA_SOURCES = dict.fromkeys(ISA_FLAGS, ("log_mel", *_PRODUCTS, *_INTEGERS, "sample", "norm")) | {
    "avx512bf16": (*_PRODUCTS, "norm"),
    "avx512vnni": _INTEGERS,
    "avxvnni": _INTEGERS,
}
_STEMS = (*_PRODUCTS[:2], "log_mel", *_PRODUCTS[2:], *_INTEGERS, "sample", "norm")
CUDA_SOURCES = ("log_mel", "persistent_decode")
_HOST_FLAGS = "-Xcompiler=-fPIC,-pthread,-fvisibility=hidden"
# --threads 0: the architectures are compiled side by side on all cores.
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "--threads=0", "-Xptxas=-v,--warn-on-spills", _HOST_FLAGS]
ARCHITECTURES = (80, 90, 100)
# Every machine with glibc has these. A wheel that needs no others is tagged by the version of glibc.
_GLIBC = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1"}


class BuildError(RuntimeError):
    """The library cannot be compiled. The message is one sentence; `log` is the compilers' output, perhaps empty."""

    def __init__(self, message: str, log: str = ""):
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Toolchain:
    """The compilers of a part, and what they compile for.

    `machine` is the processor's architecture; `static` says whether the C++ runtime is linked statically.
    """

    cxx: tuple[str, ...]
    cxx_version: str
    machine: str
    isas: tuple[str, ...]
    static: bool = False
    nvcc: str | None = None
    nvcc_version: str | None = None
    architectures: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.cxx_version + (f" and nvcc {self.nvcc_version}" if self.nvcc else "")


def find_toolchain(part: str = "cpu", elsewhere: bool = False) -> Toolchain:
    """Find `CXX`, else g++, c++ or clang++ of PATH; for CUDA also nvcc of `CUDA_HOME`, PATH or /usr/local/cuda.

    `elsewhere`: the library is also for other machines: it has all instruction sets of the architecture, and depends on
    no C++ runtime.

    Raises:
        BuildError: there is no compiler that works.
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
    cxx[0] = os.path.abspath(shutil.which(cxx[0]) or cxx[0])  # the compiler runs in another folder
    version = _output([*cxx, "--version"]).partition("\n")[0]
    if not version:
        raise BuildError(f"{shlex.join(cxx)} is no C++ compiler that works: install g++, or name another in CXX")
    machine = _output([*cxx, "-dumpmachine"]).partition("-")[0]
    cuda = _find_nvcc() if part == "cuda" else {}
    if reason := cuda.pop("no_cuda", None):
        raise BuildError(reason)
    return Toolchain(tuple(cxx), version, machine, _isas_of(machine, elsewhere), elsewhere, **cuda)


def _isas_of(machine: str, elsewhere: bool) -> tuple[str, ...]:
    if machine != "x86_64":
        return ("portable",)
    here = machine == platform.machine() and not elsewhere
    return cpu_isas() if here else tuple(ISA_FLAGS)


def cpu_isas() -> tuple[str, ...]:
    """Return the instruction sets of this x86 CPU, the best first; all of them if the system does not say."""
    try:
        flags = re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        flags = None
    return tuple(isa for isa in ISA_FLAGS if flags is None or _CPU_FLAGS[isa] <= set(flags[1].split()))


def _find_nvcc() -> dict:
    """Return fields of a `Toolchain`; without an nvcc that works, `no_cuda` says why."""
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc, where = shutil.which("nvcc", path=os.path.join(home, "bin")), f"in CUDA_HOME ({home})"
    else:
        nvcc, where = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin"), "on PATH"
    version = re.search(r"V([\d.]+)", _output([nvcc, "--version"])) if nvcc else None
    known = _output([nvcc, "--list-gpu-code"]).split() if nvcc and version else []
    architectures = tuple(arch for arch in ARCHITECTURES if f"sm_{arch}" in known)
    if version and architectures:
        return {"nvcc": nvcc, "nvcc_version": version[1], "architectures": architectures}
    absent = f"{nvcc} compiles for none of its architectures" if nvcc else f"there is no nvcc {where}"
    return {"nvcc": None, "no_cuda": absent}


def _output(command: list[str]) -> str:
    """Return the output of `command`, or nothing if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def compile_commands(csrc: Path, tools: Toolchain, part: str = "cpu", version: str = "") -> dict[str, list[str]]:
    """Return each object file with the command that makes it, for the folder where it runs; the slowest first.

    `version` is what the library answers to `clvp_fast_version`.
    """
    cxx = [*tools.cxx, *CXX_FLAGS]
    commands = {}
    if part == "cpu":
        for stem in _STEMS:
            for isa in (isa for isa in tools.isas if stem in ISA_SOURCES[isa]):
                flags = [f"-DCLVP_FAST_ISA={isa}", *ISA_FLAGS[isa]]
                name = f"{stem}_{isa}.o"
                commands[name] = [*cxx, *flags, "-c", f"{csrc}/cpu/{stem}.cpp", "-o", name]
        has = [f"-DCLVP_FAST_HAS_{isa.upper()}" for isa in tools.isas]
        commands["dispatch.o"] = [*cxx, *has, "-c", f"{csrc}/cpu/dispatch.cpp", "-o", "dispatch.o"]
        commands["interface.o"] = [*cxx, "-c", f"{csrc}/cpu/interface.cpp", "-o", "interface.o"]
    else:
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in tools.architectures]
        newest = tools.architectures[-1]
        targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        nvcc = [tools.nvcc, *_host_compiler(tools), *NVCC_FLAGS, *targets]
        for stem in CUDA_SOURCES:
            commands[f"{stem}.o"] = [*nvcc, "-c", f"{csrc}/cuda/{stem}.cu", "-o", f"{stem}.o"]
    named = f'-DCLVP_FAST_VERSION="{version}"'
    commands["version.o"] = [*cxx, named, "-c", f"{csrc}/version.cpp", "-o", "version.o"]
    return commands


def link_command(objects: list[str], tools: Toolchain, part: str = "cpu") -> list[str]:
    """Return the command that links the library. nvcc links its runtime statically, because torch may have another."""
    flags = ["-pthread", *(STATIC_FLAGS if tools.static else [])]
    if part == "cuda":
        linker = [tools.nvcc, *_host_compiler(tools), "-cudart=static", "-Xcompiler=" + ",".join(flags)]
    else:
        linker = [*tools.cxx, *flags]
    return [*linker, "-shared", *objects, *(_HIDDEN if tools.static else []), "-o", LIBRARIES[part]]


def _host_compiler(tools: Toolchain) -> list[str]:
    """Return nvcc's option for a compiler of one word; with a longer CXX, as `ccache g++`, nvcc keeps its default."""
    return ["-ccbin", tools.cxx[0]] if len(tools.cxx) == 1 else []


def content_hash(csrc: Path, tools: Toolchain, part: str = "cpu", version: str = "") -> str:
    """Return 16 hexadecimal digits that change with the part's sources, flags, compilers and the version."""
    commands = compile_commands(Path("csrc"), tools, part, version)
    link = link_command(list(commands), tools, part)
    digest = hashlib.sha256(json.dumps([platform.system(), commands, link, asdict(tools)]).encode())
    for name, content in sorted(part_sources(csrc, tools, part).items()):
        digest.update(f"\n{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def part_sources(csrc: Path, tools: Toolchain, part: str = "cpu") -> dict[str, bytes]:
    """Return the compiled files of a part in `csrc` and the files that they include, by their paths there."""
    commands = compile_commands(Path("csrc"), tools, part)
    left = {word.removeprefix("csrc/") for command in commands.values() for word in command if word.startswith("csrc/")}
    found = {}
    while left:
        name = left.pop()
        if name in found or not (csrc / name).is_file():
            continue
        found[name] = (csrc / name).read_bytes()
        included = re.findall(r'^\s*#\s*include\s+"([^"]+)"', found[name].decode(errors="replace"), re.MULTILINE)
        left |= {os.path.normpath(Path(name).parent / other) for other in included}
    return found


def build(
    csrc: Path,
    folder: Path,
    tools: Toolchain,
    part: str = "cpu",
    version: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Compile a part of `csrc` into the existing `folder`: the library, its header, the compilers' log, a record.

    An instruction set that the compiler does not know is left out. `progress` is called with the number of compiled
    files and of all files.

    Returns:
        The record: the toolchain's fields, `left_out` (names of instruction sets) and the library's `sha256`.

    Raises:
        BuildError: it does not compile or link; `log` has the compilers' output.
    """
    work = folder / "objects"
    work.mkdir()
    wanted, tools = tools.isas, _known(tools, work)
    commands = compile_commands(csrc.resolve(), tools, part, version)
    log = _run_all(commands, work, progress)
    if all((work / name).exists() for name in commands):
        log += _run(link_command(list(commands), tools, part), work)
    library = folder / LIBRARIES[part]
    if not (work / library.name).exists():
        raise BuildError(f"{tools} did not compile it", log)
    os.replace(work / library.name, library)
    library.chmod(0o755)
    shutil.copyfile(csrc / HEADER, folder / HEADER)
    shutil.rmtree(work)
    left_out = [isa for isa in wanted if isa not in tools.isas]
    record = asdict(tools) | {"left_out": left_out, "sha256": sha256(library)}
    (folder / LOG).write_text(log, encoding="utf-8")
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _known(tools: Toolchain, folder: Path) -> Toolchain:
    """Return `tools` without options that the C++ compiler lacks: instruction sets, a static C++ runtime."""

    def works(flags: list[str], cpu: Set[str] = frozenset()) -> bool:
        # dispatch.cpp asks the CPU by these names, which a compiler may not know.
        asked = "".join(f' && __builtin_cpu_supports("{flag.replace("_", "")}")' for flag in sorted(cpu))
        (folder / "probe.cpp").write_text(f"int clvp_fast_probe() {{ return 1{asked}; }}\n")
        _run([*tools.cxx, "-shared", "-fPIC", *flags, "probe.cpp", "-o", "probe.so"], folder)
        found = (folder / "probe.so").exists()
        (folder / "probe.so").unlink(missing_ok=True)
        return found

    isas = [isa for isa in tools.isas if not ISA_FLAGS[isa] or works(ISA_FLAGS[isa], _CPU_FLAGS[isa])]
    isas = [isa for isa in isas if _ISA_NEEDS.get(isa, set()) <= set(isas)]
    return replace(tools, isas=tuple(isas), static=tools.static and works([*STATIC_FLAGS, *_HIDDEN]))


def platform_tag(libraries: list[Path], tag: str) -> str:
    """Return the manylinux form of `tag`, such as linux_x86_64, for the oldest glibc that `libraries` can run on.

    The tag is unchanged if they need another library, or if there is no objdump to find out.
    """
    said = [_output(["objdump", "-p", str(library)]) for library in libraries]
    needed = {name for text in said for name in re.findall(r"^\s*NEEDED\s+(\S+)", text, re.MULTILINE)}
    minors = [int(minor) for text in said for minor in re.findall(r"\bGLIBC_2\.(\d+)", text)]
    others = {name for name in needed - _GLIBC if not name.startswith("ld-linux")}
    return re.sub("^linux_", f"manylinux_2_{max(minors)}_", tag) if minors and all(said) and not others else tag


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run_all(commands: dict[str, list[str]], folder: Path, progress: Callable[[int, int], None]) -> str:
    """Run the commands in `folder`, one per core, and return their output. After a failure no other command begins."""
    stopped = Event()

    def run(name: str) -> str:
        if stopped.is_set():
            return ""
        said = _run(commands[name], folder)
        if not (folder / name).exists():
            stopped.set()
        return said

    progress(0, len(commands))
    with ThreadPoolExecutor(_cores()) as threads:
        runs = [threads.submit(run, name) for name in commands]
        try:
            for done, _ in enumerate(as_completed(runs), start=1):
                progress(done, len(runs))
        except BaseException:
            stopped.set()
            raise
    return "".join(run.result() for run in runs)


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(command: list[str], folder: Path) -> str:
    """Run a command, and return it with its output. Its output file shows whether it succeeded."""
    try:
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        printed = done.stdout.decode(errors="replace")
    except OSError as error:
        printed = f"{error}\n"
    return f"$ {shlex.join(command)}\n{printed}"
