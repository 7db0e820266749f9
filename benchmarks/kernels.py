"""What the benchmarks of single operators share: inputs that are cold, graphs that hide launches, the gate before.

A `Case` is one shape of one operator with several ways to compute it. Each way gets its own error against the float64
reference; a way whose error is beyond twice that of plain torch, plus rounding, is not timed.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

import clvp_fast
from benchmarks.harness import Provider, Task, measure

# Inputs are rotated over this many times the size of the last-level cache.
_CACHES = 3
_MOST_SETS = 64


@dataclass
class Case:
    """One shape of one operator.

    shape: for the row. inputs: `seed -> arguments`. reference: `arguments -> float64 result`. providers: by name,
        `arguments -> result`; the first one is plain torch, the baseline of speed and error. bytes: that must move.
        flop: that must be done. absent: by name, why a rival is not here. error: `result, expected -> number`, at most
        `tolerance`, where the norm of the difference does not fit. repeats: how often each is timed. threads: of
        torch, while it is measured; None: as they are.
    """

    shape: dict
    dtype: torch.dtype
    inputs: Callable[[int], tuple]
    reference: Callable[..., torch.Tensor]
    providers: dict[str, Callable[..., torch.Tensor]]
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
    """`call` by our torch path, and by our kernel where it serves; and why it does not, where it does not."""

    def by(name: str) -> Callable[..., torch.Tensor]:
        def run(*arguments):
            with clvp_fast.backend(name):
                return call(*arguments)

        return run

    refused = clvp_fast.explain(operator, device)[0].refused.get("kernel") if device == "cuda" else "no GPU"
    if refused:
        return {"clvp_fast torch": by("torch")}, {"clvp_fast kernel": refused}
    return {"clvp_fast torch": by("torch"), "clvp_fast kernel": by("kernel")}, {}


def _copies(arguments: tuple, device: str) -> int:
    if device == "cpu":
        return 1
    size = sum(x.nbytes for x in arguments if isinstance(x, torch.Tensor))
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(max(-(-_CACHES * cache // size), 1), _MOST_SETS)


def captured(run: Callable[[], object]) -> Callable[[], object] | None:
    """The replay of a CUDA graph of `run`, or None where it cannot be captured (it reads results on the host)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def _relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


def _fresh(arguments: tuple) -> tuple:
    """Copies: some operators write their arguments."""
    return tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in arguments)


def tasks(workload: str, cases: Iterable[Case], device: str, smoke: bool = False) -> Iterator[Task]:
    """A task a case; for a smoke test of the last one alone, timed once."""
    for case in list(cases)[-1:] if smoke else cases:
        repeats = 1 if smoke else case.repeats
        yield Task(case.shape, partial(measure_case, workload, case, device, repeats))


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_case(workload: str, case: Case, device: str, repeats: int = 30) -> list[dict]:
    """Rows of one case: every provider that passed the gate, in turns, on inputs that are not in the cache."""
    with _threads(case.threads), torch.no_grad():
        return _measure_case(workload, case, device, repeats)


def _measure_case(workload: str, case: Case, device: str, repeats: int) -> list[dict]:
    sets = [case.inputs(0)]
    expected = case.reference(*_fresh(sets[0]))
    error = case.error or _relative
    errors = {name: error(run(*_fresh(sets[0])), expected) for name, run in case.providers.items()}
    rounding = torch.finfo(case.dtype).eps
    tolerance = case.tolerance if case.error else 2 * next(iter(errors.values())) + rounding
    del expected
    sets += [case.inputs(seed) for seed in range(1, _copies(sets[0], device))]
    providers, replayed = [], {}
    for name, run in case.providers.items():

        def over_all_sets(run=run):
            for arguments in sets:
                run(*arguments)

        replay = captured(over_all_sets) if device == "cuda" else None
        replayed[name] = replay is not None
        providers.append(Provider(name, replay or over_all_sets, errors[name], tolerance, calls=len(sets)))
    counted = {"bytes": case.bytes} | ({"flop": case.flop} if case.flop else {}) | case.extra
    rows = measure(
        workload,
        case.shape,
        providers,
        repeats,
        **counted,
        dtype=name_of(case.dtype),
        absent=case.absent,
    )
    return [row | {"captured": replayed[row["provider"]]} for row in rows]
