"""The calls of single kernels that rows of an H200 have, for a prediction beside each."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.cost import recording
from benchmarks.cost.recording import Launch
from benchmarks.cost.work import Stored
from clvp_fast.ops.binding import BoundCall, Scratch
from clvp_fast.ops.dispatch import OPERATORS
from clvp_fast.ops.norm import bind_add_norm
from clvp_fast.ops.paged_attention import bind_paged_attention_decode
from clvp_fast.ops.sampling import bind_sample

BF16 = torch.bfloat16
# Rows of the attention benchmark have 100 to 600 own tokens, 350 in the mean.
_OWN, _MOST, _PAGE = 350, 600, 16


@dataclass(frozen=True)
class Call:
    """A benchmark's call.

    workload, shape: of its rows. launches: what it launches. stored: the values in its tensors.
    """

    workload: str
    shape: dict
    launches: tuple[Launch, ...]
    stored: Stored


def _empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _scratch(rows: int) -> Scratch:
    return Scratch(rows, torch.device("meta"))


def _norm(rows: int) -> BoundCall:
    x, residual, total, out = (_empty(rows, 1024) for _ in range(4))
    affine = dict(weight=_empty(1024), bias=_empty(1024), eps=1e-5, kind="layer")
    return bind_add_norm((total, out), _scratch(rows), x, residual, **affine)


def _mlp(name: str, rows: int, width: int, inner: int, values: int, activation: str) -> BoundCall:
    weights = _empty(values * inner, width), _empty(values * inner), _empty(width, inner), _empty(width)
    args = (_empty(rows, width), *weights, _empty(rows, width), activation)
    return OPERATORS[name].bind(args, _empty(rows, width), _scratch(rows))


def _sample(rows: int) -> BoundCall:
    def whole(dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return _empty(rows, dtype=dtype)

    state = _empty(rows, 257, dtype=torch.int32), whole(torch.int32), whole(torch.bool)
    numbers = dict(seed=whole(), candidate=whole(), step=whole(), stop_token=8193, pad_token=8193)
    settings = dict(temperature=whole(torch.float64), top_p=whole(torch.float64))
    logits = _empty(rows, 8194, dtype=torch.float32)
    return bind_sample(whole(), _scratch(rows), logits, *state, **settings, **numbers)


def _attention(candidates: int, prompt: int) -> BoundCall:
    def whole(*shape: int) -> torch.Tensor:
        return _empty(*shape, dtype=torch.int32)

    own, shared = -(-_MOST // _PAGE), -(-prompt // _PAGE)
    new = [_empty(candidates, 16, 64) for _ in range(3)]
    pages = [_empty(candidates * own + shared, _PAGE, 16, 64) for _ in range(2)]
    prefix = dict(prefix_table=whole(1, shared), prefix_lens=whole(1), prefix_index=whole(candidates))
    tables = dict(block_table=whole(candidates, own), seq_lens=whole(candidates), arrivals=whole(candidates, 16))
    return bind_paged_attention_decode(
        _empty(candidates, 16, 64), _scratch(candidates), *new, *pages, **tables, **prefix, scale=0.125
    )


def _all() -> Iterator[tuple[str, dict, BoundCall, Stored]]:
    nothing = Stored(0, 0)
    for rows in (16, 256):
        yield "add_norm", {"kind": "layer", "rows": rows, "width": 1024}, _norm(rows), nothing
    for rows in (1, 16, 64, 256):
        shape = {"rows": rows, "width": 1024, "inner": 4096}
        yield "gelu_mlp", shape, _mlp("gelu_mlp", rows, 1024, 4096, 1, "gelu_new"), nothing
    for rows in (400, 3200, 16_000, 128_000):
        shape = {"rows": rows, "width": 768, "inner": 1536}
        yield "geglu_mlp", shape, _mlp("geglu_mlp", rows, 768, 1536, 2, "gelu"), nothing
    for candidates, prompt in ((16, 200), (256, 60)):
        shape = {"candidates": candidates, "requests": 1, "prompt": prompt}
        yield "paged_attention", shape, _attention(candidates, prompt), Stored(_OWN, prompt)
    for candidates in (16, 256):
        yield "sample", {"candidates": candidates, "vocabulary": 8194}, _sample(candidates), nothing


def calls() -> Iterator[Call]:
    """Yield every call, recorded."""
    with recording.on_paper(), torch.inference_mode():
        for workload, shape, run, stored in _all():
            with recording.recorded() as launches:
                run()
            yield Call(workload, shape, tuple(launches), stored)
