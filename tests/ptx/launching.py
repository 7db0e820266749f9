"""Triton's launches with CPU tensors, executed from the PTX that a GPU would be given.

The launchers are the project's own: what runs is what they would launch, their choice of configuration included.
"""

import struct
from contextlib import contextmanager
from unittest import mock

from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.aot.compiling import Driver
from tests.ptx.machine import Options, Program, launch, new_memory

_FORMAT = {
    "i1": "<b", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u1": "<B", "u8": "<B", "u16": "<H", "u32": "<I",
    "u64": "<Q", "fp32": "<f", "f32": "<f", "fp64": "<d",
}  # fmt: skip


def _span(tensor) -> int:
    """Return the bytes from the first element to the end of the last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _flat(value, kind):
    if isinstance(kind, (tuple, list)):
        for one, inner in zip(value, kind, strict=True):
            yield from _flat(one, inner)
    else:
        yield value, kind


def execute(compiled, grid, bound: dict, options: Options):
    """Run one launch of a compiled kernel; `bound` has its arguments."""
    program = Program.of(compiled.asm["ptx"], compiled.metadata.name)
    if options.swap and options.swap[0] is program:
        program = options.swap[1]
    memory, raw, layout = new_memory(program), b"", list(program.kernel.params.values())
    values = [
        (name, *pair)
        for (name, value), kind in zip(bound.items(), compiled.src.signature.values(), strict=True)
        for pair in _flat(value, kind)
        if pair[1] != "constexpr"
    ]
    assert len(layout) == len(values) + 2, (
        layout,
        values,
    )  # and Triton's pointers to scratch memory, which is not used
    for (offset, size, _), (name, value, kind) in zip(layout, values, strict=False):
        raw = raw.ljust(offset, b"\0")
        if kind.startswith("*"):
            address = memory.add(name, value.data_ptr(), _span(value), value) if value is not None else 0
            raw += struct.pack("<Q", address)
        else:
            raw += struct.pack(_FORMAT[kind], value)
        assert len(raw) == offset + size, (name, kind, size)
    raw = raw.ljust(layout[-1][0] + layout[-1][1], b"\0")
    metadata = compiled.metadata
    return launch(program, (*grid, 1, 1)[:3], 32 * metadata.num_warps, metadata.shared, raw, memory, options)


@contextmanager
def emulated(arch: int = 80, options: Options | None = None):
    """Run launches here inside the block, and yield a list that their reports join. The process keeps this driver."""
    options, reports, run = options or Options(), [], JITFunction.run

    def emulate(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            bound, _, _ = self.device_caches[arch][4](*args, **kwargs | {"debug": False, "instrumentation_mode": ""})
            sizes = grid(bound) if callable(grid) else grid
            reports.append(execute(compiled, sizes, bound, options))
        return compiled

    driver.set_active(Driver(arch, "cpu"))
    # ptxas would take half of the time, and its result cannot run here; this needs a Triton cache of its own.
    with mock.patch.object(JITFunction, "run", emulate), mock.patch.object(CUDABackend, "make_cubin", lambda *a: b""):
        yield reports
