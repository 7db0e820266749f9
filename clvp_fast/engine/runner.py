"""The data plane: pages, the state of decoding slots, and the step that advances them all.

The scheduler's changes go to the device before a step, in one copy (`slots.py`), and the step's tokens come back after
it, in another that the host does not wait for (`host_copy.py`). Within a step the host reads and decides nothing: a
step is a list of calls, which is bound when a step of its kind first runs (`step.py`), and may be captured then
(`captures.py`).

The bits of a row: our operators compute each row independently of the others. Libraries' products choose their tiles,
and with them the order of sums, by the number of rows. On a GPU a `deterministic` runner, which is the default there,
makes all products with our own kernel, those of a step with `PRODUCT_ROWS` rows a call at most, those of a prefill with
one number of rows (`prompts.py`). On a CPU prompts are prefilled one by one, and the kernels of the native library need
no more care; torch's products do not promise a row's bits in float32 (`decoder.min_rows`: a step is padded with
inactive rows to a number from which they no longer change) and in float64: a `deterministic` step always has the rows
of all slots.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch

from clvp_fast.engine.captures import Captures
from clvp_fast.engine.decoder import PagedDecoder, min_rows
from clvp_fast.engine.host_copy import HostCopy
from clvp_fast.engine.persistent import MAX_ROWS, PersistentStep
from clvp_fast.engine.prompts import PREFILL_ROWS, Prompts
from clvp_fast.engine.sampling_params import SamplingParams
from clvp_fast.engine.scheduler import Prefill, Step, batch_buckets
from clvp_fast.engine.slots import SlotState, to_device
from clvp_fast.engine.step import ENTERED, Prompt, bind_draw
from clvp_fast.engine.weight_versions import WeightVersions
from clvp_fast.models.clvp.causal_lm import ClvpForCausalLM
from clvp_fast.models.clvp.tokens import longest_prompt, start_token, stop_token
from clvp_fast.ops.binding import BoundCall, Scratch
from clvp_fast.ops.dispatch import OPERATORS, device_guard, situation
from clvp_fast.ops.paged_attention import FLOAT8

# The most rows of a product of a deterministic step on a GPU: for all numbers up to there `kernels/mlp.py` splits a sum
# in the same way. Tortoise's largest presets have so many candidates.
PRODUCT_ROWS = 256
# The number of bound steps (by rows and settings) that are kept, a few hundred kilobytes each.
MAX_BOUND = 32

P = ParamSpec("P")
R = TypeVar("R")


def is_deterministic(wanted: bool | None, device_type: str, persistent: bool) -> bool:
    """Tell whether a runner's steps are deterministic, if that is `wanted` (None: not said) on this type of device.

    Raises `ValueError` if it is wanted together with `persistent`.
    """
    if wanted and persistent:
        raise ValueError("persistent steps round otherwise than larger ones: leave out deterministic, or persistent")
    return device_type == "cuda" and not persistent if wanted is None else wanted


def _on_its_device(method: "Callable[Concatenate[Runner, P], R]") -> "Callable[Concatenate[Runner, P], R]":
    """Make the runner's device the current one during a method, because streams, events and captures use that."""

    @wraps(method)
    def guarded(self: "Runner", *args: P.args, **kwargs: P.kwargs) -> R:
        with device_guard(self.device):
            return method(self, *args, **kwargs)

    return guarded


@dataclass(frozen=True)
class StepHandle:
    """A step under way, whose results `[2, rows]` int64 are on their way to the host."""

    copy: HostCopy
    num_slots: int

    def wait(self) -> np.ndarray:
        (results,) = self.copy.wait()
        return results[:, : self.num_slots]


class Runner:
    """Run the steps that a scheduler plans.

    Args:
        model: a `ClvpForCausalLM` in eval mode; its parameters are shared.
        num_pages, page_size: pages of every layer, and tokens per page.
        max_batch: the number of slots, and of rows of the prefix table.
        max_new_tokens: the most tokens that a candidate may draw.
        max_prefix_len: the most tokens of a prompt; by default those of the longest text.
        page_dtype: `torch.float8_e4m3fn`; None: the dtype of the model.
        weight_dtype: `torch.int8`: the layers' products run over copies of their weights in 8 bits; None: over the
            weights.
        packed: products read panels of their weights, which are copies. After weights change in place, the panels are
            renewed when the next candidate is admitted.
        activation_dtype: `torch.int8`: what the layers' products multiply is rounded to 8 bits, as for
            [`PagedDecoder`]; None: it is multiplied as it is.
        states: keep the hidden state, after both final norms, that each token was drawn from.
        deterministic: a row's bits depend on no other row, nor on their number: every product has one number of rows.
            The torch path of `paged_attention_decode` looks at all rows, so it is refused. None: so on a GPU, without
            `persistent`, but nothing is refused.
        capture: replay steps and prefills as CUDA graphs, once `warm_up` has captured them; None: on CUDA.
        capture_late: where steps are captured, capture those of a number of rows when they come for the second time;
            `warm_up` is then not needed. If a capture fails, steps are launched one by one.
        persistent: steps of up to four rows are one launch (`persistent.py`), which rounds in another order than larger
            steps. On an H200 this gains a quarter for one candidate, and loses for four.

    Raises:
        ValueError: impossible sizes, with their bounds; capturing without CUDA; a model that `persistent` does not
            serve, with the reason; `deterministic` and `persistent` together.
        RuntimeError: `deterministic` is set, and attention has only its torch path here.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: ClvpForCausalLM,
        num_pages: int,
        page_size: int,
        max_batch: int,
        max_new_tokens: int,
        *,
        max_prefix_len: int | None = None,
        page_dtype: torch.dtype | None = None,
        weight_dtype: torch.dtype | None = None,
        states: bool = False,
        deterministic: bool | None = None,
        capture: bool | None = None,
        capture_late: bool = False,
        persistent: bool = False,
        packed: bool = False,
        activation_dtype: torch.dtype | None = None,
    ):
        decoder = self.decoder = PagedDecoder(
            model, weight_dtype=weight_dtype, packed=packed, activation_dtype=activation_dtype
        )
        config, device = model.config, decoder.device
        if min(num_pages, page_size, max_batch) < 1:
            raise ValueError(
                f"num_pages, page_size and max_batch must be from 1 up, not {num_pages}, {page_size} and {max_batch}"
            )
        if page_dtype not in (None, FLOAT8):
            raise ValueError(f"page_dtype must be {FLOAT8}, or None for the model's own, not {page_dtype}")
        if not 1 <= max_new_tokens <= decoder.max_new_tokens:
            raise ValueError(
                f"max_new_tokens must be from 1 to {decoder.max_new_tokens}, which the positions of this checkpoint "
                f"allow, not {max_new_tokens}"
            )
        if capture and device.type != "cuda":
            raise ValueError(f"steps are captured on a CUDA device, and the model is on {device}: leave out capture")
        self.device, self.max_batch, self.max_new_tokens = device, max_batch, max_new_tokens
        self.max_prefix_len = longest_prompt(config) if max_prefix_len is None else max_prefix_len
        on_cpu = device.type == "cpu"
        self._refuses_torch = bool(deterministic)
        self.deterministic = is_deterministic(deterministic, device.type, persistent)
        self.product_rows = PRODUCT_ROWS if self.deterministic and not on_cpu else None
        self._captures = device.type == "cuda" if capture is None else capture
        self._min_rows = min_rows(model)
        self._bound: dict[tuple, tuple[BoundCall, ...]] = {}

        rows = self._capacity = max(max_batch, self._min_rows)
        self._scratch = Scratch(rows, device)
        self.slots = SlotState(
            rows,
            -(-max_new_tokens // page_size),
            -(-self.max_prefix_len // page_size),
            vocab_size=decoder.vocab_size,
            max_new_tokens=max_new_tokens,
            start_token=start_token(config),
            stop_token=stop_token(config),
            device=device,
        )
        self.pages = decoder.pages(num_pages, page_size, page_dtype)
        table, always = self.slots.tensors["prefix_table"], self.product_rows is not None
        prompt_rows = None if on_cpu else max(PREFILL_ROWS, self.max_prefix_len)
        self._prompts = Prompts(decoder, self.pages, table, prompt_rows, always)
        self._joins = on_cpu  # whether a prompt may join the next step
        self._waits = False  # whether one does
        self._made_for = decoder.dtype, decoder.device
        self._copied: WeightVersions | None = None
        if weight_dtype is not None or self.pages.scales is not None:
            self._copied = WeightVersions(model.model.decoder.layers, "model.decoder.layers.")
        self._packed = WeightVersions(model) if decoder.packed else None
        self.require_kernel()
        # Torch's attention reads lengths on the host, which no graph can.
        self._graphs = Captures(late=capture_late and self._captures and self._has_kernel())
        self._persistent: PersistentStep | None = None
        if persistent:
            self._make_persistent()
        self._arrivals = torch.zeros(rows, decoder.num_heads, dtype=torch.int32, device=device)
        self._results: dict[int, torch.Tensor] = {}
        self._rows = torch.arange(rows, device=device)
        self._states = None
        if states:
            # One position more than there are tokens, for the writes of a finished row.
            shape = rows, max_new_tokens + 1, decoder.hidden_size
            self._states = torch.empty(shape, dtype=decoder.dtype, device=device)

    @torch.inference_mode()
    @_on_its_device
    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Capture the prefill and the step of each batch bucket, the largest first.

        Calls `progress(captured, buckets)` after each step.

        Without capture this does nothing. Raises `RuntimeError` while candidates hold slots.
        """
        if not self._captures and self._persistent is None:
            return
        if self.slots.active.any():
            raise RuntimeError("warm_up() runs steps of its own: call it while no candidate holds a slot")
        if self.decoder.follow():
            self._bound.clear()
        if self._persistent is not None:
            self._make_persistent()  # from the parameters' current addresses
        if not self._captures:
            return
        sizes = batch_buckets(self._capacity)
        self._graphs.clear()
        self._prompts.clear()
        self._graphs.capture("prefill", self._prompts.run)
        for count, size in enumerate(reversed(sizes), 1):
            self._graphs.capture(size, partial(self._step, size, typical_mass=1.0))
            if progress is not None:
                progress(count, len(sizes))

    @torch.inference_mode()
    @_on_its_device
    def apply(self, step: Step, prompts: Mapping[Any, torch.Tensor], params: Mapping[Any, SamplingParams]) -> None:
        """Bring a scheduler's changes to the device, and prefill new prompts.

        Args:
            step: the scheduler's `Step`; slots are numbered as before its moves.
            prompts: by the key of each prefill, embeddings `[prefix_len, hidden_size]` with position embeddings added.
            params: by the key of each admission, `SamplingParams` with a seed.

        Raises:
            ValueError: a prompt of another shape or too long, too many new tokens, no seed. Nothing has changed then.
            RuntimeError: the model's parameters moved after `warm_up`.
        """
        if not (step.freed_slots or step.prefills or step.admitted or step.new_pages or step.moves):
            return
        if step.admitted and self.decoder.has_moved:
            if self._graphs or self._persistent is not None:
                raise RuntimeError("the model's parameters moved after warm_up(): call it again when no candidate runs")
            self.decoder.follow()
            self._bound.clear()
            if self._packed is not None:
                self._packed = WeightVersions(self.decoder.model)
        if step.admitted and self._packed is not None and self._packed.changed() is not None:
            self._packed = WeightVersions(self.decoder.model)
            self.decoder.weights.repack()
        for prefill in step.prefills:
            self._check_prompt(prefill, prompts[prefill.key])
        self.prefill_waiting()
        self.slots.apply(step, params)
        if self._states is not None and step.moves:
            sources, targets = to_device(self.device, *np.array(step.moves, dtype=np.int64).T)
            self._states[targets] = self._states[sources]
        self._prefill(step.prefills, prompts)

    @torch.inference_mode()
    def prefill_waiting(self) -> None:
        """Prefill a prompt that waits for the next step, for a caller who makes none."""
        if self._waits:
            self._waits = False
            self._prompts.run()

    @torch.inference_mode()
    @_on_its_device
    def decode(self, num_slots: int) -> StepHandle:
        """Start one step of the first `num_slots` slots, without waiting for it."""
        if not 1 <= num_slots <= self.max_batch:
            raise ValueError(f"num_slots must be from 1 to {self.max_batch}, not {num_slots}")
        rows = self._rows_of(num_slots)
        shortcuts = self.slots.shortcuts(rows)
        if self._waits:
            self._waits = False
            for call in self._bind(rows, shortcuts, self._prompts.entered):
                call()
        elif self._graphs.serves(rows) and "typical_mass" in shortcuts:  # neutral, as it is when steps are captured
            self._graphs.run(rows, partial(self._step, rows, typical_mass=1.0))
        else:
            self._step(rows, **shortcuts)
        return StepHandle(HostCopy(self._result(rows)), num_slots)

    @torch.inference_mode()
    @_on_its_device
    def reset(self) -> None:
        """Empty every slot after a step that broke off. Handles of earlier steps are no longer valid."""
        self.slots.clear()
        self._waits = False
        self._arrivals.zero_()

    def tokens(self, handle: StepHandle) -> np.ndarray:
        """Return each slot's token of a step, `[num_slots]` int64; -1: the slot was inactive or had finished before."""
        return handle.wait()[0]

    def finished(self, handle: StepHandle) -> np.ndarray:
        """Return `[num_slots]` bool: the slot drew its last token in this step, or has a token of -1."""
        return handle.wait()[1].astype(bool)

    @torch.no_grad()
    def states(self, slot: int, length: int) -> torch.Tensor:
        """Return a copy of the hidden states that a candidate's first `length` tokens were drawn from.

        They are `[length, hidden_size]`, on the device. Take them before the slot gets another candidate; moves take
        them along. Raises `RuntimeError` if none are kept.
        """
        return self._kept(slot)[:length].clone()

    @torch.no_grad()
    def state(self, slot: int, place: int) -> torch.Tensor:
        """Return a copy of the hidden state `[hidden_size]` of one token, as `states` does for all."""
        return self._kept(slot)[place].clone()

    def _kept(self, slot: int) -> torch.Tensor:
        if self._states is None:
            raise RuntimeError("this runner keeps no states: make it with states=True")
        return self._states[slot]

    @property
    def replays(self) -> bool:
        """Tell whether steps are replayed, or will be once they have run."""
        return self._graphs.late or len(self._graphs) > 0

    def outdated(self) -> str | None:
        """Return why steps would not use the model's current weights, as the start of a sentence, or None.

        A write through `.data` after a copy was made is not noticed.
        """
        if (found := (self.decoder.dtype, self.decoder.device)) != self._made_for:
            dtype, device = self._made_for
            return f"the decoder is {found[0]} on {found[1]} now, and its pages were made for {dtype} on {device}"
        if self._copied is not None and (name := self._copied.changed()) is not None:
            return f"parameter {name} of the decoder was changed or moved after copies were made in 8 bits"
        if self._graphs or self._persistent is not None:
            made = "steps were captured that read them where they lay"
        elif self.decoder.weight_dtype is not None:
            made = "copies of others were made in 8 bits"
        else:
            return None  # in-place changes are followed
        return f"parameters of the decoder were moved after {made}" if self.decoder.has_moved else None

    def _make_persistent(self) -> None:
        tables = (self.slots.tensors[name].shape[1] for name in ("block_table", "prefix_table"))
        self._persistent = PersistentStep(self.decoder, self.pages, *tables)
        self._bound.clear()

    def require_kernel(self) -> None:
        """Raise `RuntimeError` if a step for which `deterministic` was asked would use attention's torch path.

        In that path the length of a row's sums depends on the longest row. `backend("torch")` around a call chooses it.
        """
        if self._refuses_torch and not self._has_kernel():
            raise RuntimeError(
                "deterministic=True needs the kernel of clvp_fast.paged_attention_decode, which does not serve "
                f"{self.decoder.dtype} with {self.pages.data.dtype} pages and head_dim {self.decoder.head_dim} on "
                f"{self.device} here: clvp_fast.explain() tells more; backend('reference') serves anything, slowly"
            )

    def _has_kernel(self) -> bool:
        """Tell whether steps have another attention than torch's path."""
        attention = OPERATORS["paged_attention_decode"]
        q = torch.empty(1, self.decoder.num_heads, self.decoder.head_dim, dtype=self.decoder.dtype, device=self.device)
        pages = self.pages.layer(0)
        stored = pages["k_pages"], pages["v_pages"], self.slots.tensors["block_table"]
        return attention.choose((q, q, q, *stored, *[None] * 8)) is not attention.torch

    def _rows_of(self, num_slots: int) -> int:
        """Return the number of rows of a step of `num_slots` slots."""
        if self.deterministic and self.product_rows is None:
            return self._capacity
        if self.replays:
            return min(size for size in batch_buckets(self._capacity) if size >= num_slots)
        return max(num_slots, self._min_rows)

    def _result(self, rows: int) -> torch.Tensor:
        """Return where a step writes its tokens, and 1 for each last token or 0: `[2, rows]` int64."""
        if rows not in self._results:
            self._results[rows] = torch.zeros(2, rows, dtype=torch.int64, device=self.device)
        return self._results[rows]

    def _step(self, rows: int, **shortcuts: float | bool) -> None:
        """Run one step of the first `rows` slots, which updates their state and writes `_result`.

        shortcuts: numbers that `sample` takes in place of tensors, to save work without changing a token.
        """
        key = (rows, *situation(), *shortcuts.items())
        calls = self._bound.pop(key, None) or self._bind(rows, shortcuts)
        self._bound[key] = calls  # as the newest; the oldest is dropped first
        if len(self._bound) > MAX_BOUND:
            del self._bound[next(iter(self._bound))]
        for call in calls:
            call()

    def _bind(
        self, rows: int, shortcuts: dict[str, float | bool], prompt: Prompt | None = None
    ) -> tuple[BoundCall, ...]:
        """Bind the calls of a step, with a prompt to enter; all choices are made here. Raises as `require_kernel`."""
        self.require_kernel()
        state = self.slots.first(rows)
        scratch = self._scratch if prompt is None else Scratch(rows + len(prompt.embeds), self.device)
        entered = [state[name] for name in ENTERED]
        if self._persistent is not None and rows <= MAX_ROWS:
            bound = self._persistent.bind(*entered, scratch=scratch)
        else:
            bound = self.decoder.bind(
                *entered,
                pages=self.pages,
                arrivals=self._arrivals[:rows],
                scratch=scratch,
                product_rows=self.product_rows,
                prompt=prompt,
            )
        calls = [*bound.calls]
        if self._states is not None:
            # Inactive rows write after the last kept state, at position `lengths`.
            places = self._rows[:rows], state["lengths"]
            calls.append(partial(self._states.index_put_, places, bound.hidden))
        return *calls, *bind_draw(state, bound.logits, self._result(rows), shortcuts, scratch)

    def _check_prompt(self, prefill: Prefill, prompt: torch.Tensor) -> None:
        expected = prefill.prefix_len, self.decoder.hidden_size
        if prompt.shape != expected:
            raise ValueError(f"a prompt must be {[*expected]}, not {[*prompt.shape]}")
        if prefill.prefix_len > self.max_prefix_len:
            raise ValueError(
                f"a prompt has {prefill.prefix_len} tokens, and there is room for "
                f"{self.max_prefix_len}: split the text, or make room with max_prefix_len"
            )

    def _prefill(self, prefills: list[Prefill], prompts: Mapping[Any, torch.Tensor]) -> None:
        """Prefill prompts into the pages that the prefix table names, the last one perhaps with the next step.

        So weights are read once for a prompt and its candidates' first step. It is done where that changes no bit of
        the other candidates' rows.
        """
        for place, group in enumerate(groups := list(self._prompts.groups(prefills))):
            self._prompts.enter(group, prompts)
            self._waits = self._joins and place == len(groups) - 1 and self.decoder.has_rows_apart
            if not self._waits:
                self._graphs.run("prefill", self._prompts.run)
