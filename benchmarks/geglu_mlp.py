"""The encoders' gated feed-forward block, at the number of rows of scoring."""

from benchmarks import mlp
from benchmarks.kernels import measure_case
from clvp_fast.ops import geglu_mlp

ROWS = {"cpu": (3200,), "cuda": (128_000, 16_000, 3200, 400)}


def call(x, w_in, b_in, w_out, b_out, residual):
    return geglu_mlp(x, w_in, b_in, w_out, b_out, residual=residual)


def rows(device: str) -> list[dict]:
    cases = mlp.cases(call, mlp.geglu, "geglu_mlp", device, ROWS, (768, 3072, 1536))
    return [row for case in cases for row in measure_case("geglu_mlp", case, device)]
