"""Runs of a few instructions in a kernel around them, for the emulator's own tests.

%r0 is the thread, %d0 to %d2 the addresses of `a`, `b` and `out`, %d4 to %d6 the thread's own word in each.
"""

import struct

import numpy as np

from tests.ptx.machine import Options, Program, launch, new_memory

_TEXT = """.version 8.7
.target sm_90a
.address_size 64
{extern}
.visible .entry k(.param .u64 a, .param .u64 b, .param .u64 out)
.reqntid {threads}
{{
.reg .pred %p<20>; .reg .b16 %h<20>; .reg .b32 %r<300>; .reg .b64 %d<20>;
ld.param.u64 %d0, [a]; ld.param.u64 %d1, [b]; ld.param.u64 %d2, [out];
mov.u32 %r0, %tid.x;
mul.wide.u32 %d3, %r0, 4;
add.s64 %d4, %d0, %d3; add.s64 %d5, %d1, %d3; add.s64 %d6, %d2, %d3;
{body}
ret;
}}
"""


def run(body, a=None, b=None, out=None, *, threads=32, grid=1, shared=0, cooperative=False, **options) -> np.ndarray:
    """Run a kernel, and return its `out`, a word a thread by default. `shared`: bytes of the variable `memory`."""
    extern = ".extern .shared .align 1024 .b8 memory[];" if shared else ""
    program = Program.of(_TEXT.format(body=body, threads=threads, extern=extern), fine=cooperative)
    memory = new_memory(program)
    a, b, out = (np.zeros(threads, np.uint32) if x is None else np.ascontiguousarray(x) for x in (a, b, out))
    places = [memory.add(n, x.ctypes.data, x.nbytes, x) for n, x in (("a", a), ("b", b), ("out", out))]
    raw = struct.pack("<QQQ", *places)
    launch(program, (grid, 1, 1), threads, shared, raw, memory, Options(**options), cooperative)
    return out


def unary(op, a, out=np.uint32) -> np.ndarray:
    body = f"ld.global.b32 %r1, [%d4]; {op} %r2, %r1; st.global.b32 [%d6], %r2;"
    return run(body, np.ascontiguousarray(a).view(np.uint32)).view(out)


def binary(op, a, b, out=np.uint32) -> np.ndarray:
    body = f"ld.global.b32 %r1, [%d4]; ld.global.b32 %r2, [%d5]; {op} %r3, %r1, %r2; st.global.b32 [%d6], %r3;"
    return run(body, *(np.ascontiguousarray(x).view(np.uint32) for x in (a, b))).view(out)
