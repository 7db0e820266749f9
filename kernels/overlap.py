"""Launches that begin before the one before them has ended: programmatic dependent launch, on compute capability 9.0.

A kernel that is launched with `**overlapping()` calls `wait_for_inputs(OVERLAPS)` before it reads or writes anything
that another launch may touch. It then is on its multiprocessors, with its addresses computed and its weights on their
way into the L2 cache, when the launch before it ends. What it computes is the same.

Every program has to wait: a launch that ended without would let the next one begin before those in front of it have
ended. A prefetch reads nothing, so that weights which change meanwhile are seen as they are behind the wait.
"""

import triton
import triton.language as tl

from clvp_fast.kernels.target import architecture, interpreted


def overlapping() -> dict[str, bool]:
    """Options of a launch: the kernel's `OVERLAPS`, and where it holds the launcher's own."""
    return {"OVERLAPS": True, "launch_pdl": True} if architecture() >= 90 and not interpreted() else {"OVERLAPS": False}


@triton.jit
def wait_for_inputs(OVERLAPS: tl.constexpr):
    """Let the next launch begin, and wait until all that earlier ones have written is there."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(ptrs, mask):
    """Ask for the lines of memory (128 bytes) at `ptrs`, where `mask`, to be brought into the L2 cache."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r",
        [ptrs, mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
