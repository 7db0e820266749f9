"""CUDA graphs of a runner's calls: what a call launched once, the host launches again all at once."""

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch

LOGGER = logging.getLogger(__name__)


class Captures:
    """Graphs of calls by name. They run one after another, so that they share one pool of memory.

    A graph launches what its call launched, on the same addresses: so a call takes its inputs from tensors that stay.
    Torch's current device must be the calls' own in all methods.

    Args:
        late: `run` captures a call when it comes for the second time; otherwise only `capture` does.
    """

    def __init__(self, late: bool = False):
        self.late = late
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._ran: set[Hashable] = set()
        self._place: tuple[torch.cuda.Stream, Any] | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    def serves(self, key: Hashable) -> bool:
        """Tell whether `run` replays this call, or will after it has run once."""
        return self.late or key in self._graphs

    def clear(self) -> None:
        """Free all graphs."""
        self._graphs.clear()
        self._ran.clear()

    def capture(self, key: Hashable, call: Callable[[], object]) -> None:
        """Run a call once, which compiles kernels, packs parameters and makes buffers, and capture it."""
        side, current = self._stream_and_pool()[0], torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            call()
        current.wait_stream(side)
        self._record(key, call)

    def run(self, key: Hashable, call: Callable[[], object]) -> None:
        """Replay what was captured under `key`, or make the call.

        If a late capture fails, calls are made from then on.
        """
        if self.late and key in self._ran and key not in self._graphs:
            try:
                self._record(key, call)
            except RuntimeError as error:  # of CUDA, or too little memory for a graph
                self.late = False
                LOGGER.warning("steps are launched one by one, because they could not be captured: %s", error)
        if key in self._graphs:
            self._graphs[key].replay()
        else:
            self._ran.add(key)
            call()

    def _record(self, key: Hashable, call: Callable[[], object]) -> None:
        side, pool = self._stream_and_pool()
        graph = torch.cuda.CUDAGraph()
        # Torch's own stream for captures is one for all devices, so each runner uses another. Calls of other threads,
        # such as allocations, break a capture only in torch's default mode.
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            call()
        self._graphs[key] = graph

    def _stream_and_pool(self) -> tuple[torch.cuda.Stream, Any]:
        if self._place is None:
            self._place = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        return self._place
