"""The native library is found, compiled once and whole, and its absence is one sentence. Stand-ins are compiled."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

from clvp_fast import native
from clvp_fast.io import files
from clvp_fast.native import build, calls
from clvp_fast.native.__main__ import main
from tests.kit.isa import forget_library, needs_compiler, why_no_compiler

ROOT = Path(__file__).resolve().parents[1]
CPU = """
#include "../clvp_fast.h"
#include <thread>
extern "C" {
#pragma GCC visibility push(default)
int clvp_fast_log_mel_cpu(const clvp_fast_log_mel *, int32_t, const char *) { std::thread([] {}).join(); return -7; }
int clvp_fast_sample_cpu(const clvp_fast_sample *, int32_t, const char *) { return 0; }
int clvp_fast_linear_cpu(const clvp_fast_linear *, int32_t, const char *) { return 0; }
int clvp_fast_norm_cpu(const clvp_fast_norm *, int32_t, const char *) { return 0; }
int clvp_fast_calls_cpu(const clvp_fast_call *, int64_t, int32_t, const char *) { return 0; }
int clvp_fast_mlp_cpu(const clvp_fast_mlp *, int32_t, const char *) { return 0; }
int clvp_fast_window_attention_cpu(const clvp_fast_window_attention *, int32_t, const char *) { return 0; }
int clvp_fast_window_block_cpu(const clvp_fast_window_block *, int32_t, const char *) { return 0; }
int clvp_fast_rotary_attention_cpu(const clvp_fast_rotary_attention *, int32_t, const char *) { return 0; }
int clvp_fast_paged_prefill_cpu(const clvp_fast_paged_prefill *, int32_t, const char *) { return 0; }
int clvp_fast_paged_decode_cpu(const clvp_fast_paged_decode *, int32_t, const char *) { return 0; }
const char *clvp_fast_cpu_isa(void) { return "stand-in"; }
int clvp_fast_has_isa(const char *name) { return *name == 'p'; }
int clvp_fast_choose_isa(const char *name) { return name ? -8 : 0; }
const char *clvp_fast_error(int code) { return code == -7 ? "no memory, says the stand-in" : "another"; }
}
"""
CUDA = """
#include "../clvp_fast.h"
__global__ void scale(float *x) { x[threadIdx.x] *= 2; }
#pragma GCC visibility push(default)
int clvp_fast_log_mel_cuda(const clvp_fast_log_mel *call, void *stream) {
    scale<<<1, 32, 0, (cudaStream_t)stream>>>((float *)call->features);
    return cudaGetLastError();
}
"""
MORE_CUDA = """
#include "../clvp_fast.h"
#pragma GCC visibility push(default)
int clvp_fast_persistent_decode_cuda(const clvp_fast_persistent_decode *, void *) { return 0; }
int clvp_fast_cuda_missing(char *, int32_t) { return 0; }
int clvp_fast_log_mel_cuda_missing(int32_t, char *, int32_t) { return 0; }
const char *clvp_fast_cuda_error(int) { return "an error of the stand-in"; }
int64_t clvp_fast_persistent_decode_workspace(const clvp_fast_persistent_decode *) { return 256; }
"""
NO_NVCC = "/nonexistent"

needs_nvcc = pytest.mark.skipif(build._find_nvcc()["nvcc"] is None, reason="there is no nvcc")


def missing(device="cpu"):
    """Return `native.missing` of a process that has asked for nothing yet."""
    forget_library()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return native.missing(device)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Give the sources of a tiny library, which the loader takes for csrc/, an empty cache, and no nvcc."""
    if reason := why_no_compiler():
        pytest.skip(reason)
    folder = tmp_path / "some csrc"
    for inner in ("cpu", "cuda"):
        (folder / inner).mkdir(parents=True)
    for name in ("clvp_fast.h", "version.cpp"):
        shutil.copy(ROOT / "csrc" / name, folder)
    (folder / "cpu/interface.cpp").write_text(CPU)
    (folder / "cpu/dispatch.cpp").write_text("namespace { int nothing; }\n")
    for stem in build.ISA_SOURCES["portable"]:
        (folder / f"cpu/{stem}.cpp").write_text("namespace { int CLVP_FAST_ISA = 0; }\n")
    (folder / "cuda/log_mel.cu").write_text(CUDA)
    (folder / "cuda/persistent_decode.cu").write_text(MORE_CUDA)
    monkeypatch.setattr(native, "_SOURCES", folder)
    monkeypatch.setenv("CLVP_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_HOME", NO_NVCC)
    monkeypatch.setattr(native, "_DRIVER", "libno-such-driver.so")
    monkeypatch.setattr(build, "cpu_isas", lambda: ("portable",))  # as few files as can be
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CLVP_FAST_ISA", raising=False)  # the stand-in has none
    forget_library()
    yield folder
    forget_library()


def built_folders(tmp_path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache/native").iterdir() if path.is_dir())


STRUCTURES = {
    "clvp_fast_log_mel": native.LogMelCall,
    "clvp_fast_paged_decode": native.PagedDecodeCall,
    "clvp_fast_paged_prefill": native.PagedPrefillCall,
    "clvp_fast_rotary_attention": native.RotaryAttentionCall,
    "clvp_fast_linear": native.LinearCall,
    "clvp_fast_mlp": native.MlpCall,
    "clvp_fast_window_attention": native.WindowAttentionCall,
    "clvp_fast_window_block": native.WindowBlockCall,
    "clvp_fast_sample": native.SampleCall,
    "clvp_fast_decoder_layer": native.DecoderLayer,
    "clvp_fast_persistent_decode": native.PersistentDecodeCall,
}


@needs_compiler
@pytest.mark.parametrize("struct", STRUCTURES)
def test_the_structure_is_the_header_s(struct, tmp_path):
    """Compare names, order and the compiler's own offsets, and the numbers of the enums."""
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
    compiler = build.find_toolchain().cxx
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
    told = re.findall(r"^clvp_fast: building the native library \(once\) with .+: (\d+)/(\d+)$", said, re.MULTILINE)
    assert said.count("\n") == len(told) == 5, said
    assert told[0][0] == "0" and told[-1][0] == told[-1][1]
    (folder,) = built_folders(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "build.json",
        "build.log",
        "clvp_fast.h",
        "libclvp_fast.so",
    ]
    assert folder.parent.stat().st_mode & 0o777 == folder.parents[1].stat().st_mode & 0o777 == 0o700

    forget_library()
    monkeypatch.setattr(build, "build", lambda *_: pytest.fail("it is there already"))
    monkeypatch.setattr(native, "_one_process", lambda *_: pytest.fail("a cache that is only read needs no lock"))
    assert native.missing("cpu") is None
    assert capfd.readouterr().err == ""


def test_a_code_is_raised_with_the_library_s_sentence(sources):
    native.check(0)
    with pytest.raises(RuntimeError, match="no memory, says the stand-in"):
        native.check(-7)


def test_the_hash_changes_with_whatever_changes_the_library(sources, tmp_path, monkeypatch):
    def found():
        return build.content_hash(sources, build.find_toolchain(), "cpu", "1")

    seen = [found()]
    assert found() == seen[0]
    for name in ("cpu/interface.cpp", "clvp_fast.h", "version.cpp"):
        with open(sources / name, "a") as handle:
            handle.write("\n")
        seen.append(found())
    (sources / "cpu/mlp.cpp").write_text('#  include "more.cuh"\n')
    seen.append(found())
    (sources / "cpu/more.cuh").write_text('#include "../deeper.h"\n')
    seen.append(found())
    (sources / "deeper.h").write_text("int deep;\n")
    seen.append(found())
    # Which no source of this part includes: a file is looked for beside the one that includes it.
    for name in ("notes.md", "more.cuh", "cpu/deeper.h", "cuda/log_mel.cu"):
        (sources / name).write_text("says nothing to this compiler")
    assert found() == seen[-1]
    seen.append(build.content_hash(sources, build.find_toolchain(), "cpu", "2"))
    with monkeypatch.context() as patch:
        patch.setattr(build, "CXX_FLAGS", [*build.CXX_FLAGS, "-O2"])
        seen.append(found())
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    for version in ("99.1", "99.2"):  # a compiler that is updated in its place
        (tmp_path / "g++").write_text(f"#!/bin/sh\necho g++ {version}\n")
        (tmp_path / "g++").chmod(0o755)
        seen.append(found())
    assert len(set(seen)) == len(seen)


def test_each_part_has_a_hash_of_its_own(sources):
    tools = {
        "cpu": build.find_toolchain(),
        "cuda": build.Toolchain(("g++",), "g++ 1", "x86_64", (), nvcc="nvcc", architectures=(90,)),
    }

    def found():
        return {part: build.content_hash(sources, tools[part], part) for part in tools}

    before = found()
    (sources / "cuda/log_mel.cu").write_text(CUDA + "\n")
    after = found()
    assert after["cpu"] == before["cpu"] and after["cuda"] != before["cuda"]
    (sources / "cpu/interface.cpp").write_text(CPU + "\n")
    assert found()["cpu"] != after["cpu"] and found()["cuda"] == after["cuda"]


def test_a_cpu_s_sets_are_those_that_the_library_finds():
    """Python reads /proc/cpuinfo, C++ asks the processor."""
    if missing() is not None:
        pytest.skip(missing())
    assert native.record()["left_out"] or native.isas() == build.cpu_isas()


@pytest.mark.parametrize(
    "machine, elsewhere, expected",
    [
        ("x86_64-linux-gnu", False, ("avx2", "portable")),
        ("x86_64-linux-gnu", True, native.ISAS),
        ("aarch64-linux-gnu", False, ("portable",)),
        ("aarch64-linux-gnu", True, ("portable",)),
    ],
)
def test_a_build_gives_what_its_machine_can_use(monkeypatch, tmp_path, machine, elsewhere, expected):
    compiler = tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = -dumpmachine ] && echo {machine} || echo g++ 99\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build, "cpu_isas", lambda: ("avx2", "portable"))
    tools = build.find_toolchain(elsewhere=elsewhere)
    assert tools.isas == expected
    commands = build.compile_commands(Path("csrc"), tools)
    compiled = {name.removesuffix(".o").rpartition("_")[2] for name in commands} - {"dispatch", "interface", "version"}
    assert compiled == set(expected)
    assert {word for word in commands["dispatch.o"] if word.startswith("-DCLVP_FAST_HAS")} == {
        f"-DCLVP_FAST_HAS_{isa.upper()}" for isa in expected
    }


def test_an_instruction_set_that_the_compiler_does_not_know_is_left_out(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "cpu_isas", lambda: native.ISAS)
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    for unknown, left_out in (
        ("-mavx512bf16", ["avx512bf16"]),
        ("-mavxvnni", ["avxvnni"]),
        ("-mavx512vnni", ["avx512bf16", "avx512vnni"]),
        ("-mavx512bw", ["avx512bf16", "avx512vnni", "avx512"]),
    ):
        (tmp_path / "g++").write_text(
            f'#!/bin/sh\ncase "$*" in *{unknown}*) echo "error: unrecognized {unknown}"; exit 1;; esac\nexec g++ "$@"\n'
        )
        (tmp_path / "g++").chmod(0o755)
        monkeypatch.setenv("CXX", str(tmp_path / "g++"))
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        assert missing() is None
        assert native.record()["left_out"] == left_out
        assert native.record()["isas"] == [isa for isa in native.ISAS if isa not in left_out]
        assert main([]) == 0
        assert f"without {', '.join(left_out)}; " in capsys.readouterr().out


@needs_compiler
@pytest.mark.parametrize("left_out", ["avx512bf16", "avx512vnni", "avx512", "avxvnni", "avx2"])
def test_the_library_has_nothing_of_a_set_that_is_left_out(tmp_path, left_out):
    """Compile csrc/cpu/dispatch.cpp itself, and look at its needs of each instruction set."""
    isas = native.ISAS[native.ISAS.index(left_out) + 1 :]
    tools = build.Toolchain(build.find_toolchain().cxx, "", "x86_64", isas)
    command = build.compile_commands(ROOT / "csrc", tools)["dispatch.o"]
    if build.find_toolchain().machine != "x86_64":
        pytest.skip("x86's alone")
    subprocess.run([*command, "-O0"], cwd=tmp_path, check=True)
    command = ["nm", "-u", "--demangle", "dispatch.o"]
    names = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    for stem in ("linear", "int8_linear"):
        found = set(re.findall(rf"clvp_fast::{stem}_(\w+)", names))
        assert found == {isa for isa in isas if stem in build.ISA_SOURCES[isa]}


DRIVER = """
extern "C" {
int cuInit(unsigned) { return RETURNED; }
int cuDeviceGetCount(int *count) { *count = DEVICES; return 0; }
}
"""


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Replace NVIDIA's driver by a stand-in, which returns a code and shows some devices."""

    def put(code, devices):
        library = tmp_path / f"libcuda_{code}_{devices}.so"
        (tmp_path / "driver.cpp").write_text(DRIVER)
        values = [f"-DRETURNED={code}", f"-DDEVICES={devices}"]
        command = ["g++", "-shared", "-fPIC", *values, str(tmp_path / "driver.cpp"), "-o", str(library)]
        subprocess.run(command, check=True)
        monkeypatch.setattr(native, "_DRIVER", str(library))

    return put


def test_the_cuda_part_is_compiled_where_a_device_is_visible_alone(sources, driver, monkeypatch):
    monkeypatch.delenv("CUDA_HOME")
    asked, part = [], types.SimpleNamespace(clvp_fast_cuda_missing=lambda sentence, size: 0)
    monkeypatch.setattr(native, "loaded", lambda name: asked.append(name) or (part, ""))
    assert "no NVIDIA driver" in missing_uncached("cuda")
    for code, devices in ((100, 1), (0, 0)):
        driver(code, devices)
        assert missing_uncached("cuda") == f"the NVIDIA driver shows no device (CUresult {code})"
    assert not asked
    driver(0, 1)
    assert missing_uncached("cuda") is None and asked == ["cuda"]


def missing_uncached(part):
    return native.missing.__wrapped__(part)


def test_the_cuda_part_explains_a_missing_driver(sources, driver, monkeypatch):
    driver(0, 1)

    class Said:
        def __call__(self, sentence, size):
            sentence.value = b"the driver is too old"[: size - 1]
            return self.code

    said = Said()
    part = types.SimpleNamespace(clvp_fast_cuda_missing=said)
    monkeypatch.setattr(native, "loaded", lambda name: (part, ""))
    said.code = 1
    assert missing_uncached("cuda") == "the driver is too old"
    said.code = 0
    assert missing_uncached("cuda") is None


def test_no_nvcc_is_a_reason_of_the_cuda_part_alone(sources, driver):
    driver(0, 1)
    assert missing("cuda") == (
        "the native library for CUDA cannot be built: there is no nvcc in CUDA_HOME (/nonexistent)"
    )
    assert missing("cpu") is None


@needs_nvcc
def test_the_cuda_part_lies_beside_that_for_a_cpu(sources, tmp_path, monkeypatch, driver):
    assert missing("cpu") is None
    assert not hasattr(native.library(), "clvp_fast_log_mel_cuda")
    monkeypatch.delenv("CUDA_HOME")
    driver(0, 1)
    assert missing("cuda") is None and missing("cpu") is None
    assert native.library("cuda").clvp_fast_log_mel_cuda.argtypes is not None
    assert len(built_folders(tmp_path)) == 2
    log = (native.folder("cuda") / build.LOG).read_text()
    assert all(f"for 'sm_{arch}'" in log for arch in build.ARCHITECTURES)
    dump = (native.folder("cuda") / "libclvp_fast_cuda.so").read_bytes()
    assert b"libcudart.so" not in dump, "the CUDA runtime must be linked statically"

    (sources / "cuda/log_mel.cu").write_text(CUDA + "does not compile\n")
    assert missing("cpu") is None
    why = missing("cuda")
    assert "did not compile it: " in why and "does not compile" not in why and "\n" not in why
    assert "does not compile" in next((tmp_path / "cache/native").glob("*.log")).read_text()


@pytest.mark.parametrize("device", ["mps", "meta"])
def test_other_devices_are_refused(sources, device):
    assert device in native.missing(device)


@pytest.mark.parametrize("compiler", ["/bin/false", "/nonexistent/g++", "no-such-compiler"])
def test_a_compiler_that_does_not_work(sources, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    assert "no C++ compiler that works" in missing() and compiler in missing()
    with pytest.raises(native.NativeLibraryError, match="or name another in CXX"):
        native.library()


def test_a_compiler_of_open_quotes(sources, monkeypatch):
    monkeypatch.setenv("CXX", "g++ '")
    assert missing() == "the native library cannot be built: CXX is no command (No closing quotation)"


def test_no_compiler(sources, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing() == (
        "the native library cannot be built: there is no C++ compiler: install g++, or name one in CXX"
    )


def test_a_failed_build_keeps_its_record_and_is_not_repeated(sources, tmp_path, monkeypatch, capfd):
    (sources / "cpu/log_mel.cpp").write_text("int broken = nobody_knows;\n")
    why = missing()
    (log,) = (tmp_path / "cache/native").glob("*.log")
    assert str(log) in why and "\n" not in why and "did not compile it: " in why and "nobody_knows" in why
    assert "nobody_knows" in log.read_text()
    assert built_folders(tmp_path) == []
    assert "building" in capfd.readouterr().err
    told = json.loads(log.with_suffix(".json").read_text())
    tools = build.find_toolchain()
    assert told.keys() == {"compiler", "version", "error"}
    assert told["compiler"] == tools.cxx[0] and told["version"] == str(tools) and "nobody_knows" in told["error"]

    with monkeypatch.context() as patch:
        patch.setattr(build, "build", lambda *_: pytest.fail("it failed before"))
        assert missing() == why
    (tmp_path / "g++").write_text('#!/bin/sh\n[ "$1" = --version ] && echo "g++ 99" || exec g++ "$@"\n')
    (tmp_path / "g++").chmod(0o755)
    with monkeypatch.context() as patch:  # another compiler may do better
        patch.setenv("CXX", str(tmp_path / "g++"))
        missing()
        assert "with g++ 99: 0/" in capfd.readouterr().err
    (sources / "cpu/log_mel.cpp").write_text("namespace { int CLVP_FAST_ISA = 0; }\n")
    assert missing() is None


@pytest.mark.parametrize("left", ["", "{}", "null", '{"version": "g++'])
def test_a_record_that_is_not_whole_is_none(sources, tmp_path, left):
    """Leave a record as a full disk or a killed process does: the library is built again, and leftovers go."""
    folder = tmp_path / "cache/native"
    folder.mkdir(parents=True, mode=0o700)
    name = build.content_hash(sources, build.find_toolchain(), "cpu", native.VERSION)
    (folder / f"{name}.json").write_text(left)
    (folder / f".{name}-killed/objects").mkdir(parents=True)
    assert missing() is None
    assert [path.name for path in built_folders(tmp_path)] == [name]


def test_rebuild_tries_again_and_replaces_what_is_there(sources, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(build, "CXX_FLAGS", [*build.CXX_FLAGS, f"-include{tmp_path}/later.h"])
        why = missing()
        assert "--rebuild" in why
        (tmp_path / "later.h").write_text("")
        assert missing() == why  # nothing that the name is made of has changed
        capfd.readouterr()
        forget_library()
        assert main([]) == 1 and capfd.readouterr().err == why + "\n"
        forget_library()
        assert main(["--rebuild"]) == 0 and "building" in capfd.readouterr().err
        assert missing() is None
        assert [path.suffix for path in (tmp_path / "cache/native").glob("*.json")] == []
        (native.folder("cpu") / "here before").touch()
        forget_library()
        assert main(["--rebuild"]) == 0 and missing() is None
        assert not (native.folder("cpu") / "here before").exists()


def test_an_installed_library_is_not_rebuilt(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(native, "_SOURCES", tmp_path / "none")
    assert main(["--rebuild"]) == 1
    assert capsys.readouterr().err == "an installed library is not rebuilt: install clvp-fast again\n"


@pytest.mark.parametrize("version", ["another", None])
def test_a_library_of_another_version_is_told(sources, monkeypatch, version):
    if version:
        monkeypatch.setattr(native, "VERSION", version)
        assert missing() is None
        found = native.folder("cpu")
        monkeypatch.setattr(native, "cached", lambda part: found)
        monkeypatch.setattr(native, "VERSION", calls.VERSION)
    else:  # as libraries were before they had a version
        (sources / "version.cpp").write_text("int clvp_fast_nothing;\n")
    why = missing()
    assert re.fullmatch(
        r"the native library .*/libclvp_fast.so belongs to another version of clvp_fast: "
        r"run python -m clvp_fast.native --rebuild",
        why,
    )


def test_the_version_changes_with_the_prototypes(monkeypatch):
    seen = {calls._version()}
    monkeypatch.setitem(calls.FUNCTIONS["cpu"], "clvp_fast_error", (ctypes.c_char_p, ctypes.c_int64))
    seen.add(calls._version())

    class MoreCall(ctypes.Structure):
        _fields_ = (("a", ctypes.c_int32),)

    monkeypatch.setattr(calls, "MoreCall", MoreCall, raising=False)
    seen.add(calls._version())
    assert len(seen) == 3 and calls.VERSION in seen


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "record"])
def test_a_damaged_library_is_built_anew(sources, damage):
    library = native.folder("cpu") / "libclvp_fast.so"
    whole = library.read_bytes()
    if damage == "gone":
        library.unlink()
    elif damage == "record":
        (library.parent / build.RECORD).write_text("{")
    else:
        library.write_bytes(whole[: len(whole) // 2 if damage == "cut" else 0])
    forget_library()
    assert native.missing("cpu") is None
    assert native.library().clvp_fast_cpu_isa() == b"stand-in"
    assert library.stat().st_size == len(whole)


def test_a_cache_that_cannot_be_written(sources, tmp_path):
    (tmp_path / "cache").write_text("a file")
    why = missing()
    assert "a file stands where the folder should be" in why and "CLVP_FAST_CACHE" in why and "\n" not in why
    assert "[Errno" not in why


def test_a_user_without_a_home(sources, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CLVP_FAST_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    why = missing()
    assert why.startswith("the native library cannot be built: this user has no home folder") and "\n" not in why
    assert "CLVP_FAST_CACHE" in why


@pytest.mark.parametrize("place", ["cache", "cache/native", "cache/native/HASH", "cache/native/HASH/libclvp_fast.so"])
def test_a_library_that_others_may_change_is_refused(sources, tmp_path, place, monkeypatch):
    assert missing() is None
    place = tmp_path / place.replace("HASH", native.folder("cpu").name)
    mode = place.stat().st_mode
    for bits in (0o020, 0o002):
        place.chmod(mode | bits)
        why = missing()
        assert f"other users may write into {place}, and code is loaded from there" in why and "\n" not in why
    place.chmod(mode)
    assert missing() is None

    real = os.stat

    def another_s(path, **how):
        found = real(path, **how)
        return types.SimpleNamespace(st_uid=12345, st_mode=found.st_mode) if Path(path) == place else found

    monkeypatch.setattr(files.os, "stat", another_s)
    reason = files.changeable_by_others(place, tmp_path / "cache")
    assert reason == f"{place} belongs to another user (number 12345)"


def test_nothing_is_built_where_others_may_write(sources, tmp_path, capfd):
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache").chmod(0o777)
    assert "other users may write into" in missing()
    assert capfd.readouterr().err == "" and built_folders(tmp_path) == []
    (tmp_path / "cache").chmod(0o1777)  # as /tmp: each user's folders are his own
    assert missing() is None


def test_a_missing_library_is_told_once(sources, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    forget_library()
    with pytest.warns(UserWarning, match="slower torch paths on the CPU: the native library cannot be built") as told:
        for _ in range(2):
            native.warn_of(native.missing("cpu"))
            native.warn_of("another reason")
    assert len(told) == 1


def test_an_installation_without_a_library(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "_SOURCES", tmp_path / "none")
    monkeypatch.setattr(native, "_PACKAGED", tmp_path / "empty")
    assert "reinstall it where there is a C++ compiler" in missing()


def test_a_failure_stops_what_has_not_begun(tmp_path):
    commands = {name: ["sh", "-c", f"echo ran {name}; test {name} = a && touch a"] for name in "abcdefgh"}
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_cores", lambda: 1)
        log = build._run_all(commands, tmp_path, lambda *progress: shown.append(progress))
    assert re.findall(r"^ran (\w)$", log, re.MULTILINE) == ["a", "b"]
    assert shown == [(done, 8) for done in range(9)]


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
    assert main([]) == 0
    said = capsys.readouterr().out
    assert str(native.folder("cpu") / "libclvp_fast.so") in said
    assert "stand-in here" in said and "no NVIDIA driver" in said
    assert main(["--require", "cuda"]) == 1
    assert "there is no nvcc" in capsys.readouterr().err


def test_an_instruction_set_that_the_library_lacks_is_refused(sources):
    with pytest.raises(ValueError, match="'avx2', which this CPU lacks or the library was built without"):
        native.choose_isa("avx2")


@pytest.mark.parametrize("compiler", ["g++", "/nonexistent/g++"])
@pytest.mark.parametrize(
    "name, says",
    [
        ("SSE", f"the environment variable CLVP_FAST_ISA must be one of {', '.join(native.ISAS)}, not 'SSE'"),
        ("avx2", "CLVP_FAST_ISA is 'avx2', which this CPU lacks or the library was built without: it has portable"),
    ],
)
def test_a_wrong_name_in_the_environment_is_one_sentence(sources, monkeypatch, capsys, name, says, compiler):
    """Name an unknown set, also without a library; only the library knows this CPU's sets."""
    monkeypatch.setenv("CLVP_FAST_ISA", name)
    monkeypatch.setenv("CXX", compiler)
    forget_library()
    assert main([]) == 1
    said = capsys.readouterr().err.splitlines()
    assert (says if compiler == "g++" or name == "SSE" else "no C++ compiler that works") in said[-1]


WITHOUT = """
import sys, warnings
import torch
from clvp_fast import native, ops
from clvp_fast.ops import dispatch, swin
from clvp_fast.ops.linear import linear

torch.manual_seed(0)
calls, norm = [], torch.rand(64)
for dtype in (torch.float32, torch.bfloat16):
    for rows in (3, 600):
        x, w, b = torch.randn(rows, 64, dtype=dtype), torch.randn(64, 64, dtype=dtype), torch.randn(64, dtype=dtype)
        calls.append(lambda x=x, w=w, b=b: linear(x, w, b, activation="gelu_new"))
        calls.append(lambda x=x, w=w, b=b: ops.gelu_mlp(x, w, b, w, b, residual=x))
        calls.append(lambda x=x, w=w, b=b: swin.mlp_block(x, b, b, w, b, w, b, activation="gelu", eps=1e-5))
with warnings.catch_warnings(record=True) as told, torch.no_grad():
    warnings.simplefilter("always")
    found = [call() for call in calls]
    with dispatch.backend("torch"):
        expected = [call() for call in calls]
    dispatch.explain(device="cpu")
assert all(torch.equal(one, other) for one, other in zip(found, expected))
print(len(found), len(told), *(warning.message for warning in told), sep="|")
"""


def test_operators_take_their_torch_paths_without_a_library(tmp_path):
    """More rows than 512 too, of which each asks for its instruction set; all of it is told once a process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CLVP_FAST_CACHE": str(tmp_path), "CXX": "/nonexistent/g++"}
    environment.pop("CLVP_FAST_BACKEND", None)
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls, told, why = done.stdout.strip().split("|")
    assert (calls, told) == ("12", "1")
    assert why.startswith("clvp_fast takes slower torch paths on the CPU: the native library cannot be built: ")


def test_a_forced_torch_path_compiles_nothing(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CLVP_FAST_CACHE": str(tmp_path), "CLVP_FAST_BACKEND": "torch"}
    code = WITHOUT.replace('    dispatch.explain(device="cpu")\n', "")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "12|0\n", done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
