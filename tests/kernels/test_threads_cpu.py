"""The library's work is given to all of OpenMP's threads: a smaller team would end those that it has no use for."""

import subprocess
import sys

from tests.kit.isa import needs_library

pytestmark = needs_library

COUNT = """
import os
import torch
from clvp_fast.ops.linear import _native

torch.set_num_threads(8)
x, small, large = torch.randn(4, 64), torch.randn(96, 64), torch.randn(4096, 64)

def threads():
    return set(os.listdir("/proc/self/task"))

for weight in (large, small):
    _native(x, weight, None, None, None)
known, new = threads(), 0
assert len(known) >= 8, known
for _ in range(20):
    for weight in (large, small):
        _native(x, weight, None, None, None)
        now = threads()
        new, known = new + len(now - known), now
print(new)
"""


def test_no_thread_is_ended_and_made_anew():
    """Alternate calls of two items and of many."""
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True)
    assert done.stdout == "0\n", done.stdout + done.stderr
