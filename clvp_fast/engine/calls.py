"""Requests on their way to a result, and the calls that wait for them.

A request is pending until it has its `result` or is `dropped`. Both are set by one assignment, which an exception
cannot split.
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

# Called with (request, candidate, token), and with the token's state if it asks for states.
Listener = Callable[..., object]


@dataclass(eq=False)
class Call:
    """A call of `generate`, `stream` or `generate_async`, until its last result is taken.

    more: whether `requests` may hold another request.
    taken: how many requests it has taken from there.
    states: its listener also gets the decoder's states.
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

    job: set with `text_ids` once the request is checked and its prompt made, at the time `prepared`.
    broken_steps: how many steps broke off in which it took part.
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
        """Tell whether its caller has gone, by closing the call or by dropping it."""
        call = self.call()
        return call is None or call.closed

    def fail(self, error: Exception) -> None:
        seconds = time.perf_counter() - self.submitted
        self.result = CandidateResult(self.request, error=error, timings={"queue": seconds})


def tell(of: "ref[Pending]", candidate: int, token: int, *state: torch.Tensor) -> None:
    """Call a request's listener, unless the request has ended; an error of the listener fails that request alone.

    The reference is weak, because the request holds the job, and the job holds this function.
    """
    pending = of()
    if pending is None or pending.settled or pending.listener is None:
        return
    try:
        pending.listener(pending.request, candidate, token, *state)
    except Exception as error:
        pending.fail(error)  # where the listener has dropped the request, no one reads the error
