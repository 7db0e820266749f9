"""torch's `scaled_dot_product_attention` by one backend at a time; one that cannot serve raises, and is absent."""

from collections.abc import Callable

from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels import Planned, bound
from benchmarks.providers import Absent

BACKENDS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
_OF_A_CPU = (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)


def one_by_one(run: Callable | Planned, how: str) -> dict[str, Planned]:
    """Return `run`, which attends by SDPA, under each backend alone, by names such as "SDPA math, {how}"."""
    return {f"SDPA {name}, {how}": Planned(_under(backend, run)) for name, backend in BACKENDS.items()}


def _under(backend: SDPBackend, run: Callable | Planned) -> Callable:
    def plan(*arguments):
        if arguments[0].device.type == "cpu" and backend not in _OF_A_CPU:
            raise Absent("for a GPU")
        call = bound(run, arguments)

        def under():
            with sdpa_kernel(backend):
                return call()

        return under

    return plan
