"""The memory plan: computes the numbers of candidates and pages from the bytes that are free."""

import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clvp_fast.engine.decoder import min_rows
from clvp_fast.engine.defaults import MEMORY_FRACTION, PAGE_SIZE
from clvp_fast.engine.prompts import PREFILL_ROWS
from clvp_fast.engine.sampling_params import SamplingParams
from clvp_fast.engine.scheduler import batch_buckets
from clvp_fast.io.errors import require_whole
from clvp_fast.models.clvp.tokens import longest_prompt
from clvp_fast.ops.panels import padded

# Beyond this number a step is bound by reading keys and values, and more slots gain almost nothing.
MAX_BATCH = 512
# On a CPU more slots take more memory and save no time.
CPU_BATCH = 16
# Bytes of the torch path of `sample` for each token of the vocabulary: scores, their order, running sums.
_SAMPLE_BYTES = 56


def default_batch(device: torch.device) -> int:
    """Return the default number of slots on a device."""
    return CPU_BATCH if device.type == "cpu" else MAX_BATCH


@dataclass(frozen=True)
class DecoderSizes:
    """The sizes of a decoder and of its device that a plan needs.

    Args:
        itemsize, page_itemsize: bytes of a parameter, and of one number of a stored key or value.
        on_cpu: count the memory of a step as on a CPU, where prompts are prefilled one by one.
        min_rows: the fewest rows of a step.
        copied_weights: bytes of the copies of the layers' weights in 8 bits, or 0.
        panels: bytes of the packed copies of all products' weights, or 0.
    """

    num_layers: int
    num_heads: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    itemsize: int
    page_itemsize: int
    on_cpu: bool = True
    min_rows: int = 1
    copied_weights: int = 0
    panels: int = 0

    @classmethod
    def of(
        cls,
        model: Any,
        page_dtype: torch.dtype | None = None,
        weight_dtype: torch.dtype | None = None,
        packed: bool = False,
    ) -> "DecoderSizes":
        """Read the sizes of a `ClvpForCausalLM`; `page_dtype`, `weight_dtype` and `packed` are as for `Runner`."""
        config, weight = model.config, model.lm_head.weight
        on_cpu = weight.device.type == "cpu"
        return cls(
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            intermediate_size=config.inner_size,
            vocab_size=config.vocab_size,
            itemsize=weight.dtype.itemsize,
            page_itemsize=(page_dtype or weight.dtype).itemsize,
            on_cpu=on_cpu,
            min_rows=min_rows(model),
            copied_weights=0 if weight_dtype is None else _layer_weights(model) * weight_dtype.itemsize,
            panels=_panels(model, weight_dtype or weight.dtype, weight.dtype) if packed else 0,
        )


def _panels(model: Any, layers: torch.dtype, head: torch.dtype) -> int:
    """Return the bytes of the panels of all products."""
    config = model.config
    hidden, inner = config.hidden_size, config.inner_size
    rows = (padded(3 * hidden) + padded(hidden) + padded(inner)) * hidden + padded(hidden) * inner
    return config.num_hidden_layers * rows * layers.itemsize + padded(config.vocab_size) * hidden * head.itemsize


def _layer_weights(model: Any) -> int:
    """Count the weights of the layers' products; each row's float32 scale counts as four."""
    hidden, inner = model.config.hidden_size, model.config.inner_size
    return model.config.num_hidden_layers * (4 * hidden * hidden + 2 * hidden * inner + 4 * (5 * hidden + inner))


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes for a `Runner` and its scheduler; it prints as a table.

    Args:
        max_batch: slots.
        num_pages, page_size: pages of each layer, and tokens per page.
        max_new_tokens, max_prefix_len: the longest candidate and prompt that the tables have room for.
        budget: bytes that may be used.
        parts: bytes by purpose.
    """

    max_batch: int
    num_pages: int
    page_size: int
    max_new_tokens: int
    max_prefix_len: int
    budget: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def packed_weights(self) -> bool:
        """Tell whether the batch decodes over packed copies of weights."""
        return self.parts["panels"] > 0

    def __str__(self) -> str:
        pages = f"{self.num_pages} of {self.page_size} tokens"
        rows = [f"{self.max_batch} candidates at once, of up to {self.max_new_tokens} tokens"]
        rows += [
            f"  {name:<8} {size:>10}" + (f"  {pages}" if name == "pages" else "")
            for name, size in ((name, human_bytes(count)) for name, count in self.parts.items())
        ]
        return "\n".join([*rows, f"  {'total':<8} {human_bytes(self.total):>10}  of {human_bytes(self.budget)}"])


def human_bytes(count: int) -> str:
    """Write a number of bytes in decimal units with three digits: `1.23 GB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:.0f} {unit}"
    return f"{count} B"


def trim_heap() -> None:
    """Return the host's freed memory to the system, which glibc would keep. This takes some 3 ms.

    Holes that freed weights leave in the heap rarely fit later allocations, because their sizes differ.
    """
    if (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        malloc_trim(0)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can be allocated on a device now, including those that an allocator keeps."""
    if device.type == "cuda":
        with suppress(RuntimeError):  # some releases of torch refuse it after a capture that failed
            torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    trim_heap()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # not Linux: half of the memory


def plan(
    model: Any,
    free_bytes: int,
    memory_fraction: float = MEMORY_FRACTION,
    max_batch: int | None = None,
    max_new_tokens: int = SamplingParams.max_new_tokens,
    page_size: int = PAGE_SIZE,
    *,
    max_prefix_len: int | None = None,
    page_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    states: bool = False,
    packed: bool = False,
) -> MemoryPlan:
    """Plan pages and slots for a decoder whose weights are loaded.

    There are as many slots as can hold their longest candidates at once, up to `max_batch`. The remaining pages hold
    prompts, at most one for each slot.

    Args:
        model: a `ClvpForCausalLM`, or its `DecoderSizes` (then `max_prefix_len` must be given).
        free_bytes: bytes free on its device now.
        memory_fraction: how much of that may be used, above 0 and at most 1.
        max_batch: the most slots; None: 512.
        max_new_tokens, max_prefix_len: the longest candidate and prompt in tokens; the latter by default that of the
            longest text.
        page_size: tokens per page.
        page_dtype, weight_dtype, states, packed: as for `Runner`.

    Raises:
        ValueError: impossible numbers; or not even one candidate fits, with the sizes.
    """
    if not 0 < memory_fraction <= 1:
        raise ValueError(f"memory_fraction must be above 0 and at most 1, not {memory_fraction}")
    for name, size in {"max_batch": max_batch, "max_new_tokens": max_new_tokens, "page_size": page_size}.items():
        if size is not None:
            require_whole(name, size)
    if max_prefix_len is None:
        max_prefix_len = longest_prompt(model.config)
    sizes = model if isinstance(model, DecoderSizes) else DecoderSizes.of(model, page_dtype, weight_dtype, packed)
    budget = int(free_bytes * memory_fraction)
    own, prefix = (-(-tokens // page_size) for tokens in (max_new_tokens, max_prefix_len))
    page_bytes = 2 * sizes.num_layers * page_size * sizes.hidden_size * sizes.page_itemsize

    def parts(slots: int, num_pages: int) -> dict[str, int]:
        fixed = _fixed(sizes, max(slots, sizes.min_rows), own, prefix, max_new_tokens, max_prefix_len, states)
        return {"pages": num_pages * page_bytes} | fixed

    wanted = MAX_BATCH if max_batch is None else max_batch
    for slots in reversed(batch_buckets(wanted)):
        needed = parts(slots, slots * own + prefix)
        if sum(needed.values()) <= budget:
            break
    else:
        described = ", ".join(f"{human_bytes(count)} {name}" for name, count in needed.items() if count)
        raise ValueError(
            f"one candidate of {max_new_tokens} tokens after a prompt of {max_prefix_len} needs "
            f"{human_bytes(sum(needed.values()))} ({described}), and {human_bytes(budget)} may be used: free memory, "
            "ask for fewer new tokens, or use a half type"
        )
    spare = (budget - sum(parts(slots, 0).values())) // page_bytes
    num_pages = min(spare, slots * (own + prefix))
    return MemoryPlan(slots, num_pages, page_size, max_new_tokens, max_prefix_len, budget, parts(slots, num_pages))


def _fixed(
    sizes: DecoderSizes, rows: int, own: int, prefix: int, max_new_tokens: int, max_prefix_len: int, states: bool
) -> dict[str, int]:
    """Return the bytes of everything but the pages, for steps of `rows` rows."""
    # A slot has fourteen 64-bit numbers, three of 32 bits, tables, the bitmap of seen tokens, counters and results.
    words = 2 * 14 + 3 + own + prefix + -(-sizes.vocab_size // 32) + sizes.num_heads + 4
    # A row of activations has the residual before and after, in float32 at least, its norm, a projection, and the
    # widest tensor between them. A step keeps all of them, and the inputs and outputs of attention besides.
    widest = max(4 * sizes.hidden_size, sizes.intermediate_size)
    activations = 2 * sizes.hidden_size * max(4, sizes.itemsize) + (2 * sizes.hidden_size + widest) * sizes.itemsize
    kept = activations + 4 * sizes.hidden_size * sizes.itemsize
    logits = sizes.vocab_size * (sizes.itemsize + (_SAMPLE_BYTES if sizes.on_cpu else 0))
    # The attention kernel keeps a float32 sum for each part of a row's tokens, about one for a page or two.
    partial = 0 if sizes.on_cpu else 4 * (own + prefix) * (sizes.hidden_size + 2 * sizes.num_heads)
    step = rows * (kept + logits + partial)
    prefill = activations * (max_prefix_len if sizes.on_cpu else max(PREFILL_ROWS, max_prefix_len))
    if sizes.on_cpu and sizes.panels:  # a prompt joins a step, which has memory of its own
        prefill = max_prefix_len * kept + step
    return {
        "weights": sizes.copied_weights,
        "panels": sizes.panels,
        "slots": 4 * words * rows,
        "states": rows * (max_new_tokens + 1) * sizes.hidden_size * sizes.itemsize if states else 0,
        "step": step,
        "prefill": prefill,
    }
