"""The constants of devices: the only numbers of the model that do not come from the code.

They are frozen. A constant that is changed later is applied to predictions from before a change of a kernel as well as
from after it, so that the two stay comparable, and `CHANGED` says when. They are of data sheets, of copies and products
that rows in `benchmarks/results/nvidia-h200` were measured beside, and of published measurements of the chip. Two are
of rows of kernels, because nothing else was at hand, and their lines say so; nothing else was fitted.
"""

from dataclasses import dataclass

#: When a constant was last changed, and why.
CHANGED = "2026-11-30: first version"


@dataclass(frozen=True)
class Chip:
    """The properties of a GPU that a prediction needs.

    Args:
        multiprocessors, schedulers: of the chip, and of one multiprocessor; a scheduler issues one instruction a cycle.
        registers, shared_bytes, most_warps, most_programs: what the programs of a multiprocessor share.
        hertz: cycles a second under load.
        sheet_bytes_per_s, sheet_flop_per_s: of the data sheet: memory, and dense products in half types.
        bytes_per_s, flop_per_s: the same as large copies and products reach them.
        cache_bytes_per_s: reads from the L2 cache.
        memory_latency, cache_latency: seconds from a load to its value, from memory and from the L2 cache.
        barrier: seconds of a reduction over the warps of a program: two exchanges through shared memory.
        cycles_alone: cycles between instructions of a warp that has its scheduler for itself.
        launch: seconds from one launch of a graph to the first instruction of the next, and from its last store to its
            end.
    """

    name: str
    multiprocessors: int
    schedulers: int
    registers: int
    shared_bytes: int
    most_warps: int
    most_programs: int
    hertz: float
    sheet_bytes_per_s: float
    sheet_flop_per_s: float
    bytes_per_s: float
    flop_per_s: float
    cache_bytes_per_s: float
    memory_latency: float
    cache_latency: float
    barrier: float
    cycles_alone: float
    launch: float


H200 = Chip(
    name="H200",
    # NVIDIA H100 Tensor Core GPU Architecture (the H200 is the same chip), and CUDA C++ Programming Guide, table of
    # technical specifications for compute capability 9.0.
    multiprocessors=132,
    schedulers=4,
    registers=65536,
    shared_bytes=227 * 1024,
    most_warps=64,
    most_programs=32,
    hertz=1.98e9,
    # NVIDIA H200 data sheet, SXM.
    sheet_bytes_per_s=4.8e12,
    sheet_flop_per_s=989e12,
    # The copy and the bfloat16 product of the device in benchmarks/results/nvidia-h200/decode_step.jsonl.
    bytes_per_s=4.16e12,
    flop_per_s=746e12,
    # The least that the row of geglu_mlp of 128,000 rows shows: 14.9 GB through the cache in 1.89 ms.
    cache_bytes_per_s=7.9e12,
    # Published for an H100: 479 and 263 cycles at 1.755 GHz (Luo et al., "Benchmarking and Dissecting the Nvidia Hopper
    # GPU Architecture via Microbenchmarking", 2024), for a load on an idle device; twice that for memory, as pages of
    # gigabytes are not in the first translation buffers.
    memory_latency=0.55e-6,
    cache_latency=0.15e-6,
    barrier=0.06e-6,
    cycles_alone=2.0,
    # Launches of a graph were 0.45 us apart (docs/kernels.md); the rest is what add_norm of 16 rows leaves of its row.
    launch=0.80e-6,
)
