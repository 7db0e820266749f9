"""Requests on their way to a result, and the calls that wait for them.

A request is owed until it has its `result` or is `dropped`. Each is one assignment: an exception comes before it or
after it.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch

from clvp_fast.engine.decode_loop import Job
from clvp_fast.engine.requests import CandidateRequest, CandidateResult
from clvp_fast.engine.sampling_params import SamplingParams

# Told (request, candidate, token), and where it asks for states, that of the token.
Listener = Callable[..., object]


@dataclass(eq=False)
class Call:
    """A call of `generate`, `stream` or `generate_async`, until its last result is taken.

    more: whether `requests` may have another one.
    taken: how many it has had.
    states: its listener is told states too.
    closed: nobody waits for its results any more.
    owed: its requests whose results were not taken.
    """

    requests: Iterator[Any]
    sampling: SamplingParams
    keep: int
    listener: Listener | None = None
    states: bool = False
    more: bool = True
    taken: int = 0
    closed: bool = False
    owed: dict["Pending", None] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return not self.more and not self.owed


@dataclass(eq=False)
class Pending:
    """A request from its submission until its caller takes the result.

    job: once the request was checked and its prompt made, with `text_ids`; `prepared` says when.
    broken_steps: how many steps that it had a part in broke off.
    """

    call: "ref[Call]"
    request: CandidateRequest
    keep: int
    listener: Listener | None
    submitted: float = field(default_factory=time.perf_counter)
    text_ids: torch.Tensor = field(init=False, repr=False)
    job: Job = field(init=False, repr=False)
    prepared: float = 0.0
    broken_steps: int = 0
    result: CandidateResult | None = None
    dropped: bool = False

    @property
    def settled(self) -> bool:
        return self.dropped or self.result is not None

    @property
    def deadline(self) -> float:
        return math.inf if self.request.timeout is None else self.submitted + self.request.timeout

    @property
    def abandoned(self) -> bool:
        """Whether its caller has gone, with or without a word."""
        call = self.call()
        return call is None or call.closed

    def fail(self, error: Exception) -> None:
        seconds = time.perf_counter() - self.submitted
        self.result = CandidateResult(self.request, error=error, timings={"queue": seconds})


def tell(of: "ref[Pending]", candidate: int, token: int, *state: torch.Tensor) -> None:
    """Tell a request's listener, unless it has ended meanwhile; if it raises, the request fails and no other.

    By a weak reference, since the request holds the job that holds this.
    """
    pending = of()
    if pending is None or pending.settled or pending.listener is None:
        return
    try:
        pending.listener(pending.request, candidate, token, *state)
    except Exception as error:
        pending.fail(error)  # where the listener has dropped it meanwhile, no one asks for that
