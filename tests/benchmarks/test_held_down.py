"""Where our kernels are held down to AVX2, so are the rivals: what CPUID tells them, and what their threads use."""

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import decode_rivals, decode_step
from benchmarks.decode_rivals import RIVALS
from benchmarks.providers import Absent
from benchmarks.rivals import (
    ctranslate2_generator,
    decoder_process,
    held_down,
    llama_avx2,
    masked_cpuid,
    onnx_prompt,
    onnx_runtime,
    sweep,
)
from benchmarks.tiers import Tier
from clvp_fast.native import build
from tests.benchmarks import pretended_rival
from tests.kit.isa import cpu_flags, needs_compiler

SHAPE = {"candidates": 2, "text_tokens": 7, "stored": 9}
# The two bytes of a cpuid also stand in the number 0x00A20F00.
PROGRAM = r"""
#include <cpuid.h>
#include <signal.h>
#include <stdio.h>

int main(int count, char **arguments) {
    unsigned eax, ebx, ecx, edx;
    volatile unsigned number = 0x00A20F00;
    __cpuid_count(0, 0, eax, ebx, ecx, edx);
    printf("%x %x %x %x %x ", number, eax, ebx, ecx, edx);
    __cpuid_count(7, 0, eax, ebx, ecx, edx);
    printf("avx2:%u avx512f:%u vnni:%u fp16:%u amx:%u ", ebx >> 5 & 1, ebx >> 16 & 1, ecx >> 11 & 1, edx >> 23 & 1,
           edx >> 24 & 1);
    __cpuid_count(7, 1, eax, ebx, ecx, edx);
    printf("avx_vnni:%u bf16:%u\n", eax >> 4 & 1, eax >> 5 & 1);
    fflush(stdout);
    if (count > 1) arguments[1][0] == 't' ? __builtin_trap() : (void)raise(SIGILL);
    return 0;
}
"""
# It works without an end, with registers of AVX-512 if it is compiled for these, and writes a byte after 0.4 s.
WORK = r"""
#include <time.h>
#include <unistd.h>

int main() {
    volatile float kept;
    float numbers[1024] = {1};
    for (bool written = false;; kept = numbers[7]) {
        for (int round = 0; round < 1000; round++)
            for (int n = 0; n < 1024; n++) numbers[n] = numbers[n] * 1.5f + 1;
        if (!written && clock() > 4 * CLOCKS_PER_SEC / 10) written = write(1, numbers, 1) == 1;
    }
}
"""

needs_tools = pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.system() != "Linux" or shutil.which("objdump") is None,
    reason="needs x86-64 Linux and objdump",
)


@pytest.fixture(autouse=True)
def avx2_is_forced(monkeypatch):
    monkeypatch.setattr(held_down, "cpu_facts", lambda: {"isa_forced": True, "isa": "avx2"})


def compiled(source: str, target: Path, *flags: str) -> Path:
    command = [*build.find_toolchain().cxx, "-O3", "-x", "c++", "-", "-o", str(target), *flags]
    subprocess.run(command, input=source, text=True, check=True)
    return target


def told(program: Path, *arguments: str, preloaded: bool = True) -> tuple[list[str], dict[str, int], int]:
    """Return a program's numbers, the bits of CPUID that it prints, and its status."""
    environment = os.environ | ({"LD_PRELOAD": str(masked_cpuid.answering_library())} if preloaded else {})
    done = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True)
    words = done.stdout.split()
    bits = dict(word.split(":") for word in words if ":" in word)
    return [word for word in words if ":" not in word], {name: int(bit) for name, bit in bits.items()}, done.returncode


@needs_tools
@needs_compiler
def test_cpuid_tells_of_a_cpu_with_avx2(tmp_path):
    program = compiled(PROGRAM, tmp_path / "program")
    numbers, free, status = told(program, preloaded=False)
    flags = cpu_flags()
    names = {"avx512f": "avx512f", "vnni": "avx512_vnni", "avx_vnni": "avx_vnni", "bf16": "avx512_bf16"}
    names |= {"avx2": "avx2", "fp16": "avx512_fp16", "amx": "amx_tile"}
    assert status == 0 and free == {name: int(flag in flags) for name, flag in names.items()}
    assert masked_cpuid.without_cpuid(program) == 3 and masked_cpuid.without_cpuid(program) == 0
    assert told(program) == (numbers, dict.fromkeys(free, 0) | {"avx2": free["avx2"]}, 0)
    assert told(program, preloaded=False)[-1] == -signal.SIGILL  # nobody answers


@needs_tools
@needs_compiler
@pytest.mark.parametrize("how", ["trap", "raised"])
def test_another_illegal_instruction_ends_the_process(tmp_path, how):
    program = compiled(PROGRAM, tmp_path / "program")
    masked_cpuid.without_cpuid(program)
    assert told(program)[-1] == 0 and told(program, how)[-1] == -signal.SIGILL


def package_of(tmp_path: Path, monkeypatch, source: str) -> Path:
    """Install a package `asks` of one library in a folder, and return the library."""
    folder = tmp_path / "installed/asks"
    folder.mkdir(parents=True)
    library = compiled(source, folder / "asks.so", "-shared", "-fPIC")
    lines = ["import ctypes, pathlib", "asks = ctypes.CDLL(pathlib.Path(__file__).with_name('asks.so')).asks"]
    (folder / "__init__.py").write_text("\n".join(lines))
    monkeypatch.setenv("CLVP_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(masked_cpuid, "version", lambda package: "1.0")
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    return library


@needs_tools
@needs_compiler
def test_a_package_is_copied_and_the_installed_one_stays(tmp_path, monkeypatch):
    source = '#include <cpuid.h>\nextern "C" int asks() { unsigned a, b, c, d; __cpuid_count(7, 0, a, b, c, d);'
    library = package_of(tmp_path, monkeypatch, source + " return (b >> 5 & 1) + 2 * (b >> 16 & 1); }")
    before = library.read_bytes()
    command = [sys.executable, "-c", "import asks; print(asks.asks(), asks.__file__)"]
    for environment, folder, avx512 in (({}, "installed", "avx512f" in cpu_flags()), (None, "asks-1.0-avx2", False)):
        environment = masked_cpuid.variables("asks") if environment is None else environment
        words = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True).stdout.split()
        assert int(words[0]) == ("avx2" in cpu_flags()) + 2 * avx512 and Path(words[1]).parts[-3] == folder
    assert library.read_bytes() == before


@needs_tools
@needs_compiler
def test_a_package_that_never_asks_is_no_rival(tmp_path, monkeypatch):
    package_of(tmp_path, monkeypatch, 'extern "C" int asks() { return 0x00A20F00; }')
    with pytest.raises(Absent, match=r"^no library of asks has an instruction cpuid"):
        masked_cpuid.variables("asks")


def test_an_absent_rival_tells_which_tool_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("CLVP_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(llama_avx2, "version", lambda package: "1.0")
    with pytest.raises(Absent, match=r"python -m benchmarks\.rivals\.llama_avx2 compiles those of AVX2$"):
        llama_avx2.variables()

    def no_compiler():
        raise build.BuildError("there is no C++ compiler: install g++, or name one in CXX")

    steps = (
        (platform, "machine", lambda: "x86_64", None),
        (platform, "system", lambda: "Linux", None),
        (shutil, "which", lambda name: name, None),
        (build, "find_toolchain", no_compiler, "small library, and there is no C.. compiler"),
        (shutil, "which", lambda name: None, "objdump, which is missing: install binutils"),
        (platform, "machine", lambda: "aarch64", "on x86-64 Linux only"),
    )
    for module, name, stand_in, sentence in steps:
        monkeypatch.setattr(module, name, stand_in)
        if sentence:
            with pytest.raises(Absent, match=sentence):
                masked_cpuid.variables("asks")


@needs_compiler
@pytest.mark.skipif("avx512f" not in cpu_flags(), reason="this CPU has no AVX-512")
@pytest.mark.skipif(not Path("/proc/self/arch_status").exists(), reason="this Linux does not tell of AVX-512")
@pytest.mark.parametrize("flags", [["-mavx512f", "-mprefer-vector-width=512"], ["-mavx2"]], ids=["avx512", "avx2"])
def test_a_process_that_uses_avx512_is_refused(tmp_path, flags, monkeypatch):
    program = compiled(WORK, tmp_path / "program", *flags)
    monkeypatch.setattr(pretended_rival, "held_down", lambda isa: {})
    environment = os.environ | held_down.held_down(pretended_rival)
    with subprocess.Popen([program], stdout=subprocess.PIPE, env=environment) as process:
        process.stdout.read(1)
        begin = time.monotonic()
        time.sleep(0.3)
        try:
            if "-mavx2" in flags:
                held_down.require_no_avx512(process.pid, time.monotonic() - begin)
            else:
                with pytest.raises(RuntimeError, match="it used AVX-512"):
                    held_down.require_no_avx512(process.pid, time.monotonic() - begin)
        finally:
            process.kill()


def test_a_rivals_process_is_held_down_and_watched(monkeypatch):
    watched = []
    monkeypatch.setattr(decoder_process, "require_no_avx512", lambda *arguments: watched.append(arguments))
    rival = decode_rivals.Rival(pretended_rival, "", Tier("pretended", torch.float32, 1.0))
    for forced in (True, False):
        monkeypatch.setattr(held_down, "cpu_facts", lambda forced=forced: {"isa_forced": forced, "isa": "avx2"})
        decoder = decode_step.process_of(rival, SHAPE, True, {})
        decoder(torch.tensor([1, 2]))
        environment = Path(f"/proc/{decoder._process.pid}/environ").read_bytes().split(b"\0")
        assert (b"LIBRARY_MAX_ISA=AVX2" in environment) == forced and any(x.startswith(b"PATH=") for x in environment)
        assert [pid for pid, _ in watched] == [decoder._process.pid] * forced
        assert all(0 < seconds < 10 for _, seconds in watched)
        watched.clear()
        decoder.end()


def test_no_rival_is_compared_at_a_set_that_it_cannot_be_held_down_to(monkeypatch):
    monkeypatch.setattr(held_down, "cpu_facts", lambda: {"isa_forced": True, "isa": "avx512"})
    for module in {pretended_rival, onnx_prompt, *(rival.module for rival in RIVALS)}:
        with pytest.raises(Absent, match="cannot be held down to avx512, the instruction set of ours"):
            held_down.held_down(module)
    assert onnx_prompt.held_down is onnx_runtime.held_down


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avxvnni", "avx512bf16"])
def test_weights_of_dynamic_int8_have_7_bits_where_8_would_overflow(monkeypatch, isa):
    monkeypatch.setattr(held_down, "cpu_facts", lambda: {"isa": isa})
    monkeypatch.setattr(decoder_process, "built", lambda name, layers, build: Path(name))
    found = [onnx_runtime.quantised("onnx", kind, None, Path("exact")) for kind in ("float32", "int8", "blocks")]
    int8 = "onnx-int8" if "vnni" in isa or "bf16" in isa else "onnx-int8-of-7-bits"
    assert found == [Path("exact"), Path(int8, "exact"), Path("onnx-blocks/exact")]


@pytest.mark.parametrize("error, count", [(0.9, 1), (1.1, 0), (float("nan"), 0)])
def test_a_sweep_has_no_row_of_settings_that_do_other_work(monkeypatch, error, count):
    monkeypatch.setattr(decode_step, "judged", lambda *arguments: (error, {}))
    rival = decode_rivals.Rival(pretended_rival, "", Tier("pretended", torch.float32, 1.0))
    assert len(sweep.swept(rival, 2, smoke=True)) == count


@pytest.mark.slow
@pytest.mark.parametrize("rival", RIVALS, ids=[rival.name for rival in RIVALS])
def test_a_rival_that_is_held_down_does_the_same_work(rival):
    """Judge each setting; a step that uses AVX-512 is refused. oneDNN's sums overflow in CTranslate2 without MKL."""
    if missing := [name for name in rival.module.PACKAGES if find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    settings = rival.module.SETTINGS[rival.kind]
    try:
        decoder = decode_step.process_of(rival, SHAPE, True, settings[0])
    except Absent as reason:
        pytest.skip(str(reason))
    decoder(torch.tensor([1, 2]))
    theirs = Path(f"/proc/{decoder._process.pid}/maps").read_text()
    decoder.end()
    assert ("-avx2/" in theirs) == (rival.module is not ctranslate2_generator)
    right = [row["settings"] for row in sweep.swept(rival, 2, smoke=True)]
    assert right == [one for one in settings if rival.name != "CTranslate2 int8" or one["mkl"]]
