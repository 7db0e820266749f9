"""The state of decoding slots on the device, and the copy of the host's changes to it.

A slot is a row of every tensor here. All of them are parts of one int32 arena, so that what the host changes between
two steps is one copy to the device and one scatter: a list of words and their values.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from clvp_fast.engine.sampling_params import SamplingParams
from clvp_fast.engine.scheduler import Admission, Step

# The state of a slot in 64 bits: whole numbers first, then floating ones. `lengths` counts drawn tokens.
_WHOLE = ("token", "lengths", "limit", "stop", "seed", "candidate", "top_k", "do_sample")
_REAL = ("temperature", "top_p", "typical_p", "min_p", "repetition_penalty", "typical_mass")
# The original fills its prompt with this code, where its repetition penalty looks.
_PROMPT_CODE = 1
# The value at which each parameter has no effect.
NEUTRAL = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "typical_mass": 1.0,
}


class SlotState:
    """Hold the state tensors of `capacity` slots, all inactive at first.

    `tensors` has them by name. Their first axis is the slots, or for `prefix_table` and `prefix_lens` the prefixes:

    int64: `token` (the next to enter), `lengths`, `limit`, `stop`, `seed`, `candidate`, `top_k`.
    float64: `temperature`, `top_p`, `typical_p`, `min_p`, `repetition_penalty`, `typical_mass`.
    int32: `seq_lens` (-1: inactive), `prefix_index`, `prefix_lens`, `block_table` `[capacity, own_pages]`,
        `prefix_table` `[capacity, prefix_pages]`, `seen` `[capacity, ceil(vocab_size / 32)]`.
    bool: `do_sample`.

    Args:
        own_pages, prefix_pages: the most pages of a candidate and of a prompt.
        max_new_tokens: the most tokens that a candidate may draw.
        start_token, stop_token: the token that candidates begin with, and the default of the one that ends them.
    """

    def __init__(
        self,
        capacity: int,
        own_pages: int,
        prefix_pages: int,
        *,
        vocab_size: int,
        max_new_tokens: int,
        start_token: int,
        stop_token: int,
        device: torch.device,
    ):
        self._capacity = capacity
        self.device = device
        self._max_new_tokens = max_new_tokens
        self._start_token, self._stop_token = start_token, stop_token
        shapes = dict(
            wide=(len(_WHOLE) + len(_REAL), 2 * capacity),
            seq_lens=(capacity,),
            prefix_index=(capacity,),
            prefix_lens=(capacity,),
            block_table=(capacity, own_pages),
            prefix_table=(capacity, prefix_pages),
            seen=(capacity, -(-vocab_size // 32)),
        )
        sizes = [int(np.prod(shape)) for shape in shapes.values()]
        self._offsets = dict(zip(shapes, np.cumsum([0, *sizes]).tolist(), strict=False))
        self._arena = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        parts = zip(shapes.items(), self._arena.split(sizes), strict=True)
        tensors = {name: part.view(shape) for (name, shape), part in parts}
        self._wide = tensors.pop("wide").view(torch.int64)
        tensors |= zip(_WHOLE, self._wide, strict=False)
        tensors |= zip(_REAL, self._wide[len(_WHOLE) :].view(torch.float64), strict=True)
        # Each is 0 or 1 in 64 bits, whose lowest 8 are a bool.
        tensors["do_sample"] = tensors["do_sample"].view(torch.bool)[::8]
        self.tensors: dict[str, torch.Tensor] = tensors
        tensors["seq_lens"].fill_(-1)
        for name, value in NEUTRAL.items():
            tensors[name].fill_(value)
        # The host's record of its slots: which are taken, which decode greedily, and their parameters.
        self.active = np.zeros(capacity, dtype=bool)
        self._greedy = np.zeros(capacity, dtype=bool)
        self._known = {name: np.full(capacity, value, dtype=np.float64) for name, value in NEUTRAL.items()}
        # The results of `shortcuts` by number of rows, until the slots change.
        self._found: dict[int, dict[str, float | bool]] = {}

    def clear(self) -> None:
        """Make every slot inactive."""
        self._found.clear()
        self.tensors["seq_lens"].fill_(-1)
        self._forget(np.arange(self._capacity))

    def first(self, rows: int) -> dict[str, torch.Tensor]:
        """Return `tensors` of the first `rows` slots; tables of prefixes are whole."""
        return {name: x if name in ("prefix_table", "prefix_lens") else x[:rows] for name, x in self.tensors.items()}

    def shortcuts(self, rows: int) -> dict[str, float | bool]:
        """Return numbers that `sample` can take in place of the first `rows` slots' tensors, with the same tokens.

        They are a parameter's neutral value where all slots have it, and the `do_sample` that the active slots share.
        """
        if rows in self._found:
            return self._found[rows]
        found: dict[str, float | bool] = {
            name: value for name, value in NEUTRAL.items() if (self._known[name][:rows] == value).all()
        }
        greedy, active = self._greedy[:rows], self.active[:rows]
        if not greedy.any() or greedy[active].all():
            found["do_sample"] = not greedy.any()
        self._found[rows] = found
        return found

    def apply(self, step: Step, params: Mapping[Any, SamplingParams]) -> None:
        """Enter a scheduler's `Step` except its prefills: slots freed, candidates admitted, pages entered, slots moved.

        Raises `ValueError` for parameters (by key, `SamplingParams`) without a seed or with too many new tokens.
        """
        states = {key: self._request_state(params[key]) for key in {a.key for a in step.admitted}}
        self._found.clear()
        updates = _Updates(self._offsets)
        slots = np.array([admission.slot for admission in step.admitted], dtype=np.int64)
        sources, targets = np.array(step.moves, dtype=np.int64).reshape(-1, 2).T

        freed = np.array([*{*step.freed_slots} - {*slots.tolist()}], dtype=np.int64)
        updates.put("seq_lens", freed, -1)
        self._forget(freed)
        if step.admitted:
            self._admit(updates, step.admitted, slots, states, params)
        if step.new_pages:
            owners, places, pages = np.array(step.new_pages, dtype=np.int64).T
            updates.put("block_table", owners * self.tensors["block_table"].shape[1] + places, pages)
        for prefill in step.prefills:
            start = prefill.prefix_row * self.tensors["prefix_table"].shape[1]
            updates.put("prefix_table", start + np.arange(len(prefill.pages)), prefill.pages)
            updates.put("prefix_lens", [prefill.prefix_row], prefill.prefix_len)

        words, values, *indices = to_device(self.device, *updates.arrays(), slots, sources, targets)
        slots_there, sources_there, targets_there = indices
        if len(slots):
            self.tensors["seen"].index_fill_(0, slots_there, 0)
        if len(words):
            self._arena.index_put_((words,), values.int())
        if len(sources):
            for known in (self.active, self._greedy, *self._known.values()):
                known[targets] = known[sources]
            self._forget(sources)
            self._wide[:, targets_there] = self._wide[:, sources_there]
            for name in ("seq_lens", "prefix_index", "block_table", "seen"):
                self.tensors[name][targets_there] = self.tensors[name][sources_there]
            self.tensors["seq_lens"].index_fill_(0, sources_there, -1)

    def _forget(self, slots: np.ndarray) -> None:
        self.active[slots] = self._greedy[slots] = False
        for name, value in NEUTRAL.items():
            self._known[name][slots] = value

    def _admit(
        self,
        updates: "_Updates",
        admitted: list[Admission],
        slots: np.ndarray,
        states: Mapping[Any, np.ndarray],
        params: Mapping[Any, SamplingParams],
    ) -> None:
        """Write the first state of candidates, and their parameters."""
        wide = np.stack([states[admission.key] for admission in admitted])
        wide[:, _WHOLE.index("candidate")] = [admission.candidate for admission in admitted]
        words = (np.arange(wide.shape[1]) * self._capacity + slots[:, None])[..., None] * 2 + np.arange(2)
        updates.put("wide", words.ravel(), wide.view(np.int32).ravel())
        updates.put("seq_lens", slots, 0)
        updates.put("prefix_index", slots, [admission.prefix_row for admission in admitted])
        # As in `GenerationMixin`, the repetition penalty applies to the start token; as in the original, to code 1.
        of_original = np.array([params[admission.key].penalize_prompt for admission in admitted])
        self._mark_seen(updates, slots[of_original], {self._start_token, _PROMPT_CODE})
        self._mark_seen(updates, slots[~of_original], {self._start_token})
        self.active[slots] = True
        self._greedy[slots] = [not params[admission.key].do_sample for admission in admitted]
        self._known["top_k"][slots] = wide[:, _WHOLE.index("top_k")]
        for name, values in zip(_REAL, wide[:, len(_WHOLE) :].view(np.float64).T, strict=True):
            self._known[name][slots] = values

    def _mark_seen(self, updates: "_Updates", slots: np.ndarray, tokens: set[int]) -> None:
        masks: dict[int, int] = {}  # by word, because several tokens may share one
        for word, bit in (divmod(token, 32) for token in tokens):
            masks[word] = masks.get(word, 0) | 1 << bit
        for word, mask in masks.items():
            updates.put("seen", slots * self.tensors["seen"].shape[1] + word, np.uint32(mask).view(np.int32))

    def _request_state(self, params: SamplingParams) -> np.ndarray:
        """Return the 64-bit state of a request's candidates, floating numbers as their bits, without `candidate`."""
        if params.seed is None:
            raise ValueError("the parameters of a request have no seed: draw one before it is admitted")
        if params.max_new_tokens > self._max_new_tokens:
            raise ValueError(
                f"a request may draw {params.max_new_tokens} tokens, and there is room for {self._max_new_tokens}"
            )
        whole = dict(
            token=self._start_token,
            lengths=0,
            limit=params.max_new_tokens,
            stop=self._stop_token if params.stop_token is None else params.stop_token,
            seed=(params.seed + 2**63) % 2**64 - 2**63,  # seeds from 2^63 on keep their bits
            candidate=0,
            top_k=params.top_k or 0,
            do_sample=params.do_sample,
        )
        real = {name: getattr(params, name) for name in _REAL}
        if not params.do_sample:
            # Greedy decoding ignores the others; neutral values keep the batch's shortcuts.
            whole["top_k"] = 0
            real |= {name: value for name, value in NEUTRAL.items() if name in real and name != "repetition_penalty"}
        floats = np.array([real[name] for name in _REAL], dtype=np.float64)
        return np.concatenate([np.array([whole[name] for name in _WHOLE], dtype=np.int64), floats.view(np.int64)])


class _Updates:
    """Gather words of the arena that are to be written, on the host."""

    def __init__(self, offsets: dict[str, int]):
        self._offsets = offsets
        self._words, self._values = [np.empty(0, np.int64)], [np.empty(0, np.int64)]

    def put(self, part: str, words: ArrayLike, values: ArrayLike) -> None:
        """Write `values` (one for all, or one each) at `words` of a part of the arena, counted from its beginning."""
        words = np.asarray(words, dtype=np.int64) + self._offsets[part]
        self._words.append(words)
        self._values.append(np.broadcast_to(np.asarray(values, dtype=np.int64), words.shape))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate(self._words), np.concatenate(self._values)


def to_device(device: torch.device, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
    """Copy arrays of whole numbers below 2^31 to a device as int64, in one copy that the host does not wait for."""
    staged = torch.from_numpy(np.concatenate(arrays).astype(np.int32))
    if device.type == "cuda":
        staged = staged.pin_memory()
    return staged.to(device, non_blocking=True).long().split([len(array) for array in arrays])
