"""CLVP's decode step in ONNX Runtime on a CPU, in float32 or with its dynamic quantisation, in a process of its own.

The graph is exported from the layers of `torch_decoder.py`. Stored keys and values are its inputs, and are attended to
where they lie: a graph that appends to them copies all of them at every step. The weights are in files of the cache
folder, one folder for each model. The two processes exchange lines of JSON, and arrays as files.
"""

import json
import subprocess
import sys
import tempfile
import weakref
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from benchmarks.providers import Absent
from benchmarks.rivals.torch_decoder import TorchLayers
from clvp_fast.io.files import build_folder_once, cache_folder

PACKAGES = ("onnxruntime", "onnx", "onnxscript")


class OnnxDecoder:
    """A decode step over existing keys, as `TorchDecoder`; `run` repeats the last one.

    Args:
        model: a `ClvpForCausalLM` in float32.
        keys, values: `[num_layers, candidates, num_heads, tokens, head_dim]`, without the token that is entered.
        position: of the token that is entered, in the position table.
        int8: weights and what they multiply are quantised to 8 bits, as `quantize_dynamic` does it.
        name: of the model's files.

    Raises:
        Absent: a package is missing.
    """

    def __init__(self, model, keys: torch.Tensor, values: torch.Tensor, position: int, *, int8: bool, name: str):
        if missing := [package for package in PACKAGES if find_spec(package) is None]:
            raise Absent(f"not installed: {', '.join(missing)}")
        self.layers = TorchLayers(model)
        self.position = torch.tensor([position])
        self._folder = tempfile.TemporaryDirectory()
        for kind, stored in (("keys", keys), ("values", values)):
            np.save(self._file(kind), stored.numpy())
        graph = exported(self.layers, name) / ("int8.onnx" if int8 else "float32.onnx")
        command = [sys.executable, "-m", __name__, str(graph), self._folder.name, str(torch.get_num_threads())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        weakref.finalize(self, _end, self._process, self._folder)

    def _file(self, kind: str) -> Path:
        return Path(self._folder.name, f"{kind}.npy")

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits `[candidates, vocab_size]` behind `tokens` `[candidates]`."""
        np.save(self._file("hidden"), self.layers.embedded(tokens, self.position).numpy())
        self._ask("enter")
        return torch.from_numpy(np.load(self._file("logits")))

    def run(self) -> None:
        self._ask("run")

    def peak_bytes(self) -> int:
        """Return the most memory that the process has had."""
        return self._ask("peak")["bytes"]

    def _ask(self, what: str) -> dict:
        print(json.dumps(what), file=self._process.stdin, flush=True)
        if not (answer := self._process.stdout.readline()):
            raise RuntimeError(f"the process of ONNX Runtime ended with status {self._process.wait()}")
        return json.loads(answer)


def _end(process: subprocess.Popen, folder: tempfile.TemporaryDirectory) -> None:
    process.stdin.close()
    process.wait()
    process.stdout.close()
    folder.cleanup()


def exported(layers: TorchLayers, name: str) -> Path:
    """Return the folder with both graphs, which are made where it is missing."""
    folder = cache_folder() / "rivals" / f"onnx-{name}"
    if not folder.exists():
        build_folder_once(folder, lambda scratch: _export(layers, scratch))
    return folder


class _Step(torch.nn.Module):
    """The graph: a token's embedding, and stored keys and values, to logits and the token's own keys and values."""

    def __init__(self, layers: TorchLayers):
        super().__init__()
        self.model, self.layers = layers.model, layers

    def forward(self, hidden, keys, values):
        new: list[tuple[torch.Tensor, torch.Tensor]] = []

        def attend(index, q, k, v):
            new.append((k, v))
            q = q[:, :, None] * q.shape[-1] ** -0.5
            k, v = k[:, :, None], v[:, :, None]
            stored, own = q @ keys[index].transpose(-1, -2), (q * k).sum(-1, keepdim=True)
            weights = torch.cat((stored, own), -1).softmax(-1)
            return (weights[..., :-1] @ values[index] + weights[..., -1:] * v)[:, :, 0]

        hidden = self.layers(hidden, attend)
        return self.layers.logits(hidden), [k for k, _ in new], [v for _, v in new]


@torch.no_grad()
def _export(layers: TorchLayers, folder: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    config = layers.model.config
    heads, width, count = config.num_attention_heads, config.hidden_size, config.num_hidden_layers
    # Of other objects than the keys: the exporter takes two arguments that are one tensor for one input.
    keys, values = ([torch.zeros(3, heads, 5, width // heads) for _ in range(count)] for _ in range(2))
    rows, tokens = torch.export.Dim("rows", min=1), torch.export.Dim("tokens", min=1)
    shape = [{0: rows, 2: tokens}] * count
    numbers = range(count)
    torch.onnx.export(
        _Step(layers).eval(),
        (torch.zeros(3, width), keys, values),
        folder / "float32.onnx",
        input_names=["hidden", *(f"{kind} {n}" for kind in ("keys", "values") for n in numbers)],
        output_names=["logits", *(f"new {kind} {n}" for kind in ("keys", "values") for n in numbers)],
        dynamic_shapes=({0: rows}, shape, shape),
        dynamo=True,
        external_data=True,
        verbose=False,
    )
    quantize_dynamic(
        folder / "float32.onnx",
        folder / "int8.onnx",
        weight_type=QuantType.QInt8,
        per_channel=True,
        use_external_data_format=True,
    )


def serve(graph: str, folder: str, threads: int) -> None:
    """Answer the lines of stdin: `enter` the embeddings in a file, `run` the same again, or tell the `peak`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feed = {}
    for kind in ("keys", "values"):
        feed |= {f"{kind} {n}": layer for n, layer in enumerate(np.load(Path(folder, f"{kind}.npy")))}
    for line in sys.stdin:
        answer = {}
        if json.loads(line) == "peak":
            status = Path("/proc/self/status").read_text()
            answer["bytes"] = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        else:
            if json.loads(line) == "enter":
                feed["hidden"] = np.load(Path(folder, "hidden.npy"))
            logits = session.run(None, feed)[0]
            if json.loads(line) == "enter":
                np.save(Path(folder, "logits.npy"), logits)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
