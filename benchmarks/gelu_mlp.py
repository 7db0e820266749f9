"""The decoder's feed-forward block, from the few rows of a decoding step to those of a prefill."""

from benchmarks import mlp
from benchmarks.kernels import measure_case
from clvp_fast.ops import gelu_mlp

ROWS = {"cpu": (1, 16, 64), "cuda": (1, 16, 64, 256, 512, 16_000)}


def call(x, w_in, b_in, w_out, b_out, residual):
    return gelu_mlp(x, w_in, b_in, w_out, b_out, residual=residual)


def rows(device: str) -> list[dict]:
    cases = mlp.cases(call, mlp.gelu, "gelu_mlp", device, ROWS, (1024, 4096, 4096))
    return [row for case in cases for row in measure_case("gelu_mlp", case, device)]
