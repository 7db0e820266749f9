"""The encoders' gated feed-forward block, at the number of rows of scoring."""

from collections.abc import Iterator

from benchmarks import mlp
from benchmarks.harness import Task
from benchmarks.kernels import tasks as tasks_of
from clvp_fast.ops import geglu_mlp

ROWS = {"cpu": (3200,), "cuda": (128_000, 16_000, 3200, 400), "smoke": (3,)}


def call(x, w_in, b_in, w_out, b_out, residual):
    return geglu_mlp(x, w_in, b_in, w_out, b_out, residual=residual)


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    cases = mlp.cases(call, mlp.geglu, "geglu_mlp", device, ROWS["smoke" if smoke else device], (768, 3072, 1536))
    return tasks_of("geglu_mlp", cases, device, smoke)
