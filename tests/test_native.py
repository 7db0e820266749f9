"""The native library is found, compiled once and whole, and its absence is one sentence. Stand-ins are compiled."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clvp_fast import native, native_build

ROOT = Path(__file__).resolve().parents[1]
CPU = """
#include "clvp_fast.h"
#include <thread>
extern "C" {
#pragma GCC visibility push(default)
int clvp_fast_log_mel_cpu(const clvp_fast_log_mel *, int32_t, const char *) { std::thread([] {}).join(); return -7; }
int clvp_fast_sample_cpu(const clvp_fast_sample *, int32_t, const char *) { return 0; }
int clvp_fast_linear_cpu(const clvp_fast_linear *, int32_t, const char *) { return 0; }
int clvp_fast_mlp_cpu(const clvp_fast_mlp *, int32_t, const char *) { return 0; }
int clvp_fast_window_attention_cpu(const clvp_fast_window_attention *, int32_t, const char *) { return 0; }
int clvp_fast_window_block_cpu(const clvp_fast_window_block *, int32_t, const char *) { return 0; }
int clvp_fast_paged_decode_cpu(const clvp_fast_paged_decode *, int32_t, const char *) { return 0; }
const char *clvp_fast_cpu_isa(void) { return "stand-in"; }
int clvp_fast_has_isa(const char *) { return 0; }
int clvp_fast_choose_isa(const char *name) { return name ? -8 : 0; }
const char *clvp_fast_error(int code) { return code == -7 ? "no memory, says the stand-in" : "another"; }
}
"""
CUDA = """
#include "clvp_fast.h"
__global__ void scale(float *x) { x[threadIdx.x] *= 2; }
#pragma GCC visibility push(default)
int clvp_fast_log_mel_cuda(const clvp_fast_log_mel *call, void *stream) {
    scale<<<1, 32, 0, (cudaStream_t)stream>>>((float *)call->features);
    return cudaGetLastError();
}
"""
MORE_CUDA = """
#include "clvp_fast.h"
#pragma GCC visibility push(default)
int clvp_fast_persistent_decode_cuda(const clvp_fast_persistent_decode *, void *) { return 0; }
int64_t clvp_fast_persistent_decode_workspace(const clvp_fast_persistent_decode *) { return 256; }
"""
NO_NVCC = "/nonexistent"

needs_nvcc = pytest.mark.skipif(native_build._find_nvcc()["nvcc"] is None, reason="there is no nvcc")


def forget():
    for cached in (native.missing, native._loaded, native.folder):
        cached.cache_clear()


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """The folder of a tiny library's sources, which the loader takes for csrc/; an empty cache, and no nvcc."""
    folder = tmp_path / "some csrc"
    folder.mkdir()
    shutil.copy(ROOT / "csrc/clvp_fast.h", folder)
    (folder / "cpu.cpp").write_text(CPU)
    for stem in native_build.ISA_SOURCES["portable"]:
        (folder / f"{stem}_isa.cpp").write_text("namespace { int CLVP_FAST_ISA = 0; }\n")
    (folder / "log_mel_cuda.cu").write_text(CUDA)
    (folder / "persistent_decode_cuda.cu").write_text(MORE_CUDA)
    monkeypatch.setattr(native, "_SOURCES", folder)
    monkeypatch.setenv("CLVP_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_HOME", NO_NVCC)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CLVP_FAST_ISA", raising=False)  # the stand-in has none
    forget()
    yield folder
    forget()


def built_folders(tmp_path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache/native").iterdir() if path.is_dir())


STRUCTURES = {
    "clvp_fast_log_mel": native.LogMelCall,
    "clvp_fast_paged_decode": native.PagedDecodeCall,
    "clvp_fast_linear": native.LinearCall,
    "clvp_fast_mlp": native.MlpCall,
    "clvp_fast_window_attention": native.WindowAttentionCall,
    "clvp_fast_window_block": native.WindowBlockCall,
    "clvp_fast_sample": native.SampleCall,
    "clvp_fast_decoder_layer": native.DecoderLayer,
    "clvp_fast_persistent_decode": native.PersistentDecodeCall,
}


@pytest.mark.parametrize("struct", STRUCTURES)
def test_the_structure_is_the_header_s(struct, tmp_path):
    """The same names in the same order, each at the compiler's own offset; the same numbers of the enums."""
    structure = STRUCTURES[struct]
    header = re.sub(r"/\*.*?\*/", "", (ROOT / "csrc/clvp_fast.h").read_text(), flags=re.DOTALL)
    names = [name for name, _ in structure._fields_]
    declared = header.partition(f"struct {struct} {{")[2].partition("};")[0]
    assert re.findall(r"(\w+)(?:\[\d\])?[;,]", declared) == names
    numbers = ("FLOAT32", "FLOAT64", "INT16", "FLOAT16", "BFLOAT16", "INT8", "NO_ACTIVATION", "GELU_TANH")
    asked = [f"offsetof({struct}, {name})" for name in names]
    asked += [f"sizeof({struct})", *(f"CLVP_FAST_{name}" for name in numbers)]
    printing = "".join(f'std::printf("%d ", int({value}));' for value in asked)
    (tmp_path / "layout.cpp").write_text(
        f'#include "clvp_fast.h"\n#include <cstddef>\n#include <cstdio>\nint main() {{ {printing} }}\n'
    )
    compiler = native_build.find_toolchain().cxx
    subprocess.run([*compiler, f"-I{ROOT / 'csrc'}", "layout.cpp", "-o", "layout"], cwd=tmp_path, check=True)
    printed = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout
    expected = [getattr(structure, name).offset for name in names]
    expected += [ctypes.sizeof(structure), *(getattr(native, name) for name in numbers)]
    assert [int(number) for number in printed.split()] == expected


def test_built_at_first_use_and_found_after(sources, tmp_path, capfd, monkeypatch):
    assert native.missing("cpu") is None
    assert native.library().clvp_fast_cpu_isa() == b"stand-in"
    assert native.library().clvp_fast_log_mel_cpu(ctypes.byref(native.LogMelCall()), 1, None) == -7
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "building the native library (once)" in said
    (folder,) = built_folders(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "build.json",
        "build.log",
        "clvp_fast.h",
        native_build.LIBRARY,
    ]

    forget()
    monkeypatch.setattr(native_build, "build", lambda *_: pytest.fail("it is there already"))
    monkeypatch.setattr(native, "_one_process", lambda *_: pytest.fail("a cache that is only read needs no lock"))
    assert native.missing("cpu") is None
    assert capfd.readouterr().err == ""


def test_a_code_is_raised_with_the_library_s_sentence(sources):
    native.check(0)
    with pytest.raises(RuntimeError, match="no memory, says the stand-in"):
        native.check(-7)


def test_the_hash_changes_with_whatever_changes_the_library(sources, tmp_path, monkeypatch):
    tools = native_build.find_toolchain()
    seen = [native_build.content_hash(sources, tools)]
    assert native_build.content_hash(sources, native_build.find_toolchain()) == seen[0]
    for name in ("cpu.cpp", "clvp_fast.h", "log_mel_cuda.cu"):
        with open(sources / name, "a") as handle:
            handle.write("\n")
        seen.append(native_build.content_hash(sources, tools))
    (sources / "more.cuh").write_text("")
    seen.append(native_build.content_hash(sources, tools))
    (sources / "more.cuh").rename(sources / "moved.cuh")
    seen.append(native_build.content_hash(sources, tools))
    (sources / "notes.md").write_text("says nothing to a compiler")
    assert native_build.content_hash(sources, tools) == seen[-1]
    with monkeypatch.context() as patch:
        patch.setattr(native_build, "CXX_FLAGS", [*native_build.CXX_FLAGS, "-O2"])
        seen.append(native_build.content_hash(sources, tools))
    with monkeypatch.context() as patch:
        patch.setattr(native_build.platform, "machine", lambda: "aarch64")
        seen.append(native_build.content_hash(sources, tools))
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    for version in ("99.1", "99.2"):  # a compiler that is updated in its place
        (tmp_path / "g++").write_text(f"#!/bin/sh\necho g++ {version}\n")
        (tmp_path / "g++").chmod(0o755)
        seen.append(native_build.content_hash(sources, native_build.find_toolchain()))
    assert len(set(seen)) == len(seen)


@needs_nvcc
def test_nvcc_that_appears_makes_a_new_library_with_cuda(sources, tmp_path, monkeypatch):
    assert native.missing("cpu") is None
    why = native.missing("cuda")
    assert "there is no nvcc in CUDA_HOME (/nonexistent)" in why and "build.log" in why
    assert not hasattr(native.library(), "clvp_fast_log_mel_cuda")

    monkeypatch.delenv("CUDA_HOME")
    forget()
    assert native.missing("cuda") is None and native.missing("cpu") is None
    assert native.library().clvp_fast_log_mel_cuda.argtypes is not None
    assert len(built_folders(tmp_path)) == 2
    log = (native.folder() / native_build.LOG).read_text()
    assert all(f"for 'sm_{arch}'" in log for arch in native_build.ARCHITECTURES)
    dump = (native.folder() / native_build.LIBRARY).read_bytes()
    assert b"libcudart.so" not in dump, "the CUDA runtime must be linked statically"

    (sources / "log_mel_cuda.cu").write_text(CUDA + "does not compile\n")
    forget()
    assert native.missing("cpu") is None
    assert "did not compile the CUDA part" in native.missing("cuda")
    assert "does not compile" in (native.folder() / native_build.LOG).read_text()


@pytest.mark.parametrize("device", ["mps", "meta"])
def test_other_devices_are_refused(sources, device):
    assert device in native.missing(device)


@pytest.mark.parametrize("compiler", ["/bin/false", "/nonexistent/g++", "no-such-compiler"])
def test_a_compiler_that_does_not_work(sources, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    assert "no C++ compiler that works" in native.missing("cpu") and compiler in native.missing("cpu")
    assert native.missing("cuda") == native.missing("cpu")
    with pytest.raises(native.NativeLibraryError, match="or name another in CXX"):
        native.library()


def test_a_compiler_of_open_quotes(sources, monkeypatch):
    monkeypatch.setenv("CXX", "g++ '")
    assert native.missing("cpu") == "the native library cannot be built: CXX is no command (No closing quotation)"


def test_no_compiler(sources, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native.missing("cpu") == (
        "the native library cannot be built: there is no C++ compiler: install g++, or name one in CXX"
    )


def test_a_failed_build_keeps_its_log_and_is_not_repeated(sources, tmp_path, monkeypatch, capfd):
    (sources / "log_mel_isa.cpp").write_text("int 1avx();\n")
    why = native.missing("cpu")
    (log,) = (tmp_path / "cache/native").glob("*.log")
    assert str(log) in why and "\n" not in why and "did not compile it" in why
    assert "1avx" in log.read_text()
    assert built_folders(tmp_path) == []
    assert "building" in capfd.readouterr().err

    forget()
    with monkeypatch.context() as patch:
        patch.setattr(native_build, "build", lambda *_: pytest.fail("it failed before"))
        assert str(log) in native.missing("cpu")
    (sources / "log_mel_isa.cpp").write_text("namespace { int CLVP_FAST_ISA = 0; }\n")
    forget()
    assert native.missing("cpu") is None


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "record"])
def test_a_damaged_library_is_built_anew(sources, damage):
    library = native.folder() / native_build.LIBRARY
    whole = library.read_bytes()
    if damage == "gone":
        library.unlink()
    elif damage == "record":
        (library.parent / native_build.RECORD).write_text("{")
    else:
        library.write_bytes(whole[: len(whole) // 2 if damage == "cut" else 0])
    forget()
    assert native.missing("cpu") is None
    assert native.library().clvp_fast_cpu_isa() == b"stand-in"
    assert library.stat().st_size == len(whole)


def test_a_cache_that_cannot_be_written(sources, tmp_path):
    (tmp_path / "cache").write_text("a file")
    why = native.missing("cpu")
    assert "a file stands where the folder should be" in why and "CLVP_FAST_CACHE" in why and "\n" not in why


def test_a_user_without_a_home(sources, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CLVP_FAST_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert native.missing("cpu") == "the native library cannot be built: Could not determine home directory."


def test_an_installation_without_a_library(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "_SOURCES", tmp_path / "none")
    monkeypatch.setattr(native, "_PACKAGED", tmp_path / "empty")
    assert "reinstall it where there is a C++ compiler" in native.missing("cpu")


def test_without_ninja_the_compilers_run_one_by_one(sources, tmp_path, monkeypatch):
    real = shutil.which
    monkeypatch.setattr(
        native_build.shutil, "which", lambda name, **how: None if name == "ninja" else real(name, **how)
    )
    assert native.missing("cpu") is None
    log = (native.folder() / native_build.LOG).read_text()
    commands = re.findall(r"^\$ (.*)", log, re.MULTILINE)
    assert len(commands) == len(native_build.compile_commands(sources, native_build.find_toolchain())) + 1
    assert all("g++" in command for command in commands)


def test_two_processes_at_once_leave_one_whole_library(sources, tmp_path):
    code = f"""
from pathlib import Path
from clvp_fast import native
native._SOURCES = Path({str(sources)!r})
print(native.missing("cpu"), native.library().clvp_fast_cpu_isa().decode())"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in pair]
    assert [out for out, _ in said] == ["None stand-in\n"] * 2, said
    assert sum("building" in err for _, err in said) == 1, "the other one waits"
    assert len(built_folders(tmp_path)) == 1
    assert native.missing("cpu") is None


def test_nothing_heavy_is_loaded():
    code = "import sys; from clvp_fast import native; print([n for n in ('torch', 'numpy') if n in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_command_says_what_there_is(sources, capsys):
    assert native.main([]) == 0
    said = capsys.readouterr().out
    assert str(native.folder() / native_build.LIBRARY) in said and "stand-in here" in said and "no nvcc" in said
    assert native.main(["--require", "cuda"]) == 1
    assert "there is no nvcc" in capsys.readouterr().err


def test_an_instruction_set_that_the_library_lacks_is_refused(sources):
    with pytest.raises(ValueError, match="'avx2', which this CPU lacks or the library was built without"):
        native.choose_isa("avx2")
