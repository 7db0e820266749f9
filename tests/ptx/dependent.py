"""A launch that begins before the one before it has ended (PTX ISA, "griddepcontrol"; kernels/overlap.py, sm_90).

Where a kernel waits for earlier launches, every thread has to wait before it touches global memory or ends: that
memory may not be written yet, and the next launch would begin too early. A prefetch touches nothing.
"""

import numpy as np


class Dependent:
    def __init__(self, kernel, threads):
        self.t = threads
        self.waits = any(i.op[:2] == ["griddepcontrol", "wait"] for i in kernel.instructions())
        self.waited = np.full(threads.n, not self.waits)

    def wait(self, mask):
        self.waited[slice(None) if mask is None else mask] = True

    def touches(self, mask, line):
        if self.waits and not (self.waited if mask is None else self.waited[mask]).all():
            early = ~self.waited if mask is None else ~self.waited & mask
            self.t.fail("dependent launch", "global memory is touched before griddepcontrol.wait", early, line)

    def ends(self, gone):
        if self.waits and not self.waited[gone].all():
            self.t.fail("dependent launch", "a thread ends without griddepcontrol.wait", gone & ~self.waited)
