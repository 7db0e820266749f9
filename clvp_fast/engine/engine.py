"""`CandidateEngine`: texts and voices in, ranked speech candidates out, hundreds of them decoded as one batch."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from clvp_fast.checkpoint import load_checkpoint, speech_limit, stop_token
from clvp_fast.engine.decode_loop import DecodeLoop, Job
from clvp_fast.engine.door import clips_of, ids_of_text
from clvp_fast.engine.memory import CPU_BATCH, MemoryPlan, free_bytes, plan, trim_heap
from clvp_fast.engine.ranking import Ranker, diffusion_latents
from clvp_fast.engine.requests import CandidateRequest, CandidateResult
from clvp_fast.engine.runner import Runner
from clvp_fast.engine.sampling_params import SamplingParams
from clvp_fast.engine.scoring import Scorer, check_ranking, check_scorer
from clvp_fast.engine.voices import Voice, VoiceCache
from clvp_fast.models.clvp.parameters import arrange_parameters
from clvp_fast.models.clvp.processing import ClvpProcessor
from clvp_fast.models.plain import PlainModel

# How many steps that a request had a part in may break off before it fails: who is to blame cannot be told.
_BROKEN_STEPS = 2


@dataclass(eq=False)
class _Pending:
    """A request from its submission until its caller takes the result.

    What is pending, with the codes that its job has drawn, is all that must outlive a step that breaks off. One
    assignment makes a request finished: that of `result`.
    """

    request: CandidateRequest
    text_ids: torch.Tensor
    job: Job
    results: deque
    keep: int
    submitted: float
    prepared: float
    result: CandidateResult | None = None
    broken_steps: int = 0

    @property
    def deadline(self) -> float:
        return float("inf") if self.request.timeout is None else self.submitted + self.request.timeout


class CandidateEngine:
    """Generates and ranks candidates for many requests in one batch that never waits for the slowest of them.

    The candidates of a request share its prompt; a candidate that stops gives its place to the next. A candidate's
    codes depend on checkpoint, request, seed and its index alone, not on what else is decoded beside it.

    Args:
        model: a [`ClvpModelForConditionalGeneration`], which is put into eval mode; its parameters are shared.
        processor: its [`ClvpProcessor`].
        max_batch: candidates decoded at once; by default as many as memory allows, up to 512 (on a CPU 16).
        max_new_tokens: the most that a request may ask for; by default 500, or what the checkpoint's positions allow.
        num_pages: pages of keys and values; by default as many as `max_batch` candidates need, where memory allows.
        memory_fraction: of the memory that is free now, how much keys and values and the rest may take.
        page_size: tokens a page of keys and values, 16 or 32.
        page_dtype: `torch.float8_e4m3fn` to keep keys and values in 8 bits; by default the model's dtype.
        weight_dtype: `torch.int8` to decode with copies of the layers' weights in 8 bits, which are made here; by
            default with the model's own. docs/architecture.md tells what either changes.
        scoring: "padded", as the original scores, or "trimmed" ([`Ranker`] explains them).
        scorer: a [`Scorer`] that ranks candidates in place of `model`'s own encoders.
        latents: keep the decoder's states of the candidates, for the `latents` of results.
        deterministic: decode at one fixed number of rows, so that in half types too the bits of a candidate cannot
            depend on the batch.
        persistent: steps of up to four candidates run as one launch, for who waits for few of them, on a CUDA device in
            half types (`Runner` tells what it changes).

    Raises:
        ValueError: a model with hooks, adapters or replaced modules, which the engine would not call; a size that
            cannot be, too little memory for a single candidate, `scoring` beside a `scorer`, or a device or model that
            `persistent` does not serve.
        TypeError: a `scorer` that is none.
    """

    def __init__(
        self,
        model,
        processor,
        *,
        max_batch: int | None = None,
        max_new_tokens: int | None = None,
        num_pages: int | None = None,
        memory_fraction: float = 0.9,
        page_size: int = 16,
        page_dtype: torch.dtype | None = None,
        weight_dtype: torch.dtype | None = None,
        scoring: str = "padded",
        scorer: Scorer | None = None,
        latents: bool = False,
        deterministic: bool = False,
        persistent: bool = False,
    ):
        if scorer is not None:
            check_scorer(scorer)
            if scoring != "padded":
                raise ValueError(
                    f"scoring={scoring!r} is how the model's own encoders score: leave it out with a scorer"
                )
        self._plain = PlainModel(model)
        self.model = model.eval()
        arrange_parameters(model)  # before the plan, which reads what is free
        self.processor = processor
        self._options = dict(page_size=page_size, page_dtype=page_dtype, weight_dtype=weight_dtype, latents=latents)
        self._kind_of_steps = dict(deterministic=deterministic, persistent=persistent)
        self._memory_fraction, self._num_pages = memory_fraction, num_pages
        self.max_new_tokens = min(500, speech_limit(model)) if max_new_tokens is None else max_new_tokens
        if max_batch is None and model.device.type == "cpu":
            max_batch = CPU_BATCH
        self.memory: MemoryPlan = self._plan(max_batch)
        self.voices = VoiceCache(model, processor.feature_extractor)
        self.scorer: Scorer = Ranker(model, mode=scoring) if scorer is None else scorer
        self._loop = DecodeLoop(self._runner(), latents)
        trim_heap()  # behind copies of weights
        self._pending: dict[int, _Pending] = {}
        self._lock = threading.RLock()
        self._steps = 0
        self._torn = False  # from the beginning of a change of the loop to its end
        self._warm = False

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = torch.float32,
        text_cleaning: str = "tortoise",
        **options,
    ) -> "CandidateEngine":
        """The engine of a checkpoint: "demo", a folder, or a hub id.

        Args:
            device: by default the GPU where there is one.
            dtype: of the weights, as "bfloat16" or `torch.bfloat16`.
            text_cleaning: as [`ClvpTokenizer`] takes it.
            options: of the constructor.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        checkpoint = load_checkpoint(name, device=device, dtype=dtype, text_cleaning=text_cleaning)
        return cls(checkpoint.model, ClvpProcessor(checkpoint.feature_extractor, checkpoint.tokenizer), **options)

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> float:
        """Capture the decode step for every batch size, and return the seconds that it took; nothing to do on a CPU.

        Args:
            progress: told (captured, sizes) after each.
        """
        started = time.perf_counter()
        with self._lock:
            with self._changing():
                pass  # mended, if need be
            self._loop.runner.warm_up(progress)
            self._warm = True
        return time.perf_counter() - started

    def generate(
        self,
        requests: Iterable[CandidateRequest] | CandidateRequest,
        sampling: SamplingParams | None = None,
        *,
        keep: int = 1,
        on_token: Callable[[CandidateRequest, int, int], None] | None = None,
    ) -> Iterator[CandidateResult]:
        """Results of `requests`, each as soon as it is finished.

        Requests are taken from the iterable as there is room for them. A request that fails (a bad clip, a text that is
        too long, its timeout) gives a result with its `error`, and the others go on. Iteration that is stopped midway
        frees everything. Several iterations may take turns: their candidates decode in one batch.

        Args:
            sampling: of the requests that have none of their own; `SamplingParams()` by default.
            keep: how many of the best candidates a result's `best()` and `latents` hold.
            on_token: called with request, candidate and token as they are drawn; if it raises, its request fails.
        """
        return self._iterate(requests, sampling, keep=keep, on_token=on_token)

    def _iterate(self, requests, sampling=None, *, keep=1, on_token=None, given_up=None) -> Iterator[CandidateResult]:
        """`generate`, which ends at the next step once `given_up` (a `threading.Event`) is set."""
        if isinstance(requests, CandidateRequest):
            requests = [requests]
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        given_up = given_up or threading.Event()
        return self._generate(iter(requests), sampling or SamplingParams(), keep, on_token, given_up)

    def _generate(self, requests, sampling, keep, on_token, given_up: threading.Event) -> Iterator[CandidateResult]:
        results: deque[CandidateResult] = deque()
        more, end, place = True, object(), 0
        try:
            while not given_up.is_set():
                while more and self._has_room():
                    request = next(requests, end)
                    more = request is not end
                    if more:
                        self._submit(request, sampling, keep, on_token, results, place)
                        place += 1
                seen = self._steps
                self._take(results)
                done = not more and not self._keys(lambda pending: pending.results is results)
                while results:
                    yield results.popleft()
                if done:
                    return
                self._advance(seen)
        finally:
            for key in self._keys(lambda pending: pending.results is results):
                self._cancel(key)

    def _keys(self, chosen: Callable[[_Pending], bool]) -> list[int]:
        """The keys of those pending requests that are `chosen`."""
        with self._lock:
            return [key for key, pending in self._pending.items() if chosen(pending)]

    def _take(self, results: deque) -> None:
        """Move what is finished of a caller's requests to its `results`."""
        with self._lock:
            for key in self._keys(lambda pending: pending.results is results and pending.result is not None):
                results.append(self._pending.pop(key).result)

    def stream(
        self, request: CandidateRequest, sampling: SamplingParams | None = None, *, keep: int = 1
    ) -> Iterator[tuple[int, int] | CandidateResult]:
        """(candidate, token) as they are drawn, and last of all the request's result; a cancelled one has none."""
        drawn: deque[tuple[int, int]] = deque()
        results: deque[CandidateResult] = deque()

        def on_token(request, candidate, token):
            drawn.append((candidate, token))

        self._submit(request, sampling or SamplingParams(), keep, on_token, results)
        try:
            while not results and self._keys(lambda pending: pending.results is results):
                self._advance()
                self._take(results)
                while drawn:
                    yield drawn.popleft()
            yield from results
        finally:
            self.cancel(request)

    async def generate_async(
        self, requests: Iterable[CandidateRequest] | CandidateRequest, sampling: SamplingParams | None = None, **options
    ) -> AsyncIterator[CandidateResult]:
        """`generate` for asyncio: a thread of each call's own does the work, and all calls share one batch."""
        given_up = threading.Event()
        iterator = self._iterate(requests, sampling, given_up=given_up, **options)
        loop, context = asyncio.get_running_loop(), copy_context()
        thread = ThreadPoolExecutor(1, "clvp_fast generate_async")
        try:
            while True:
                step = loop.run_in_executor(thread, context.run, next, iterator, None)
                step.add_done_callback(lambda step: step.cancelled() or step.exception())  # which no one may ask for
                if (result := await asyncio.shield(step)) is None:
                    return
                yield result
        finally:
            # Behind the step that may be under way, which ends first, and even if this task is cancelled once more.
            given_up.set()
            closed = loop.run_in_executor(thread, iterator.close)
            thread.shutdown(wait=False)
            await asyncio.shield(closed)

    def cancel(self, request: CandidateRequest) -> None:
        """Drop a request that was submitted; its candidates' places and pages are free at once. It gives no result."""
        for key in self._keys(lambda pending: pending.request is request):
            self._cancel(key)

    def _cancel(self, key: int) -> None:
        with self._lock, self._changing():
            self._pending.pop(key, None)
            self._loop.cancel(key)

    def _has_room(self) -> bool:
        """Whether fewer candidates wait than decode at once."""
        pending = [pending for pending in list(self._pending.values()) if pending.result is None]
        waiting = sum(len(one.job.codes) for one in pending if one.job.started_at is None)
        return waiting < self.memory.max_batch

    def _submit(self, request, sampling, keep, on_token, results: deque, place: int = 0) -> None:
        submitted = time.perf_counter()
        try:
            if not isinstance(request, CandidateRequest):
                found = type(request).__name__
                raise TypeError(f"a request must be a CandidateRequest, and number {place} (from 0) is {found}")
            self._plain.check()
            with self._lock, torch.inference_mode():
                text_ids = self._text_ids(request)
                prompt = self._prompt(request, text_ids)
                job = Job(prompt, self._settings(request.sampling or sampling))
                prepared = time.perf_counter()
                refused = None
                with self._changing():
                    try:
                        key = self._loop.add(job)
                    except ValueError as error:  # which changes nothing
                        refused = error
                    else:
                        if on_token is not None:
                            job.on_token = partial(self._tell, key, on_token)
                        self._pending[key] = _Pending(request, text_ids, job, results, keep, submitted, prepared)
                if refused is not None:
                    raise refused
        except Exception as error:  # nothing but this request has a part in it
            results.append(CandidateResult(request, error=error, timings={"queue": time.perf_counter() - submitted}))

    def _tell(self, key: int, on_token, candidate: int, token: int) -> None:
        """Tell a listener, unless its request has ended meanwhile; if it raises, that request fails and no other."""
        pending = self._pending.get(key)
        if pending is None or pending.result is not None:
            return
        try:
            on_token(pending.request, candidate, token)
        except Exception as error:
            if key in self._pending:
                self._fail(key, error)

    def _settings(self, sampling: SamplingParams) -> SamplingParams:
        """Sampling with a seed and a stop token."""
        seed = int(torch.randint(2**63 - 1, ())) if sampling.seed is None else sampling.seed
        stop = stop_token(self.model) if sampling.stop_token is None else sampling.stop_token
        vocab_size = self.model.config.decoder_config.vocab_size
        if stop >= vocab_size:
            raise ValueError(f"stop_token={stop} is no token of the checkpoint, which has {vocab_size}")
        return replace(sampling, seed=seed, stop_token=stop)

    def _text_ids(self, request: CandidateRequest) -> torch.Tensor:
        return ids_of_text(request, self.model, self.processor)

    def voice(self, request: CandidateRequest) -> Voice:
        """The voice of a request, from the cache where it is known; `save` it, and give it as `conditioning`."""
        if (conditioning := request.conditioning) is not None:
            if isinstance(conditioning, (str, Path)):
                return Voice.load(conditioning)
            return conditioning if isinstance(conditioning, Voice) else self.voices.from_vector(conditioning)
        if request.input_features is not None:
            return self.voices.from_features(request.input_features)
        return self.voices.from_clips(*clips_of(request, self.processor.feature_extractor.sampling_rate))

    def _prompt(self, request: CandidateRequest, text_ids: torch.Tensor) -> torch.Tensor:
        """`[1 + text, hidden_size]`: what the candidates continue, without the start token."""
        encoder = self.model.conditioning_encoder
        text, _ = encoder.prompt_text(text_ids[None].to(self.model.device))
        return encoder.join(self.voices.conditioning(self.voice(request)), text)[0]

    @contextmanager
    def _changing(self):
        """Around every change of the loop, which is whole at its beginning and, unless it raises, at its end.

        What breaks off within (Ctrl-C, no memory, a bug) leaves the loop torn, and whoever changes it next mends it
        first. So nothing has to be put right while an exception is under way, when the next one may come.
        """
        if self._torn:
            self._mend()
        self._torn = True
        yield
        self._torn = False

    def _mend(self) -> None:
        """Empty all slots and pages, and begin what is pending anew, to the same codes."""
        runner = self._loop.runner
        if runner is None:
            runner = self._runner()
            if self._warm:
                runner.warm_up()
        else:
            runner.reset()
        jobs = {key: pending.job for key, pending in self._pending.items() if pending.result is None}
        for key, error in self._loop.restart(runner, jobs):
            self._pending[key].result = self._failure(self._pending[key], error)
        self._torn = False

    def _advance(self, seen: int | None = None) -> None:
        """One step of everything; finished, timed out and failed requests have their results then.

        Args:
            seen: how many steps the caller knew of: there is none to do for it where another thread has done one since.
        """
        with self._lock, torch.inference_mode():
            if seen is not None and seen != self._steps:
                return
            self._steps += 1
            try:
                with self._changing():
                    self._loop.advance()
            except torch.OutOfMemoryError:
                self._shrink()
            except Exception as error:
                self._blame(error)
            self._loop.tell()
            while self._loop.finished:
                key, job = self._loop.finished[0]
                pending = self._pending.get(key)
                if pending is not None and pending.result is None:
                    pending.result = self._result(pending, job)
                self._loop.finished.popleft()
            now = time.perf_counter()
            for key, pending in list(self._pending.items()):
                if pending.result is None and now > pending.deadline:
                    error = TimeoutError(
                        f"the request was not finished within its timeout of {pending.request.timeout} s"
                    )
                    self._fail(key, error)

    def _blame(self, error: Exception) -> None:
        """Let requests that had a part in a step that broke off be drawn again, or fail with its error."""
        pending = [(key, one) for key, one in self._pending.items() if one.result is None and not one.job.done]
        for key, one in [each for each in pending if each[1].job.started_at is not None] or pending:
            one.broken_steps += 1
            if one.broken_steps >= _BROKEN_STEPS:
                self._fail(key, error)

    def _fail(self, key: int, error: Exception) -> None:
        with self._changing():
            self._pending[key].result = self._failure(self._pending[key], error)
            self._loop.cancel(key)

    @staticmethod
    def _failure(pending: _Pending, error: Exception) -> CandidateResult:
        return CandidateResult(pending.request, error=error, timings={"queue": time.perf_counter() - pending.submitted})

    def _plan(self, max_batch: int | None) -> MemoryPlan:
        planned = plan(
            self.model.speech_decoder_model,
            free_bytes(self.model.device),
            self._memory_fraction,
            max_batch,
            self.max_new_tokens,
            **self._options,
        )
        return planned if self._num_pages is None else replace(planned, num_pages=self._num_pages)

    def _runner(self) -> Runner:
        return Runner(
            self.model.speech_decoder_model,
            self.memory.num_pages,
            max_batch=self.memory.max_batch,
            max_new_tokens=self.max_new_tokens,
            **self._kind_of_steps,
            **self._options,
        )

    def _shrink(self) -> None:
        """Go on with half the batch after memory ran out; what was being decoded starts again, to the same codes."""
        half = self.memory.max_batch // 2
        if not half:
            raise torch.OutOfMemoryError("there is too little memory to decode a single candidate: free some")
        self._loop.runner = None
        self.memory = self._plan(half)
        self._mend()

    def _result(self, pending: _Pending, job: Job) -> CandidateResult:
        """Rank a finished job's candidates; what that raises (a scorer may be the caller's) is the result's error."""
        try:
            return self._ranked(pending, job)
        except Exception as error:
            return CandidateResult(pending.request, error=error)

    def _ranked(self, pending: _Pending, job: Job) -> CandidateResult:
        decoded = time.perf_counter()
        if self.model.device.type == "cpu":
            trim_heap()
        stop = job.sampling.stop_token
        stopped = np.array([len(codes) > 0 and codes[-1] == stop for codes in job.codes])
        spoken = [codes[: len(codes) - ended] for codes, ended in zip(job.codes, stopped, strict=True)]
        lengths = np.array([len(codes) for codes in spoken])
        codes = np.full((len(spoken), max(lengths.max(), 1)), stop, dtype=np.int64)
        for row, of_candidate in zip(codes, spoken, strict=True):
            row[: len(of_candidate)] = of_candidate
        result = CandidateResult(pending.request, codes=codes, lengths=lengths, stopped=stopped)
        ranking = self.scorer.score(pending.request, pending.text_ids, spoken, job.sampling.max_new_tokens)
        check_ranking(ranking, self.scorer, len(spoken))
        result.kept = ranking.top(min(pending.keep, len(spoken))).cpu().numpy()
        result.scores, result.text_embeds, result.speech_embeds = (
            None if tensor is None else tensor.float().cpu().numpy()
            for tensor in (ranking.scores, ranking.text_embeds, ranking.speech_embeds)
        )
        if self._loop.latents:
            kept = result.kept.tolist()
            result.latents = {i: diffusion_latents(job.latents[i], int(lengths[i])) for i in kept}
        ranked = time.perf_counter()
        result.timings = {
            "prepare": pending.prepared - pending.submitted,
            "queue": job.started_at - pending.prepared,
            "decode": decoded - job.started_at,
            "rank": ranked - decoded,
        }
        return result
