"""The work of a launch: bytes from memory and from the L2 cache, products, turns of its loops, waits in a row.

Counted from the arguments that a launcher passed. Weights, keys and values come from memory, once a launch; rows of
activations were written by the launch before and are in the L2 cache, as is what several programs read again.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch

from benchmarks.cost.machine_code import Arm
from benchmarks.cost.recording import Launch

# Rows and columns of a tile that a product of torch's library is taken to have.
_LIBRARY_TILE = 128
# Halvings and looks of a search for a threshold of `sample`, means of rows in float32 (docs/kernels.md).
_HALVINGS, _LOOKS = 13.5, 1.5


@dataclass(frozen=True)
class Stored:
    """The values in a step's tensors: tokens of each candidate so far, and of the one prompt."""

    tokens: int
    prompt: int


@dataclass(frozen=True)
class Waits:
    """The waits of a program, one after another: loads from memory and from the L2 cache, reductions."""

    memory: int = 0
    cache: int = 0
    barriers: int = 0


@dataclass(frozen=True)
class Work:
    """The work of one launch.

    Args:
        bytes: from and to memory; cache_bytes: through the L2 cache, those of `bytes` too.
        flop: of the matrix unit, padding included.
        issued: warp instructions of all programs; longest: of one warp of the program with most of them.
        waits: of the program with most of them.
        in_flight: bytes from memory that a program keeps on their way.
    """

    bytes: float
    cache_bytes: float
    flop: float = 0.0
    issued: float = 0.0
    longest: float = 0.0
    waits: Waits = field(default_factory=Waits)
    in_flight: float = 0.0


def _nbytes(*tensors: torch.Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def _arm(launch: Launch, multiplies: bool | None = None) -> Arm:
    """Return the kernel's arm with the main work: the longest one, of those that (do not) use the matrix unit."""
    assert launch.code is not None
    found = [arm for arm in launch.code.arms if multiplies in (None, arm.multiplies)]
    return max(found, key=lambda arm: arm.end - arm.first)


def _same(launch: Launch, each: float) -> dict[str, float]:
    return {"issued": each * launch.programs * launch.warps, "longest": each}


def _embed(launch: Launch, stored: Stored) -> Work:
    given = launch.arguments
    out, ids = given["out_ptr"], given["token_ids_ptr"]
    rows = 2 * _nbytes(given["token_table_ptr"]) // len(given["token_table_ptr"]) * ids.numel()
    each = _arm(launch).issued(())
    return Work(rows, rows + _nbytes(out, ids), **_same(launch, each), waits=Waits(memory=1, cache=1))


def _add_norm(launch: Launch, stored: Stored) -> Work:
    given = launch.arguments
    affine = _nbytes(given["weight_ptr"], given["bias_ptr"])
    rows = _nbytes(*(given[name] for name in ("x_ptr", "residual_ptr", "total_ptr", "out_ptr")))
    each = _arm(launch).issued(())
    return Work(affine, affine * launch.programs + rows, **_same(launch, each), waits=Waits(memory=1, barriers=2))


def _double_norm(launch: Launch, stored: Stored) -> Work:
    given = launch.arguments
    affine = _nbytes(*(given[f"{name}{n}_ptr"] for name in ("weight", "bias") for n in (1, 2)))
    rows = _nbytes(*(given[name] for name in ("x_ptr", "first_ptr", "out_ptr")))
    each = _arm(launch).issued(())
    return Work(affine, affine * launch.programs + rows, **_same(launch, each), waits=Waits(memory=1, barriers=4))


def _linear(launch: Launch, stored: Stored) -> Work:
    given = launch.arguments
    weight, x, parts = given["weight_ptr"], given["x_ptr"], given["PARTS"]
    block_n, block_r, block_k = (given[f"BLOCK_{axis}"] for axis in "NRK")
    columns = block_n // 2 if given["GATED"] else block_n
    across, down = ceil(given["columns"] / columns), ceil(given["rows"] / block_r)
    steps = ceil(ceil(given["depth"] / parts) / block_k)
    arm = _arm(launch)
    # The loop over parts is unrolled where tiles are small.
    trips = (steps, parts)[: max(len(arm.loops), 1)] if parts > 1 else (steps,)
    each, longest = arm.issued(trips, 1 / parts), arm.issued(trips)
    once = _nbytes(weight, given["scale_ptr"], given["bias_ptr"])
    passed = 2 * 4 * parts * across * down * block_n * block_r if parts > 1 else 0
    moved = once * down + _nbytes(x) * across + _nbytes(given["out_ptr"], given["residual_ptr"]) + passed
    flop = 2 * across * block_n * down * block_r * given["depth"]
    return Work(
        once,
        moved,
        flop,
        each * launch.programs * launch.warps,
        longest,
        Waits(memory=2, cache=0 if parts == 1 else 2 + parts),
        (launch.stages - 1) * block_n * block_k * weight.element_size(),
    )


def _attention(launch: Launch, stored: Stored) -> Work:
    given = launch.arguments
    q, pages = given["q_ptr"], given["k_pages_ptr"]
    candidates, heads, head_dim = q.shape
    token = 2 * heads * head_dim * pages.element_size()
    own_parts = min(stored.tokens // given["SPLIT"] + 1, given["own_splits"])
    prefix_parts = ceil(stored.prompt / given["SPLIT"])
    tiles = ceil(candidates / given["BLOCK_M"])
    # Own keys: all parts of a candidate together walk through its tiles once.
    own, prefix = _arm(launch, multiplies=False), _arm(launch, multiplies=True)
    merging = (own_parts + prefix_parts + 1) // 2
    share, own_tiles = 1 / (own_parts + prefix_parts), ceil(stored.tokens / given["BLOCK_N"]) / own_parts
    of_own = own.issued((own_tiles, merging), share)
    longest_own = own.issued((min(own_tiles, given["SPLIT"] / given["BLOCK_N"]), merging))
    prefix_tiles = ceil(stored.prompt / given["BLOCK_N"]) / max(prefix_parts, 1)
    of_prefix = prefix.issued((1, prefix_tiles, merging), share)
    programs = candidates * heads * own_parts, tiles * heads * prefix_parts
    issued = (of_own * programs[0] + of_prefix * programs[1]) * launch.warps
    once = token * (candidates * (stored.tokens + 1) + stored.prompt)
    parts = 2 * 4 * (head_dim + 2) * (own_parts + prefix_parts) * candidates * heads
    rows = 4 * _nbytes(q)
    flop = 4 * tiles * given["BLOCK_M"] * stored.prompt * heads * head_dim
    in_flight = (launch.stages - 1) * given["BLOCK_N"] * 2 * head_dim * pages.element_size()
    waits = Waits(memory=2, cache=5 + merging)
    return Work(
        once, once + token * stored.prompt * (tiles - 1) + parts + rows, flop, issued, longest_own, waits, in_flight
    )


def _sample(launch: Launch, stored: Stored) -> Work:
    given = launch.arguments
    searches = ("top_k", "top_p", "typical_p")
    # A row of a step has no typical_p: its code is passed by.
    looks = [_LOOKS * (name != "typical_p") for name in searches if _is_on(given, name)]
    each = _arm(launch).issued(tuple(count for look in looks for count in (look, _HALVINGS / _LOOKS)))
    barriers = 1 + sum(count > 0 for count in looks) * (_HALVINGS + 2 * _LOOKS + 2) + 8
    moved = _nbytes(given["logits_ptr"], given["seen_ptr"])
    return Work(0, moved, **_same(launch, each), waits=Waits(cache=4, barriers=ceil(barriers)))


def _is_on(given: dict[str, Any], name: str) -> bool:
    return given[f"{name}_ptr"] is not None


def _library_product(launch: Launch, stored: Stored) -> Work:
    x, weight, bias = (launch.arguments[place] for place in range(3))
    rows, depth = x.shape
    across, down = ceil(len(weight) / _LIBRARY_TILE), ceil(rows / _LIBRARY_TILE)
    once = _nbytes(weight, bias)
    moved = once * down + _nbytes(x) * across + _nbytes(launch.arguments["out"])
    flop = 2 * across * down * _LIBRARY_TILE**2 * depth
    return Work(once, moved, flop, waits=Waits(memory=2))


_KERNELS: dict[str, Callable[[Launch, Stored], Work]] = {
    "_embed_kernel": _embed,
    "_add_norm_kernel": _add_norm,
    "_double_layer_norm_kernel": _double_norm,
    "_linear_kernel": _linear,
    "paged_attention_decode_kernel": _attention,
    "_sample_kernel": _sample,
    "linear": _library_product,
}


def of(launch: Launch, stored: Stored) -> Work:
    """Return the work of a launch of a decode step. Raises `KeyError` for a kernel that the model does not know."""
    return _KERNELS[launch.kernel](launch, stored)
