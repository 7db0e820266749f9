"""`CandidateEngine`: texts and voices in, ranked speech candidates out, hundreds of them decoded as one batch."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import ref

import torch

from clvp_fast.checkpoint import best_device, load_checkpoint
from clvp_fast.engine.calls import Call, Listener, Pending, tell
from clvp_fast.engine.decode_loop import Job
from clvp_fast.engine.defaults import MEMORY_FRACTION, PAGE_SIZE, SCORING_MODES, TEXT_CLEANINGS
from clvp_fast.engine.door import Door, token_limit
from clvp_fast.engine.latents import diffusion_latents
from clvp_fast.engine.memory import MemoryPlan, default_batch, free_bytes, plan, trim_heap
from clvp_fast.engine.ranking import Ranker
from clvp_fast.engine.requests import CandidateRequest, CandidateResult
from clvp_fast.engine.runner import Runner
from clvp_fast.engine.sampling_params import SamplingParams
from clvp_fast.engine.scoring import Scorer, check_scorer
from clvp_fast.engine.turns import Turns
from clvp_fast.engine.voices import Voice, VoiceCache
from clvp_fast.engine.work import Work
from clvp_fast.io.errors import require_whole, shown
from clvp_fast.models.clvp.causal_lm import ClvpForCausalLM
from clvp_fast.models.clvp.kept import release
from clvp_fast.models.common.parameters import arrange_for_decoding
from clvp_fast.ops.dispatch import uncast
from clvp_fast.ops.paged_attention import PAGE_SIZES
from clvp_fast.ops.panels import unserved

_END: Any = object()  # the end of a call's requests


class CandidateEngine:
    """Generate and rank candidates for many requests in one batch that never waits for the slowest of them.

    The candidates of a request share its prompt; when a candidate stops, the next one takes its slot. A candidate's
    codes depend only on checkpoint, request, seed and its index, not on the rest of the batch.

    Args:
        model: a [`ClvpModelForConditionalGeneration`]. The engine puts it into eval mode and shares its parameters.
        processor: its [`ClvpProcessor`].
        max_batch: the most candidates decoded at once; by default as many as memory allows, up to 512 (on a CPU 16).
        max_new_tokens: the most tokens that a request may ask for; by default 500, or fewer if the checkpoint has fewer
            positions.
        num_pages: pages of keys and values; by default as many as `max_batch` candidates need, if memory allows.
        memory_fraction: the share of the memory free now that the engine may take, for keys and values and everything
            else; by default 0.9.
        page_size: tokens per page of keys and values, 16 (the default) or 32.
        page_dtype: `torch.float8_e4m3fn` to keep keys and values in 8 bits; by default the model's dtype.
        weight_dtype: `torch.int8` to decode with copies of the layers' weights in 8 bits, which are made here; by
            default with the model's own. docs/architecture.md has the effect of both dtypes on accuracy; `refresh`
            explains when copies must be renewed.
        activation_dtype: `torch.int8` to round what the layers' products multiply to 8 bits too, each row in steps of
            a 127th of its largest number, and to multiply integers; on a CPU with AVX2 or AVX-512, over packed weights
            in 8 bits (`weight_dtype=torch.int8`). It is the fastest, and changes the candidates most; by default
            products multiply what they are given.
        packed_weights: decode with copies of all weights in the order in which a CPU's kernel reads them, made here
            (docs/kernels.md has the gain by number of candidates). None: if there is such a kernel, and as many
            candidates fit beside the copies as without them.
        scoring: "padded" (the default), as the original scores, or "trimmed" ([`Ranker`] explains them).
        score_dtype: embed candidates for their scores by a copy of the speech encoder in this dtype; by default by the
            model's own. `torch.bfloat16` halves the time on CPUs that multiply it (docs/ranking.md has its effect).
        scorer: a [`Scorer`] that ranks candidates in place of `model`'s own encoders.
        latents: results have the latents of their best candidates for Tortoise's diffusion, from a second pass over the
            codes of each (see `diffusion_latents`).
        states: keep the decoder's state for each code while its candidate is decoded, for `stream(states=True)`.
        text_ends: how many end tokens follow the text in a prompt: the two of Tortoise's API, or one for `input_ids`
            that already end with the other.
        deterministic: decode so that a candidate's bits do not depend on the batch, in half types too. None: so on a
            CUDA device, in every dtype, unless `persistent` is set; there False is faster (docs/batch-invariance.md).
            On a CPU float32 needs no setting.
        persistent: run steps of up to four candidates as one launch, for a short wait for few candidates; on a CUDA
            device in half types (`Runner` has the details).

    Raises:
        ValueError: a model with hooks, adapters or replaced modules, which the engine would not call; an impossible
            size; too little memory for a single candidate; `scoring` or `score_dtype` together with a `scorer`;
            `activation_dtype` without weights in 8 bits, without packed weights or where no kernel serves it;
            `deterministic` together with `persistent`; or a device or model that `persistent` does not serve.
        TypeError: a `scorer` without a method `score`.
        RuntimeError: `deterministic=True`, and attention has no kernel for this dtype on this device.
    """

    def __init__(
        self,
        model,
        processor,
        *,
        max_batch: int | None = None,
        max_new_tokens: int | None = None,
        num_pages: int | None = None,
        memory_fraction: float = MEMORY_FRACTION,
        page_size: int = PAGE_SIZE,
        page_dtype: torch.dtype | None = None,
        weight_dtype: torch.dtype | None = None,
        activation_dtype: torch.dtype | None = None,
        packed_weights: bool | None = None,
        scoring: str = SCORING_MODES[0],
        score_dtype: torch.dtype | None = None,
        scorer: Scorer | None = None,
        latents: bool = False,
        states: bool = False,
        text_ends: int = 2,
        deterministic: bool | None = None,
        persistent: bool = False,
    ):
        if page_size not in PAGE_SIZES:
            wanted = " or ".join(map(str, PAGE_SIZES))
            raise ValueError(f"page_size must be {wanted}, the sizes that attention has kernels for, not {page_size}")
        if scorer is not None:
            check_scorer(scorer)
            if scoring != SCORING_MODES[0] or score_dtype is not None:
                given = f"scoring={scoring!r}" if score_dtype is None else f"score_dtype={score_dtype}"
                raise ValueError(f"{given} is how the model's own encoders score: leave it out with a scorer")
        if activation_dtype is not None:
            if packed_weights is False:
                raise ValueError("activation_dtype has products over packed weights alone: leave out packed_weights")
            packed_weights = True
        self._door = Door(model, processor, text_ends)
        self.model, self.processor = model, processor
        self._take_model()
        self.scorer: Scorer = Ranker(model, mode=scoring, dtype=score_dtype) if scorer is None else scorer
        self.max_new_tokens = token_limit(model) if max_new_tokens is None else max_new_tokens
        decoder = model.speech_decoder_model
        sizes = dict(
            max_new_tokens=self.max_new_tokens,
            page_size=page_size,
            page_dtype=page_dtype,
            weight_dtype=weight_dtype,
            states=states,
        )
        chosen = dict(activation_dtype=activation_dtype, deterministic=deterministic, persistent=persistent)
        self._keeps_states = states
        # Functions, not methods: then an engine that nobody references frees its pages at once.
        self._work = Work(
            self.scorer,
            partial(_planned, decoder, memory_fraction, num_pages, sizes, packed_weights),
            partial(_runner, decoder, sizes | chosen),
            default_batch(model.device) if max_batch is None else max_batch,
            partial(diffusion_latents, decoder) if latents else None,
        )
        trim_heap()  # after copies of weights
        # A turn computes for all threads, so the autocast of the thread that has it must not apply.
        self._turns = Turns(lambda: uncast(model.device))

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = torch.float32,
        text_cleaning: str = TEXT_CLEANINGS[0],
        **options,
    ) -> "CandidateEngine":
        """Make the engine of a checkpoint: "demo", a folder, or a hub id.

        Args:
            device: by default the GPU if there is one.
            dtype: of the weights, such as "bfloat16" or `torch.bfloat16`.
            text_cleaning: as [`ClvpTokenizer`] takes it.
            options: keyword arguments of the constructor.
        """
        weights: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        checkpoint = load_checkpoint(name, device=device or best_device(), dtype=weights, text_cleaning=text_cleaning)
        return cls(checkpoint.model, checkpoint.processor, **options)

    def __reduce__(self):
        raise TypeError(
            "an engine cannot be copied or pickled, because it has threads, pages and a model that others may share: "
            "make one where it is needed, as `CandidateEngine.from_pretrained` or `CandidateActor` in a worker"
        )

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> float:
        """Capture the decode step for every batch size, and return the seconds that it took. On a CPU it does nothing.

        Args:
            progress: called with (captured, sizes) after each.
        """
        started = time.perf_counter()
        self._turns.take(partial(self._work.warm_up, progress))
        return time.perf_counter() - started

    def refresh(self) -> None:
        """Renew everything that was derived from the model's weights, after they were changed or moved.

        An engine reads the model's own weights. The next request sees a change in place (`copy_`, `load_state_dict`, an
        optimizer's step), and packed copies are renewed for it. This method renews the rest: copies in 8 bits
        (`weight_dtype`), the scales of pages in 8 bits (`page_dtype`), captured steps (`warm_up`, `persistent`), and
        the pages of a model that was cast or moved to another device. If one of these is outdated, each request is
        refused with a `ValueError` that says so. Changes are found by the parameters' addresses and version counters,
        which do not show a write through `.data` (`weight.data.copy_(...)`) or numpy (`weight.detach().numpy()[:] =
        x`), nor the step of an optimizer with `fused=True`: call this method after such a write, also for packed copies
        and kept voices.

        Raises:
            RuntimeError: requests are under way, or a listener or scorer of the engine calls this method.
            ValueError: as from the constructor, for the model as it is now.
        """
        self._turns.take(self._refresh)

    @property
    def outdated(self) -> str | None:
        """Why every request would be refused until `refresh`, as the beginning of a sentence, or None."""
        return self._work.outdated()

    def _refresh(self) -> None:
        self._work.require_idle()
        self._door.refresh()
        self._take_model()
        if isinstance(self.scorer, Ranker):
            self.scorer.refresh()
        self._work.renew()
        trim_heap()

    def _take_model(self) -> None:
        self.model.eval()
        release(self.model)
        arrange_for_decoding(self.model)  # before the plan, which reads what is free

    @property
    def memory(self) -> MemoryPlan:
        """The numbers of candidates and pages of the batch; they shrink when memory runs out."""
        return self._work.memory

    def generate(
        self,
        requests: Iterable[CandidateRequest] | CandidateRequest,
        sampling: SamplingParams | None = None,
        *,
        keep: int = 1,
        on_token: Callable[[CandidateRequest, int, int], None] | None = None,
    ) -> Iterator[CandidateResult]:
        """Yield the result of each request as soon as it is finished.

        Requests are taken from the iterable as there is room for them. A request that fails (a bad clip, a text that is
        too long, its timeout) gives a result with its `error`, and the others go on. Stopping the iteration midway
        frees everything. Several iterations may run at once: their candidates share one batch.

        Args:
            sampling: parameters of requests that have none of their own; by default `SamplingParams()`.
            keep: how many of the best candidates `best()` and `latents` of a result can give.
            on_token: called with request, candidate and token as tokens are drawn; if it raises, its request fails.
        """
        return self._results(self._call(requests, sampling, keep, on_token))

    def _call(
        self,
        requests: Iterable[CandidateRequest] | CandidateRequest,
        sampling: SamplingParams | None = None,
        keep: int = 1,
        on_token: Listener | None = None,
    ) -> Call:
        if isinstance(requests, CandidateRequest):
            requests = [requests]
        if sampling is not None and not isinstance(sampling, SamplingParams):
            raise TypeError(f"sampling must be SamplingParams, not {type(sampling).__name__}")
        require_whole("keep", keep)
        if on_token is not None and not callable(on_token):
            raise TypeError(f"on_token must be callable, and is {shown(on_token)}")
        return Call(iter(requests), sampling or SamplingParams(), keep, on_token)

    def _results(self, call: Call, drawn: deque[tuple[int, int]] | None = None) -> Generator[Any, None, None]:
        """Yield the results of a call as they come; first the tokens that its listener has put into `drawn`."""
        try:
            while not call.closed:
                self._fill(call)
                seen = self._work.steps
                results = self._work.take(call)
                while drawn:
                    yield drawn.popleft()
                yield from results
                if call.ended:
                    return
                self._step(call, seen)
        finally:
            self._close(call)

    def _fill(self, call: Call) -> None:
        """Take requests of a call while there is room."""
        self._turns.refuse_mine()
        while call.more and self._work.has_room:
            request = next(call.requests, _END)
            if request is _END:
                call.more = False
                return
            pending = Pending(ref(call), request, call.keep, call.listener)
            place, call.taken = call.taken, call.taken + 1
            call.owed[pending] = None
            try:
                admit = partial(self._admit, request, call.sampling, place)
                pending.text_ids, pending.job = self._turns.take(admit)
                pending.job.states = call.states
                pending.job.on_token = None if call.listener is None else partial(tell, ref(pending))
                pending.prepared = time.perf_counter()
                self._work.pending[pending] = None
            except Exception as error:  # only this request is affected
                pending.fail(error)
                return  # its caller gets the error first, because an endless iterator could fail forever

    def _admit(self, request: CandidateRequest, sampling: SamplingParams, place: int) -> tuple[torch.Tensor, Job]:
        admitted = self._door.admit(request, sampling, place)
        self._work.check_weights()
        return admitted

    def _step(self, call: Call, seen: int) -> None:
        """Run one step of the whole batch, unless another thread has run one since `seen`."""
        self._turns.take(self._work.step, unless=lambda: self._work.steps != seen or call.closed)

    def _close(self, call: Call) -> None:
        call.closed = True
        self._settle()

    def _settle(self) -> None:
        """Free what nobody waits for. Inside a step this does nothing, because the step itself does so at its end."""
        if not self._turns.mine:
            self._turns.take(self._work.settle, unless=lambda: self._work.is_settled)

    def stream(
        self,
        request: CandidateRequest,
        sampling: SamplingParams | None = None,
        *,
        keep: int = 1,
        states: bool = False,
    ) -> Iterator[tuple[int, int] | tuple[int, int, torch.Tensor] | CandidateResult]:
        """Yield (candidate, token) as tokens are drawn, then the result, unless the request is cancelled.

        With `states`, yield (candidate, token, state). The state `[hidden_size]`, in the model's dtype and on its
        device, is the one after both final norms that the token was drawn from; a next stage can so begin before the
        end. This needs an engine made with `states=True`, else it raises `ValueError`.
        """
        if states and not self._keeps_states:
            raise ValueError("stream(states=True) needs an engine that keeps states: make it with states=True")
        drawn: deque[tuple[int, int]] = deque()
        call = self._call(request, sampling, keep, lambda request, *token: drawn.append(token))
        call.states = states
        return self._results(call, drawn)

    async def generate_async(
        self, requests: Iterable[CandidateRequest] | CandidateRequest, sampling: SamplingParams | None = None, **options
    ) -> AsyncIterator[CandidateResult]:
        """Run `generate` for asyncio. Each call has its own thread; all calls share one batch."""
        call = self._call(requests, sampling, **options)
        iterator = self._results(call)
        loop, context = asyncio.get_running_loop(), copy_context()
        thread = ThreadPoolExecutor(1, "clvp_fast generate_async")
        try:
            while True:
                step = loop.run_in_executor(thread, lambda: context.run(next, iterator, None))
                step.add_done_callback(lambda step: step.cancelled() or step.exception())  # otherwise nobody reads it
                if (result := await asyncio.shield(step)) is None:
                    return
                yield result
        finally:
            # The step under way ends first, even if this task is cancelled again.
            call.closed = True
            closed = loop.run_in_executor(thread, iterator.close)
            thread.shutdown(wait=False)
            await asyncio.shield(closed)

    def cancel(self, request: CandidateRequest) -> None:
        """Drop a submitted request without a result. The slots and pages of its candidates are free at once.

        Called from a listener, they are free at the end of the step.
        """
        self._work.drop(request)
        self._settle()

    @property
    def voices(self) -> VoiceCache:
        """The cache of the voices that requests have brought."""
        return self._door.voices

    def voice(self, request: CandidateRequest) -> Voice:
        """Return the voice of a request, from the cache if it is there; `save` it, or give it as `conditioning`."""
        voice = partial(self._door.voice, request)
        return voice() if self._turns.mine else self._turns.take(voice)


def _planned(
    decoder: ClvpForCausalLM,
    memory_fraction: float,
    num_pages: int | None,
    sizes: dict[str, Any],
    packed_weights: bool | None,
    max_batch: int | None,
) -> MemoryPlan:
    free = free_bytes(decoder.device)

    def planned(packed: bool) -> MemoryPlan:
        found = plan(decoder, free, memory_fraction, max_batch, **sizes, packed=packed)
        return found if num_pages is None else replace(found, num_pages=num_pages)

    weight = decoder.lm_head.weight
    if packed_weights is False or (packed_weights is None and unserved(weight.dtype, weight) is not None):
        return planned(False)
    if packed_weights:
        return planned(True)
    plain = planned(False)
    with suppress(ValueError):
        packed = planned(True)
        if packed.max_batch == plain.max_batch:
            return packed
    return plain


def _runner(decoder: ClvpForCausalLM, options: dict[str, Any], memory: MemoryPlan) -> Runner:
    sizes: dict[str, Any] = dict(max_batch=memory.max_batch, packed=memory.packed_weights)
    return Runner(decoder, memory.num_pages, **sizes, **options)
