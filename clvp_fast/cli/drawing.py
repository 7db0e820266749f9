"""The candidates of items, drawn and ranked by an engine under a bar, for `generate` and `speak`."""

import argparse
import time
from collections.abc import Callable

import torch

from clvp_fast.checkpoint import Checkpoint
from clvp_fast.cli import report
from clvp_fast.cli.items import Item
from clvp_fast.cli.progress import decoding_bar, warm_up
from clvp_fast.engine.building import build_engine
from clvp_fast.engine.memory import human_bytes
from clvp_fast.engine.requests import CandidateRequest, CandidateResult
from clvp_fast.engine.sampling_params import SamplingParams
from clvp_fast.models.clvp.tokens import stop_token


class Drawing:
    """Make an engine with no more places than the items have candidates, and note its plan of memory.

    Args:
        sampling: of every item.
        arguments: of the command line.

    Attributes:
        engine: draws and ranks.
        seconds: by stage.

    Raises:
        ValueError: too little memory for a single candidate.
    """

    def __init__(self, checkpoint: Checkpoint, sampling: SamplingParams, arguments: argparse.Namespace, num_items: int):
        assert sampling.num_candidates is not None  # a default was filled in
        self.checkpoint, self.sampling, self.arguments = checkpoint, sampling, arguments
        self.seconds: dict[str, float] = {}
        self._candidates = sampling.num_candidates
        total = num_items * self._candidates
        self.engine = build_engine(checkpoint, arguments, arguments.memory_fraction, candidates=total)
        plan = self.engine.memory
        report.note(
            f"{total} candidates, {plan.max_batch} at a time, in {human_bytes(plan.total)} of the "
            f"{human_bytes(plan.budget)} of memory that may be used"
        )
        if checkpoint.model.device.type == "cuda":
            self.seconds["warm_up"] = warm_up(self.engine)

    def draw(self, items: list[Item], receive: Callable[[Item, CandidateResult], None]) -> float:
        """Draw candidates of all items as one batch, and call `receive` with each item that has them, as it is done.

        An item that fails gets its error; one without a folder of its own raises it.

        Returns:
            The seconds that `receive` took, which are not part of `seconds`.

        Raises:
            ValueError: the only item fails, or there is too little memory for a single candidate.
        """
        planned, started, receiving = self.engine.memory.max_batch, time.perf_counter(), 0.0
        stop = stop_token(self.checkpoint.model.config.decoder_config)
        keep = self.arguments.keep or self._candidates
        requests = [_request(item) for item in items]
        with decoding_bar(len(items), self._candidates, self.sampling.max_new_tokens, stop) as bar:
            try:
                for result in self.engine.generate(requests, self.sampling, keep=keep, on_token=bar):
                    bar.close(result.request)
                    began = time.perf_counter()
                    item: Item = result.request.id
                    item.error = result.failure(self.arguments.dtype)
                    if item.error and not item.folder:
                        raise ValueError(item.error)
                    if not item.error:
                        receive(item, result)
                    receiving += time.perf_counter() - began
                    bar.paused = receiving
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    "there is too little memory for a single candidate; free some, choose a smaller "
                    "--max-new-tokens, or a half type with --dtype"
                ) from error
        self.seconds["generate_and_score"] = time.perf_counter() - started - receiving
        if self.engine.memory.max_batch < planned:
            report.note(f"memory ran out on the way: the rest was decoded {self.engine.memory.max_batch} at a time")
        return receiving


def _request(item: Item) -> CandidateRequest:
    assert item.ids is not None and item.voice is not None  # it has no error
    return CandidateRequest(input_ids=item.ids[0], conditioning=item.voice.voice, id=item)
