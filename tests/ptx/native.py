"""The launches of csrc/cuda/ without a GPU: their PTX by nvcc, executed where the launchers would start it on one.

The launchers are the library's own, linked with tests/csrc/launches.cpp in the place of CUDA's runtime: grid, threads,
shared memory and the choice of the kernel are theirs.
"""

import ctypes
import fcntl
import hashlib
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np

from clvp_fast import native
from clvp_fast.native import build
from tests.ptx.machine import Options, Program, launch, new_memory
from tests.ptx.suites import ROOT

CSRC, RUNTIME = ROOT / "csrc", ROOT / "tests/csrc/launches.cpp"
_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden", "--keep"]
_LAUNCHED = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.c_uint,
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_int,
)


@cache
def toolchain() -> build.Toolchain | str:
    """Return the compilers, or why there are none."""
    try:
        return build.find_toolchain("cuda")
    except build.BuildError as error:
        return str(error)


def missing() -> str | None:
    """Return why kernels of csrc/cuda/ cannot be compiled here, or None."""
    return found if isinstance(found := toolchain(), str) else None


def compiled(arch: int, cache_folder: Path) -> Path:
    """Return the folder of the library and its PTX for `arch`, compiled once."""
    tools = toolchain()
    digest = hashlib.sha256(f"{arch} {_FLAGS} {tools}".encode() + RUNTIME.read_bytes())
    for name, content in sorted(build.part_sources(CSRC, tools, "cuda").items()):
        digest.update(name.encode() + content)
    folder = cache_folder / f"native-sm_{arch}-{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "library.so").exists():
            _compile(arch, folder, tools)
    return folder


def _compile(arch: int, folder: Path, tools: build.Toolchain):
    def run(*command):
        done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def compile_part(stem):
        run(tools.nvcc, *_FLAGS, target, "-c", CSRC / f"cuda/{stem}.cu", "-o", f"{stem}.o")
        text = (folder / f"{stem}.ptx").read_text()
        (folder / f"{stem}.ptx").write_text(text[: text.find("\t.section")])  # debug information, most of the file

    target = f"-gencode=arch=compute_{arch},code=compute_{arch}"
    with ThreadPoolExecutor() as threads:
        list(threads.map(compile_part, build.CUDA_SOURCES))
    for left in folder.iterdir():
        if left.suffix not in (".o", ".ptx") and left.name != "lock":
            left.unlink()
    objects = [f"{stem}.o" for stem in build.CUDA_SOURCES]
    run(*tools.cxx, "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", RUNTIME, *objects, "-o", "part.so")
    os.replace(folder / "part.so", folder / "library.so")


class Launcher:
    """Executes what the library's launchers start; each launch's report joins `reports`.

    library: the CUDA part, with its prototypes. `blocks`: of a cooperative launch.
    """

    def __init__(self, arch: int, options: Options, reports: list, cache_folder: Path):
        self.options, self.reports, self._failed = options, reports, None
        folder = compiled(arch, cache_folder)
        self.texts = {stem: (folder / f"{stem}.ptx").read_text() for stem in build.CUDA_SOURCES}
        self.library = ctypes.CDLL(str(folder / "library.so"))
        native.calls.set_prototypes(self.library, "cuda")
        self._callback = _LAUNCHED(self._launched)  # kept, as the library does not

    def call(self, function: str, call: ctypes.Structure, blocks: int = 1) -> int:
        """Call a function of the library and return its code; an error of its launch is raised."""
        self.library.run_launches_by(self._callback, blocks)
        code = getattr(self.library, function)(call, None)
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed
        return code

    def program(self, name: str) -> Program:
        stem = next(stem for stem in self.texts if stem in name)
        return Program.of(self.texts[stem], name, fine=stem == "persistent_decode")

    def _launched(self, name, grid, threads, shared_bytes, argument, cooperative):
        try:
            self._execute(name.decode(), tuple(grid.contents), threads, shared_bytes, argument, bool(cooperative))
        except Exception as error:
            self._failed = error
        return int(self._failed is not None)

    def _execute(self, name, grid, threads, shared_bytes, argument, cooperative):
        program = self.program(name)
        assert threads == program.kernel.threads, (threads, program.kernel.threads)
        if self.options.swap and self.options.swap[0] is program:
            program = self.options.swap[1]
        memory = new_memory(program)
        if "persistent_decode" in name:
            call = _persistent(native.PersistentDecodeCall.from_address(argument), memory, self.library)
        else:
            call = _log_mel(native.LogMelCall.from_address(argument), memory)
        report = launch(program, grid, threads, shared_bytes, bytes(call), memory, self.options, cooperative)
        report.kernel = re.search(r"log_mel|persistent_decode", name)[0]
        self.reports.append(report)


class OnCpu:
    """The native library's CPU part, whose log-mel of float32 is the CUDA part's."""

    def __init__(self, library: ctypes.CDLL, launcher: Launcher):
        self._library, self._launcher = library, launcher

    def __getattr__(self, name):
        return getattr(self._library, name)

    def clvp_fast_log_mel_cpu(self, call, threads, isa):
        if call.compute_dtype != native.FLOAT32:
            return self._library.clvp_fast_log_mel_cpu(call, threads, isa)
        copy = native.LogMelCall.from_buffer_copy(call)
        maxima = np.zeros((max(call.batch, 1), 2), np.uint32)
        copy.clip_maxima = maxima.ctypes.data if call.top_db >= 0 else None
        return self._launcher.call("clvp_fast_log_mel_cuda", copy)


def _placed(call: ctypes.Structure, memory, sizes: dict[str, int]):
    """Return a copy whose pointers are those under which the kernel sees these bytes."""
    copy = type(call).from_buffer_copy(call)
    for name, size in sizes.items():
        if host := getattr(call, name):
            setattr(copy, name, memory.add(name, host, size))
    return copy


def _log_mel(call, memory):
    rows, bins, item = call.batch, call.n_fft // 2 + 1, 2 if call.samples_dtype == native.INT16 else 4
    first = min(0, (rows - 1) * call.samples_stride)
    assert first == 0, "rows from the last to the first"
    return _placed(call, memory, dict(
        samples=((rows - 1) * call.samples_stride + call.time) * item, lengths=8 * rows, window=4 * call.n_fft,
        twiddles=8 * call.n_fft, mel_filters=4 * call.num_mels * bins, bands=8 * call.num_mels,
        mel_norms=4 * call.num_mels, clip_maxima=8 * rows,
        features=rows * call.num_mels * call.frames * (4 if call.features_dtype == native.FLOAT32 else 2),
    ))  # fmt: skip


def _persistent(call, memory, library):
    rows, hidden, inner, vocab = call.num_candidates, call.hidden_size, call.intermediate_size, call.vocab_size
    norm, pages = 2 * hidden, 2 * call.num_pages * call.page_strides[0]
    of_layer = dict(
        input_norm_weight=norm, input_norm_bias=norm, qkv_weight=3 * hidden * norm, qkv_bias=3 * norm,
        out_weight=hidden * norm, out_bias=norm, post_norm_weight=norm, post_norm_bias=norm,
        mlp_in_weight=inner * norm, mlp_in_bias=2 * inner, mlp_out_weight=inner * norm, mlp_out_bias=norm,
        k_pages=pages, v_pages=pages,
    )  # fmt: skip
    table = (native.calls.DecoderLayer * call.num_layers).from_address(call.layers)
    layers = np.frombuffer(b"".join(bytes(_placed(layer, memory, of_layer)) for layer in table), np.uint8)
    copy = _placed(call, memory, dict(
        token_table=vocab * norm, position_table=call.num_positions * norm,
        first_norm_weight=norm, first_norm_bias=norm, final_norm_weight=norm, final_norm_bias=norm,
        head_weight=vocab * norm, head_bias=2 * vocab, tokens=8 * rows, seq_lens=4 * rows,
        block_table=4 * ((rows - 1) * call.block_table_stride + call.max_pages),
        prefix_table=4 * ((call.num_prefixes - 1) * call.prefix_table_stride + call.max_prefix_pages),
        prefix_lens=4 * call.num_prefixes, prefix_index=4 * rows, hidden=rows * norm, logits=2 * rows * vocab,
        workspace=library.clvp_fast_persistent_decode_workspace(call),
    ))  # fmt: skip
    copy.layers = memory.add_bytes("layers", layers.tobytes())
    return copy
