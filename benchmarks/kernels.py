"""Shared parts of the benchmarks of operators: cold inputs, graphs that hide launches, and the check before timing.

A `Case` is one shape of one operator with several ways to compute it. Each way gets its own error against the float64
reference; a way whose error is beyond twice that of plain torch, plus rounding, is not timed.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch

import clvp_fast
from benchmarks.harness import Provider, Task, task

# Inputs are rotated over this many times the size of the last-level cache.
_CACHES = 3
_MOST_SETS = 64


@dataclass(frozen=True)
class Planned:
    """A way that makes something of its own for each set of inputs, which is not timed.

    plan: `arguments -> call`, and `call()` gives the result.
    """

    plan: Callable[..., Callable[[], torch.Tensor]]


@dataclass(eq=False)
class Case:
    """One shape of one operator.

    shape: for the row. inputs: `seed -> arguments`. reference: `arguments -> float64 result`. providers: by name,
        `arguments -> result` or a `Planned`; the first one is plain torch, the baseline of speed and error. bytes: that
        must move. flop: that must be done. absent: by name, why a way is not here. error: `result, expected -> number`,
        at most `tolerance`, where the norm of the difference does not fit. extra: further numbers for the row. repeats:
        how often each is timed. threads: of torch, while it is measured; None: as they are.
    """

    shape: dict
    dtype: torch.dtype
    inputs: Callable[[int], tuple]
    reference: Callable[..., torch.Tensor]
    providers: dict[str, Callable[..., torch.Tensor] | Planned]
    bytes: int
    flop: int = 0
    absent: dict[str, str] = field(default_factory=dict)
    error: Callable[[torch.Tensor, torch.Tensor], float] | None = None
    tolerance: float = 0.0
    extra: dict = field(default_factory=dict)
    repeats: int = 30
    threads: int | None = None


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ours(call: Callable[..., torch.Tensor], operator: str, device: str) -> tuple[dict, dict]:
    """Return `call` by our torch path, our kernel where it serves, and on a CPU the reference; and why one is missing.

    On a GPU the reference would be a loop that a graph cannot capture, and take longer than all others together.
    """

    def by(name: str) -> Callable[..., torch.Tensor]:
        def run(*arguments):
            with clvp_fast.backend(name):
                return call(*arguments)

        return run

    found, absent = {"clvp_fast torch": by("torch")}, {}
    refused = clvp_fast.explain(operator, device)[0].refused.get("kernel")
    if refused:
        absent["clvp_fast kernel"] = refused
    else:
        found["clvp_fast kernel"] = by("kernel")
    if device == "cpu":
        found["clvp_fast reference"] = by("reference")
    else:
        absent["clvp_fast reference"] = "timed on a CPU alone"
    return found, absent


def copies(arguments: tuple, device: str) -> int:
    if device == "cpu":
        return 1
    size = sum(x.nbytes for x in arguments if isinstance(x, torch.Tensor))
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(max(-(-_CACHES * cache // size), 1), _MOST_SETS)


def captured(run: Callable[[], object]) -> Callable[[], object] | None:
    """Return the replay of a CUDA graph of `run`, or None where it reads results on the host.

    Raises `torch.OutOfMemoryError` if memory is short, because a time without a graph must not be taken for one with
    it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    graph = torch.cuda.CUDAGraph()
    try:
        # Checked before a capture, because after a failed capture torch 2.11 frees no memory any more.
        with torch.cuda.stream(stream), _raising_where_it_waits():
            run()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


@contextmanager
def _raising_where_it_waits() -> Iterator[None]:
    """Within it, an operation that waits for the device raises `RuntimeError`."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


def bound(run: Callable[..., torch.Tensor] | Planned, arguments: tuple) -> Callable[[], torch.Tensor]:
    """Bind `run` to these arguments, and plan it where it is a `Planned`."""
    return run.plan(*arguments) if isinstance(run, Planned) else partial(run, *arguments)


class _Shared:
    """The shared inputs of a case's providers: sets of inputs, and what is right of the first.

    sets: of arguments, as many as the device's cache needs. tolerance: the most that an error may be.
    """

    def __init__(self, case: Case, device: str):
        torch.compiler.reset()  # it compiles a function for eight cases, and then runs it as it stands
        self._case, self._expected = case, case.reference(*case.inputs(0))
        self.sets = [case.inputs(0)]
        self.tolerance = case.tolerance
        if case.error is None:
            baseline = next(iter(case.providers.values()))
            self.tolerance = 2 * self.error(baseline) + torch.finfo(case.dtype).eps
        self.sets += [case.inputs(seed) for seed in range(1, copies(self.sets[0], device))]

    def error(self, run: Callable[..., torch.Tensor] | Planned) -> float:
        """Return a result's distance from the reference; the arguments, which it may write, are made again."""
        return (self._case.error or _relative)(bound(run, self._case.inputs(0))(), self._expected)


@lru_cache(maxsize=1)
def _shared(case: Case, device: str) -> _Shared:
    return _Shared(case, device)


def _made(case: Case, device: str, name: str) -> Provider:
    shared, run = _shared(case, device), case.providers[name]
    error = shared.error(run)
    calls = [bound(run, arguments) for arguments in shared.sets]

    def over_all_sets():
        for call in calls:
            call()

    replay = captured(over_all_sets) if device == "cuda" else None
    counted = {"captured": replay is not None}
    return Provider(name, replay or over_all_sets, error, shared.tolerance, calls=len(calls), counted=counted)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)


def tasks(workload: str, cases: Iterable[Case], device: str, smoke: bool = False) -> Iterator[Task]:
    """Return a task for each case; for a smoke test it is timed once."""
    for case in cases:
        yield task_of(workload, case, device, 1 if smoke else case.repeats)


def task_of(workload: str, case: Case, device: str, repeats: int) -> Task:
    """Make a case a task: every provider that passed the gate, in turns, on inputs outside the cache."""
    counted = {"bytes": case.bytes} | ({"flop": case.flop} if case.flop else {}) | case.extra
    return task(
        workload,
        case.shape,
        {name: partial(_made, case, device, name) for name in case.providers},
        repeats,
        case.absent,
        partial(_threads, case.threads),
        **counted,
        dtype=name_of(case.dtype),
    )
