"""State that outlives a process: atomic files, and trainings that continue where they were.

Everything is in `$CLVP_FAST_CACHE/train` (`clvp_fast.io.files.cache_folder`). A draw depends only on the number of the
step, so that an interrupted training gives the weights of one that was not.
"""

import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from clvp_fast.io.files import cache_folder, make_private, replacing


class Interrupted(Exception):
    """The process was asked to end; its state is saved."""


class Refused(ValueError):
    """The recipe refuses to run; the message is one sentence that says what to do."""


class Stop:
    """A request to end this process: by SIGTERM, by Ctrl-C, or because its parent is gone."""

    def __init__(self):
        self.requested = False
        self.parent = None

    def listen(self, parent: int | None = None) -> "Stop":
        self.parent = parent
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)
        return self

    def _ask(self, *_):
        self.requested = True

    def check(self) -> None:
        """Raise `Interrupted` if the process is to end."""
        if self.requested or (self.parent is not None and os.getppid() != self.parent):
            raise Interrupted("asked to end")

    def wait(self, seconds: float) -> None:
        """Sleep, and raise `Interrupted` if the process is to end."""
        time.sleep(seconds)
        self.check()


STOP = Stop()


def home() -> Path:
    """Return the folder of the recipe's state; make it if it does not exist."""
    folder = cache_folder() / "train"
    make_private(folder)
    return folder


@contextmanager
def alone(folder: Path, work: str) -> Iterator[None]:
    """Keep other processes from doing the same `work` on a state; the lock ends with the process, however that ends.

    Raises:
        Refused: another process does it.
    """
    with open(folder / f"{work}.lock", "w", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(f"another process works on {folder} already: end it, or let it go on") from error
        yield


def save_arrays(path: Path, **arrays) -> None:
    """Write an `.npz` file, whole or absent; strings become arrays."""
    make_private(path.parent)
    with replacing(path) as scratch, open(scratch, "wb") as file:
        np.savez(file, **arrays)


def note(folder: Path, **row) -> None:
    """Print one row, and add it to `log.jsonl`."""
    row = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), **row}
    line = json.dumps(row)
    print(line, flush=True)
    with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(line + "\n")


class Training:
    """A training of modules for a number of steps, with their running average and their optimizers.

    Iterating yields the numbers of the remaining steps. Between steps the state is saved after every `every` seconds of
    this process's CPU time, and before `Interrupted` is raised because the process is to end.

    Args:
        folder: the folder of `NAME.pt`; an existing training continues.
        modules: the modules to train.
        optimizers: theirs; their learning rates are the highest ones.
        steps: the number of steps in all.
        average: the share of the running average that a step keeps, once there are many.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        modules: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        steps: int,
        average: float = 0.999,
        every: float = 60.0,
    ):
        self.path, self.modules, self.optimizers, self.steps = folder / f"{name}.pt", modules, optimizers, steps
        self.average, self.every = average, every
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self.step, self.spent = 0, 0.0
        self.averages = {key: value.detach().clone() for key, value in modules.state_dict().items()}
        if self.path.is_file():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.path, weights_only=True)
        self.modules.load_state_dict(state["weights"])
        self.averages = state["averages"]
        if state["optimizers"] is not None:  # only weights: the optimizers start over
            for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
        self.step, self.spent = state["step"], state["spent"]

    def save(self) -> None:
        state = {
            "weights": self.modules.state_dict(),
            "averages": self.averages,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "spent": self.spent,
        }
        make_private(self.path.parent)
        with replacing(self.path) as scratch:
            torch.save(state, scratch)

    def rate(self) -> float:
        """Return the learning rate relative to the highest: up over 40 steps, flat, and down over the last third."""
        left = (self.steps - self.step) / self.steps
        return min(1.0, (self.step + 1) / 40, max(0.02, 3 * left))

    def __iter__(self) -> Iterator[int]:
        began = saved = time.process_time()
        while self.step < self.steps:
            factor = self.rate()
            for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            yield self.step
            self.step += 1
            self._follow()
            now = time.process_time()
            self.spent, began = self.spent + now - began, now
            if now - saved > self.every or STOP.requested or self.step == self.steps:
                self.save()
                saved = now
            STOP.check()

    def learn(self, loss: torch.Tensor) -> None:
        """Take one step of the optimizers on the gradient of `loss`, clipped to length 1."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        parameters = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()

    @torch.no_grad()
    def _follow(self) -> None:
        share = min(self.average, self.step / (self.step + 10))
        for key, value in self.modules.state_dict().items():
            if value.is_floating_point():
                self.averages[key].lerp_(value, 1 - share)
            else:
                self.averages[key].copy_(value)


def begin_from(path: Path, weights: dict[str, torch.Tensor], step: int, spent: float) -> None:
    """Write the state of a training at `step` of which only the weights are left."""
    weights = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    make_private(path.parent)
    with replacing(path) as scratch:
        state = {"weights": weights, "averages": weights, "optimizers": None, "step": step, "spent": spent}
        torch.save(state, scratch)


def step_of(path: Path) -> int:
    """Return the steps of the training that saved `path`; -1 if there is none."""
    return torch.load(path, weights_only=True, mmap=True)["step"] if path.is_file() else -1


def averages_of(path: Path) -> dict[str, torch.Tensor]:
    """Return the latest running averages of a training. Raises `Refused` if there are none yet."""
    if not path.is_file():
        raise Refused(f"there is no {path.name} in {path.parent} yet: train first")
    return torch.load(path, weights_only=True)["averages"]


def draws(*seed: int) -> np.random.Generator:
    """Return a generator for one step: the same numbers give the same draws."""
    return np.random.default_rng(seed)
