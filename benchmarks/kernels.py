"""What the benchmarks of single operators share: inputs that are cold, graphs that hide launches, the gate before.

A `Case` is one shape of one operator with several ways to compute it. Each way gets its own error against the float64
reference; a way whose error is beyond twice that of plain torch, plus rounding, is not timed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.harness import Provider, measure

# Inputs are rotated over this many times the size of the last-level cache.
_CACHES = 3
_MOST_SETS = 64


@dataclass
class Case:
    """One shape of one operator.

    shape: for the row. inputs: `seed -> arguments`. reference: `arguments -> float64 result`. providers: by name,
        `arguments -> result`; the first one is plain torch, the baseline of speed and error. bytes: that must move.
        flop: that must be done. absent: by name, why a rival is not here.
    """

    shape: dict
    dtype: torch.dtype
    inputs: Callable[[int], tuple]
    reference: Callable[..., torch.Tensor]
    providers: dict[str, Callable[..., torch.Tensor]]
    bytes: int
    flop: int = 0
    absent: dict[str, str] = field(default_factory=dict)


def _copies(arguments: tuple, device: str) -> int:
    if device == "cpu":
        return 1
    size = sum(x.nbytes for x in arguments if isinstance(x, torch.Tensor))
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(max(-(-_CACHES * cache // size), 1), _MOST_SETS)


def _captured(run: Callable[[], object]) -> Callable[[], object] | None:
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


def _error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


@torch.no_grad()
def measure_case(workload: str, case: Case, device: str, repeats: int = 30) -> list[dict]:
    """Rows of one case: every provider that passed the gate, in turns, on inputs that are not in the cache."""
    sets = [case.inputs(0)]
    expected = case.reference(*sets[0])
    errors = {name: _error(run(*sets[0]), expected) for name, run in case.providers.items()}
    rounding = torch.finfo(case.dtype).eps
    tolerance = 2 * next(iter(errors.values())) + rounding
    del expected
    sets += [case.inputs(seed) for seed in range(1, _copies(sets[0], device))]
    providers, captured = [], {}
    for name, run in case.providers.items():

        def over_all_sets(run=run):
            for arguments in sets:
                run(*arguments)

        replay = _captured(over_all_sets) if device == "cuda" else None
        captured[name] = replay is not None
        providers.append(Provider(name, replay or over_all_sets, errors[name], tolerance, calls=len(sets)))
    counted = {"bytes": case.bytes} | ({"flop": case.flop} if case.flop else {})
    rows = measure(
        workload,
        case.shape,
        providers,
        repeats,
        **counted,
        dtype=str(case.dtype).removeprefix("torch."),
        absent=case.absent,
    )
    return [row | {"captured": captured[row["provider"]]} for row in rows]
