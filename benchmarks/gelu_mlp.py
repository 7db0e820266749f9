"""The decoder's feed-forward block, from the few rows of a decoding step to those of a prefill."""

from collections.abc import Iterator

from benchmarks import mlp
from benchmarks.harness import Task
from benchmarks.kernels import tasks as tasks_of
from clvp_fast.ops import gelu_mlp

ROWS = {"cpu": (1, 16, 64), "cuda": (1, 16, 64, 256, 512, 16_000), "smoke": (3,)}


def call(x, w_in, b_in, w_out, b_out, residual):
    return gelu_mlp(x, w_in, b_in, w_out, b_out, residual=residual)


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    cases = mlp.cases(call, mlp.gelu, "gelu_mlp", device, ROWS["smoke" if smoke else device], (1024, 4096, 4096))
    return tasks_of("gelu_mlp", cases, device, smoke)
