"""A rival's model in a process of its own, and its weights in the cache folder.

The two processes exchange lines of JSON, and arrays as files; `serving.py` is the other side. The rival's process is
stopped while it is not asked: threads of some libraries poll for more work for half a second behind a step, on a core
that the next provider needs. Ours of one candidate took 53 ms in its turn behind llama.cpp, and 28 alone.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from benchmarks.providers import Absent
from benchmarks.rivals.held_down import held_down, require_no_avx512
from benchmarks.rivals.serving import Job
from benchmarks.rivals.torch_decoder import TorchLayers
from clvp_fast.io.files import build_folder_once, cache_folder


@dataclass
class Stored:
    """The tokens that the candidates of a text have behind them when a step begins, and their keys and values.

    prompt: `[prompt, hidden_size]`, carrying its positions. tokens: `[distinct, stored]`, at places `positions`
        `[stored]` of the position table. keys, values: of both, `[num_layers, distinct, num_heads, prompt + stored,
        head_dim]`. position: of the token that is entered.
    """

    prompt: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    position: int

    def embedded(self, layers: TorchLayers) -> torch.Tensor:
        """Return `[distinct, prompt + stored, hidden_size]`, carrying positions."""
        distinct = len(self.tokens)
        spoken = layers.embedded(self.tokens.flatten(), self.positions.repeat(distinct)).unflatten(0, (distinct, -1))
        return torch.cat([self.prompt.expand(distinct, -1, -1), spoken], 1)

    def save(self, layers: TorchLayers, folder: Path) -> None:
        """Write arrays for any rival: keys and values, and the embeddings that these are of."""
        for name, array in (("keys", self.keys), ("values", self.values), ("embedded", self.embedded(layers))):
            np.save(folder / f"{name}.npy", array.numpy())


class RivalProcess:
    """A rival's model in a process of its own; `run` repeats the last call.

    Args:
        rival: a module of this folder, which serves a model's file when it is run. It has `PACKAGES`; `SETTINGS`, by
            kind of weights those that a sweep tries, the first for a run without one; and functions
            `model_file(kind, layers, stored)` and `held_down(isa)`, the variables of its process at an instruction set.
        layers: of a `ClvpForCausalLM` in float32.
        stored: what candidates have behind them, of the distinct ones; the others repeat them. None for a prompt.
        candidates: how many.
        kind: of the rival's weights, a key of its `SETTINGS`.
        settings: of the rival.

    Raises:
        Absent: a package is missing, or our kernels are held down to an instruction set, and the rival's cannot be.
    """

    def __init__(
        self,
        rival: ModuleType,
        layers: TorchLayers,
        stored: Stored | None = None,
        candidates: int = 1,
        *,
        kind: str,
        settings: dict,
    ):
        require_packages(rival)
        self._held_down = held_down(rival)
        self.layers = layers
        self._name = rival.__name__
        file = rival.model_file(kind, layers, stored)
        self._folder = tempfile.TemporaryDirectory()
        if stored is not None:
            stored.save(layers, Path(self._folder.name))
        prompt_len = 0 if stored is None else len(stored.prompt)
        job = Job(str(file), self._folder.name, candidates, prompt_len, torch.get_num_threads(), settings)
        command = [sys.executable, "-m", rival.__name__, json.dumps(asdict(job))]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        # In a session of its own: a stopped member of a process group may cost the whole group its terminal.
        self._process = subprocess.Popen(command, start_new_session=True, env=os.environ | self._held_down, **pipes)
        self.end = weakref.finalize(self, _end, self._process, self._folder)

    def enter(self, **arrays: torch.Tensor) -> torch.Tensor:
        """Return logits `[candidates, vocab_size]` behind what is entered, by the name that the rival reads.

        Raises:
            RuntimeError: the process has ended, or it is held down to a lesser instruction set and used AVX-512.
        """
        folder = Path(self._folder.name)
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array.numpy())
        self._ask("peak")  # it answers when the model is loaded
        begin = time.monotonic()
        self._ask("enter")
        if self._held_down:
            require_no_avx512(self._process.pid, time.monotonic() - begin)
        return torch.from_numpy(np.load(folder / "logits.npy"))

    def run(self) -> None:
        self._ask("run")

    def peak_bytes(self) -> int:
        """Return the most memory that the process has had."""
        return self._ask("peak")["bytes"]

    def _ask(self, what: str) -> dict:
        self._process.send_signal(signal.SIGCONT)
        try:
            print(json.dumps(what), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        self._process.send_signal(signal.SIGSTOP)
        if not answer:
            raise RuntimeError(f"the process of {self._name} ended with status {self._process.wait()}")
        return json.loads(answer)


class DecoderProcess(RivalProcess):
    """A decode step over what is stored, as `TorchDecoder`, with the arguments of `RivalProcess`."""

    def __init__(self, rival: ModuleType, layers: TorchLayers, stored: Stored, candidates: int, **options):
        super().__init__(rival, layers, stored, candidates, **options)
        self.position = torch.tensor([stored.position])

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits `[candidates, vocab_size]` behind `tokens` `[candidates]`."""
        return self.enter(tokens=tokens, hidden=self.layers.embedded(tokens, self.position))


def _end(process: subprocess.Popen, folder: tempfile.TemporaryDirectory) -> None:
    process.send_signal(signal.SIGCONT)
    with suppress(BrokenPipeError):  # it has ended already
        process.stdin.close()
    process.wait()
    process.stdout.close()
    folder.cleanup()


def require_packages(rival: ModuleType) -> None:
    """Raise `Absent` where a package of the rival is missing."""
    if missing := [name for name in rival.PACKAGES if find_spec(name) is None]:
        raise Absent(f"not installed: {', '.join(missing)}")


def require_one_norm(layers: TorchLayers, rival: str) -> None:
    """Raise `Absent` where the two norms at the end cannot be made one, which is all that the rival has."""
    first = layers.decoder.layer_norm
    if any(float(x.min()) != float(x.max()) for x in (first.weight, first.bias)):
        raise Absent(f"{rival} has one norm at the end, and this model's two cannot be made one")


def built(name: str, layers: TorchLayers, build: Callable[[Path], None]) -> Path:
    """Return the folder of this model in the cache, after `build` filled it if it did not exist.

    name: of a rival and a kind of its weights.
    """
    return build_folder_once(cache_folder() / "rivals" / f"{name}-{_fingerprint(layers)}", build)


def _fingerprint(layers: TorchLayers) -> str:
    """Return eight hex digits that tell models apart: by their sizes, and the weights of the first layer's queries."""
    weight = layers.qkv[0].numpy()
    sizes = f"{len(layers.qkv)} {weight.shape} {layers.model.lm_head.weight.shape}"
    return hashlib.sha256(sizes.encode() + weight.tobytes()).hexdigest()[:8]
