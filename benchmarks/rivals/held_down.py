"""A rival's process where our kernels are held down to a lesser instruction set, and what its threads really use."""

import os
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from benchmarks.machine import cpu_facts
from benchmarks.providers import Absent

# The C library has copies of memory in AVX-512, which would hide what a rival uses.
_C_LIBRARY = {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW"}


def held_down(rival: ModuleType) -> dict[str, str]:
    """Return the variables that hold a rival down to the instruction set of our kernels; none where these are free.

    Raises:
        Absent: the rival cannot be held down to this set.
    """
    facts = cpu_facts()
    if not facts["isa_forced"]:
        return {}
    found = rival.held_down(facts["isa"])
    if found is None:
        raise Absent(f"its kernels cannot be held down to {facts['isa']}, the instruction set of ours")
    return _C_LIBRARY | found


def has_vnni() -> bool:
    """Tell whether our kernels, and so the rivals', have products of 8 bits that no sum overflows."""
    return cpu_facts()["isa"] not in ("avx2", "avx512")


def before(first: Path, variable: str) -> str:
    """Return a variable of paths with another one at its beginning."""
    return os.pathsep.join([str(first), *filter(None, [os.environ.get(variable)])])


def require_no_avx512(pid: int, seconds: float) -> None:
    """Raise `RuntimeError` if a thread of a process had registers of AVX-512 in use within the last seconds.

    Linux notes this at each change of threads; nothing is known where it does not tell (before 5.3).
    """
    for status in Path(f"/proc/{pid}/task").glob("*/arch_status"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            milliseconds = int(status.read_text().partition("AVX512_elapsed_ms:")[2].split()[0])  # -1: never
            if 0 <= milliseconds < 1000 * seconds:
                raise RuntimeError("the process is held down to a lesser instruction set, and it used AVX-512")
